"""What tables are made from: a checkpoint's FFNs or an existing bundle, behind one interface.

V vocabulary, L layers, D hidden, N rows of a block. Rows are addressed by slot: slot 0 is the most
frequent token where counts are known (SPEC section 5), the token with id 0 otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.cold_rows import ColdPlanes
from tolkit.errors import BundleError, CheckpointError, InputError, UsageError
from tolkit.model import CheckpointFiles, LayerFfn, checkpoint_tensors
from tolkit.model.files import require_finite
from tolkit.parallel import all_intra_op_threads
from tolkit.rotation import rotated
from tolkit_formats import digests, files
from tolkit_formats.codecs import Bands, Codec, Steps, Svd, prepared
from tolkit_formats.entropy import Coding
from tolkit_formats.layer_errors import LayerErrors
from tolkit_formats.limits import NO_SLOT
from tolkit_formats.manifest import HistoryEntry, LayerDigests, LayerStatus, Sources
from tolkit_formats.partial import ffn_names
from tolkit_formats.predictor import Predictor, unit_rows
from tolkit_formats.reader import Bundle, open_bundle
from tolkit_formats.tensorfile import TensorInfo, TensorStream

__all__ = [
    "BundleSource",
    "CheckpointSource",
    "PlaneReader",
    "TableSource",
    "decode_plane",
    "is_bundle",
    "open_source",
    "unknown_counts",
]

_COPY_BYTES = 8 << 20

PlaneReader = Callable[[int, int], Tensor]
"""`reader(first_slot, stop_slot)` -> float32 [N, D]; safe to call from several threads."""


class TableSource(Protocol):
    """Where planes come from, and everything of the source that a bundle keeps.

    `num_rows` of the slots, the first ones, get a record in what is written: V, or fewer once
    `keep_rows` said so; of a partial bundle what it has. Every slot of 0..V-1 can be read.
    """

    path: Path
    vocab_size: int
    num_rows: int
    num_layers: int
    hidden_size: int
    statuses: tuple[LayerStatus, ...]
    combine: str
    lookup_scale: float
    out_of_range: str
    identity: str | None
    history: tuple[HistoryEntry, ...]
    token_counts_V: npt.NDArray[np.uint64] | None
    slot_of_token_V: npt.NDArray[np.uint32] | None
    tier_ranges: tuple[tuple[int, int], ...]
    predictors: Mapping[int, Predictor]
    coding: Coding | None
    errors: tuple[LayerErrors, ...]

    def use_counts(self, counts_V: npt.NDArray[np.uint64]) -> None:
        """From now on order slots by these counts, and keep them; before anything is read."""

    def keep_rows(self, count: int) -> None:
        """From now on only the first `count` slots are written; after `use_counts`."""

    def plane(self, layer: int) -> PlaneReader:
        """Get ready to read one layer's table."""

    def embedded(self, first_slot: int, stop_slot: int) -> Tensor:
        """Embedding rows of the tokens in a run of slots: float32 [N, D]."""

    def plane_codecs(self, layer: int) -> tuple[Codec, ...]:
        """How the layer is stored in each tier, empty when it is computed from weights."""

    def token_at(self, slot: int) -> int:
        """Token id whose rows lie in a slot."""

    def stored_plane(self, layer: int, first_slot: int, stop_slot: int) -> npt.NDArray[np.uint8]:
        """A stored plane's bytes U8 [N, B], for copying (bundles only)."""

    def stored_shared(self, layer: int) -> Mapping[str, tuple[str, npt.NDArray[Any]]]:
        """A stored plane's shared arrays, name -> (dtype, array), for copying (bundles only)."""

    def stored_common(self) -> Mapping[str, tuple[str, npt.NDArray[Any]]]:
        """Arrays all stored planes share (the entropy coder's), for copying."""

    def sources(self) -> Sources:
        """Digests of weights, tokenizer and config; reads all weights once."""

    def root_files(self) -> Mapping[str, bytes]:
        """config.json and tokenizer files."""

    def write_backbone(self, path: Path) -> None:
        """Write backbone.safetensors."""

    def write_ffn(self, path: Path, layers: Sequence[int]) -> None:
        """Write ffn.safetensors with the weights of these layers (not of whole bundles)."""

    def require_unchanged(self) -> None:
        """Raise when what was read is no longer what the source holds."""


def is_bundle(path: Path) -> bool:
    """Whether a folder claims to be a bundle."""
    return (path / "tol.json").exists() or path.name.endswith(".tol")


def open_source(path: str | Path) -> TableSource:
    """The tables of a checkpoint folder (FFN path) or of a bundle.

    Raises:
        InputError and its kin: as `checkpoint_tensors` and `open_bundle`.
    """
    path = Path(path)
    return BundleSource(path) if is_bundle(path) else CheckpointSource(path)


def slots_by_count(counts_V: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Token -> slot, count descending, id ascending: U32 [V]."""
    order = np.lexsort((np.arange(len(counts_V)), ~counts_V))
    slot_of_token_V = np.empty(len(counts_V), np.uint32)
    slot_of_token_V[order] = np.arange(len(counts_V), dtype=np.uint32)
    return slot_of_token_V


class CheckpointSource:
    """Planes computed by the checkpoint's memory FFNs, weights mapped from file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: CheckpointFiles = checkpoint_tensors(path)
        config = self._files.config
        if not config.has_tables:
            raise CheckpointError(
                f"{path}: is a dense checkpoint, its FFNs read the residual stream, "
                "so it has no token-wise tables",
                hint="train one with: tol train DATA -o CKPT --arch memory",
            )
        self.vocab_size = self.num_rows = config.vocab_size
        self.num_layers = config.num_hidden_layers
        self.hidden_size = config.hidden_size
        self.statuses = (LayerStatus("kept"),) * self.num_layers
        self.combine = "residual_add"
        self.lookup_scale: float = 1
        self.out_of_range = "error"
        self.identity: str | None = None
        self.history: tuple[HistoryEntry, ...] = ()
        self.token_counts_V = self._files.token_counts()
        self.slot_of_token_V: npt.NDArray[np.uint32] | None = None
        self.tier_ranges: tuple[tuple[int, int], ...] = ((0, self.vocab_size),)
        self.predictors: Mapping[int, Predictor] = {}
        self.coding: Coding | None = None
        self.errors: tuple[LayerErrors, ...] = ()
        self._sources: Sources | None = None
        self._token_of_slot = torch.arange(self.vocab_size)
        if self.token_counts_V is not None:
            self.use_counts(self.token_counts_V)

    def use_counts(self, counts_V: npt.NDArray[np.uint64]) -> None:
        """See TableSource."""
        self.token_counts_V = counts_V
        self.slot_of_token_V = slots_by_count(counts_V)
        order = np.argsort(self.slot_of_token_V)
        self._token_of_slot = torch.from_numpy(order.astype(np.int64))

    def keep_rows(self, count: int) -> None:
        """See TableSource. UsageError where no counts say which."""
        if self.token_counts_V is None and count < self.vocab_size:
            raise unknown_counts(self.path)
        self.num_rows = count

    def plane(self, layer: int) -> PlaneReader:
        """Loads this layer's FFN (LayerFfn states the memory); `sources` has checked it."""
        with all_intra_op_threads():  # widening weights rounds nothing, so threads change no bit
            ffn = LayerFfn(self._files, layer, checked=self._sources is not None)
        token_of_slot = self._token_of_slot

        def read(first_slot: int, stop_slot: int) -> Tensor:
            return ffn(token_of_slot[first_slot:stop_slot])

        return read

    def embedded(self, first_slot: int, stop_slot: int) -> Tensor:
        """See TableSource."""
        weight_VD = self._files.tensor("model.embed_tokens.weight")
        return weight_VD[self._token_of_slot[first_slot:stop_slot]].float()

    def plane_codecs(self, layer: int) -> tuple[Codec, ...]:
        """None: rows are computed."""
        return ()

    def token_at(self, slot: int) -> int:
        """See TableSource."""
        return int(self._token_of_slot[slot])

    def stored_plane(self, layer: int, first_slot: int, stop_slot: int) -> npt.NDArray[np.uint8]:
        """Never: a checkpoint stores no planes."""
        raise AssertionError("a checkpoint has no stored planes")

    def stored_shared(self, layer: int) -> Mapping[str, tuple[str, npt.NDArray[Any]]]:
        """Never: a checkpoint stores no planes."""
        raise AssertionError("a checkpoint has no stored planes")

    def stored_common(self) -> Mapping[str, tuple[str, npt.NDArray[Any]]]:
        """None."""
        return {}

    def sources(self) -> Sources:
        """See TableSource. NonFiniteError names the tensor of a NaN or infinite weight."""
        if self._sources is None:
            self._sources = self._read_sources()
        return self._sources

    def _read_sources(self) -> Sources:
        # Everything is looked at before hours of encoding, the backbone too.
        self._files.check_finite(self._backbone_names())
        tokenizer = self._files.tokenizer_bytes
        layers = []
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}.memory_"
            weights = [
                self._digest(f"{prefix}mlp.{part}_proj.weight") for part in ("gate", "up", "down")
            ]
            layers.append(
                LayerDigests(
                    self._digest(f"{prefix}layernorm.weight"), digests.json_digest(weights)
                )
            )
        return Sources(
            embedding=self._digest("model.embed_tokens.weight"),
            tokenizer=None
            if tokenizer is None
            else digests.tokenizer_digest(
                tokenizer, self.vocab_size, f"{self.path}/tokenizer.json"
            ),
            config=digests.json_digest(json.loads(self.root_files()["config.json"])),
            layers=tuple(layers),
        )

    def _digest(self, name: str) -> str:
        require_finite(self._files.tensor(name), name, self.path)
        info = self._files.info(name)
        return digests.array_digest(info.dtype, info.shape, [self._files.array(name)])

    def _backbone_names(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self._files.names if ".memory_" not in name))

    def root_files(self) -> Mapping[str, bytes]:
        """config.json and the tokenizer files as stored."""
        config = files.read_bytes(self.path / "config.json", limit_bytes=1 << 20)
        return {"config.json": config, **self._files.tokenizer_files()}

    def write_backbone(self, path: Path) -> None:
        """All tensors but the memory FFNs and their norms, in their stored dtypes.

        `sources` has checked that they are finite.
        """
        self._write_tensors(path, self._backbone_names())

    def write_ffn(self, path: Path, layers: Sequence[int]) -> None:
        """Memory FFNs and their norms in their stored dtypes; `sources` has checked them."""
        names = [name for layer in layers for name in ffn_names(layer).values()]
        self._write_tensors(path, sorted(names))

    def _write_tensors(self, path: Path, names: Sequence[str]) -> None:
        infos = {name: self._files.info(name) for name in names}
        _write_weights(path, infos, self._files.array)

    def require_unchanged(self) -> None:
        """CheckpointError when a file was written to since it was opened."""
        self._files.require_unchanged()


class BundleSource:
    """Planes decoded from a bundle; of partial tables, cold rows computed and behind the others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bundle: Bundle = open_bundle(path)
        manifest = self.bundle.manifest
        if manifest.num_rows != manifest.vocab_size and manifest.partial is None:
            raise InputError(
                f"{path}: has {manifest.num_rows:,} records for {manifest.vocab_size:,} tokens "
                "and nothing to compute the other rows from"
            )
        self.num_rows = manifest.num_rows
        self.vocab_size = manifest.vocab_size
        self.num_layers = manifest.num_layers
        self.hidden_size = manifest.hidden_size
        self.statuses = manifest.layers
        self.combine = manifest.combine
        self.lookup_scale = manifest.lookup_scale
        self.out_of_range = manifest.out_of_range
        self.identity: str | None = self.bundle.identity
        self.history = manifest.history
        self.token_counts_V = self.bundle.token_counts()
        self.slot_of_token_V = self.bundle.slot_of_token
        if manifest.partial is not None:
            assert self.slot_of_token_V is not None, "parse_manifest lets no identity map pass"
            self.slot_of_token_V = self._with_cold_slots(self.slot_of_token_V.copy())
        self.tier_ranges = tuple((t.first_slot, t.first_slot + t.num_rows) for t in manifest.tiers)
        self.predictors = manifest.predictors
        self.coding = manifest.coding
        self.errors = manifest.encoding.errors
        self._stored_slot_V: npt.NDArray[np.int64] | None = None  # of new slots, once reordered

    def use_counts(self, counts_V: npt.NDArray[np.uint64]) -> None:
        """See TableSource; stored records stay where they are and are picked one by one."""
        slot_of_token_V = slots_by_count(counts_V)
        token_of_slot = np.argsort(slot_of_token_V)
        self.token_counts_V = counts_V
        if self.bundle.manifest.partial is not None:
            token_of_slot = token_of_slot[self.bundle.has_record(token_of_slot)]
            slot_of_token_V[:] = NO_SLOT
            slot_of_token_V[token_of_slot] = np.arange(len(token_of_slot), dtype=np.uint32)
            slot_of_token_V = self._with_cold_slots(slot_of_token_V)
        self._stored_slot_V = self.bundle.slots_of(token_of_slot)
        self.slot_of_token_V = slot_of_token_V
        self.tier_ranges = ((0, self.num_rows),)

    def _with_cold_slots(self, slot_of_token_V: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """The map filled up (mutated): cold tokens behind the others, in the usual order."""
        cold = np.flatnonzero(slot_of_token_V == NO_SLOT)
        counts = np.zeros(len(cold), np.uint64)
        if self.token_counts_V is not None:
            counts = self.token_counts_V[cold]
        stored = self.vocab_size - len(cold)
        slot_of_token_V[cold] = slots_by_count(counts) + np.uint32(stored)
        return slot_of_token_V

    def keep_rows(self, count: int) -> None:
        """See TableSource. UsageError: more than there are, or none of the others' FFN weights."""
        if count == self.num_rows:
            return
        partial = self.bundle.manifest.partial
        if partial is None:
            raise UsageError(
                f"{self.path}: keeps no FFN weights to compute the rows of other tokens from",
                hint="keep rows of the checkpoint: tol compress CKPT --keep-rows N",
            )
        if count > partial.rows:
            raise UsageError(
                f"--keep-rows: {count:,} rows, {self.path} has records of {partial.rows:,} tokens",
                hint="keep rows of the checkpoint: tol compress CKPT --keep-rows N",
            )
        if self.token_counts_V is None:
            raise unknown_counts(self.path)
        self.num_rows = count
        self.tier_ranges = ((0, count),)

    def plane(self, layer: int) -> PlaneReader:
        """Expands the plane's basis and predictor, if it has them."""
        bundle = self.bundle
        stored = {**bundle.shared(layer), **bundle.common}
        codecs = dict(zip(bundle.manifest.tiers, self._codecs(layer), strict=True))
        ready = {
            tier.index: {
                name: torch.from_numpy(array) for name, array in prepared(codec, stored).items()
            }
            for tier, codec in codecs.items()
        }
        weights_DD = bundle.predictor_weights(layer)
        stored_rows = bundle.manifest.num_rows
        cold = None if self._cold is None else self._cold.plane(layer)
        tokens = torch.from_numpy(self._tokens)

        def read(first_slot: int, stop_slot: int) -> Tensor:
            if stop_slot <= stored_rows:
                return read_stored(first_slot, stop_slot)
            assert cold is not None, "a whole table has no slots behind the stored ones"
            cold_ND = cold(tokens[max(first_slot, stored_rows) : stop_slot])
            if first_slot >= stored_rows:
                return cold_ND
            return torch.cat([read_stored(first_slot, stored_rows), cold_ND])

        def read_stored(first_slot: int, stop_slot: int) -> Tensor:
            pieces = bundle.plane_pieces(layer, self._stored_slots(first_slot, stop_slot))
            rows_ND = torch.empty((stop_slot - first_slot, self.hidden_size))
            for tier, where, plane_NB in pieces:
                rows_ND[where] = decode_plane(codecs[tier], plane_NB, ready[tier.index])
            if weights_DD is not None:
                unit_ND = unit_rows(self.embedded(first_slot, stop_slot).numpy())
                rows_ND += torch.from_numpy(unit_ND) @ torch.from_numpy(weights_DD).T
            return rows_ND

        return read

    @cached_property
    def _cold(self) -> ColdPlanes | None:
        return None if self.bundle.manifest.partial is None else ColdPlanes(self.bundle)

    def _stored_slots(self, first_slot: int, stop_slot: int) -> npt.NDArray[np.int64]:
        if self._stored_slot_V is None:
            return np.arange(first_slot, stop_slot)
        return self._stored_slot_V[first_slot:stop_slot]

    def _codecs(self, layer: int) -> tuple[Codec, ...]:
        tiers = self.bundle.manifest.tiers
        return tuple(p.codec for tier in tiers for p in tier.planes if p.layer == layer)

    def embedded(self, first_slot: int, stop_slot: int) -> Tensor:
        """See TableSource."""
        return torch.from_numpy(self.bundle.embedded(self._tokens[first_slot:stop_slot]))

    @property
    def _tokens(self) -> npt.NDArray[np.int64]:
        """Token in each slot."""
        slots = self.slot_of_token_V
        return np.arange(self.vocab_size) if slots is None else np.argsort(slots)

    def plane_codecs(self, layer: int) -> tuple[Codec, ...]:
        """The codec of a kept layer in each tier."""
        self.bundle.plane(layer)
        return self._codecs(layer)

    def token_at(self, slot: int) -> int:
        """See TableSource."""
        return int(self._tokens[slot])

    def stored_plane(self, layer: int, first_slot: int, stop_slot: int) -> npt.NDArray[np.uint8]:
        """See TableSource."""
        pieces = self.bundle.plane_bytes(layer, first_slot, stop_slot)
        return np.concatenate([plane for _, plane in pieces])

    def stored_shared(self, layer: int) -> Mapping[str, tuple[str, npt.NDArray[Any]]]:
        """See TableSource."""
        return _with_dtypes(self.bundle.shared(layer))

    def stored_common(self) -> Mapping[str, tuple[str, npt.NDArray[Any]]]:
        """See TableSource."""
        return _with_dtypes(self.bundle.common)

    def sources(self) -> Sources:
        """Carried over from the bundle's own manifest."""
        return self.bundle.manifest.sources

    def root_files(self) -> Mapping[str, bytes]:
        """config.json and the tokenizer files, digests checked."""
        names = ("config.json", "tokenizer.json", "tokenizer_config.json")
        contents = {name: self.bundle.file_bytes(name) for name in names}
        return {name: data for name, data in contents.items() if data is not None}

    def write_backbone(self, path: Path) -> None:
        """A copy, its digest checked on the way."""
        name = "backbone.safetensors"
        view = files.bytes_view(files.map_bytes(self.path / name))
        if hashlib.sha256(view).hexdigest() != self.bundle.manifest.files[name].sha256:
            raise BundleError(f"{self.path}/{name}: does not match its digest")
        with files.FileWriter(path, expected_bytes=len(view)) as writer:
            for start in range(0, len(view), _COPY_BYTES):
                writer.write(view[start : start + _COPY_BYTES])

    def write_ffn(self, path: Path, layers: Sequence[int]) -> None:
        """The weights of these layers from a partial bundle, their digests checked."""
        names = sorted(name for layer in layers for name in ffn_names(layer).values())
        found = {layer: self.bundle.ffn_file(layer) for layer in layers}
        file = found[layers[0]]
        _write_weights(path, {name: file.infos[name] for name in names}, file.array)

    def require_unchanged(self) -> None:
        """Nothing to do: every byte read was checked against the manifest."""


def _write_weights(
    path: Path,
    infos: Mapping[str, TensorInfo],
    array: Callable[[str], npt.NDArray[np.generic]],
) -> None:
    """Tensors as they are stored, piece by piece."""
    directory = [(name, info.dtype, info.shape) for name, info in infos.items()]
    with TensorStream(path, directory, {"format": "pt"}) as stream:
        for name in infos:
            view = files.bytes_view(array(name))
            for start in range(0, len(view), _COPY_BYTES):
                stream.write(view[start : start + _COPY_BYTES])


def _with_dtypes(
    arrays: Mapping[str, npt.NDArray[Any]],
) -> dict[str, tuple[str, npt.NDArray[Any]]]:
    dtypes = {"uint8": "U8", "uint16": "U16", "float16": "F16", "float32": "F32"}
    return {name: (dtypes[array.dtype.name], np.array(array)) for name, array in arrays.items()}


def decode_plane(
    codec: Codec, plane_NB: npt.NDArray[np.uint8], shared: Mapping[str, Tensor]
) -> Tensor:
    """Rows float32 [N, D] from stored bytes; products with a basis run in torch.

    numpy's own matrix product would use its own threads beside torch's.

    Args:
        shared: what `tolkit_formats.codecs.prepared` makes of the plane's arrays.
    """
    if isinstance(codec, Bands):
        return _decode_bands(codec, plane_NB, shared)
    if isinstance(codec, Steps):
        return _decode_steps(codec, plane_NB, shared)
    if isinstance(codec, Svd):
        coeffs_NR = torch.from_numpy(codec.inner.decode(plane_NB, {}))
        return coeffs_NR @ shared["basis"]
    return torch.from_numpy(codec.decode(plane_NB, {}))


def _decode_bands(
    codec: Bands, plane_NB: npt.NDArray[np.uint8], shared: Mapping[str, Tensor]
) -> Tensor:
    rows_ND = shared["mean"].repeat(len(plane_NB), 1)
    if len(codec.stored_C):
        arrays = {name: tensor.numpy() for name, tensor in shared.items()}
        values_NC = torch.from_numpy(codec.coefficients(plane_NB, arrays))
        if codec.basis:
            rows_ND += values_NC @ shared["basis"]
        else:
            full_NR = values_NC.new_zeros(rows_ND.shape)
            full_NR[:, torch.from_numpy(codec.stored_C)] = values_NC
            rows_ND += rotated(full_NR)
    return rows_ND.mul_(2.0**codec.exponent)


def _decode_steps(
    codec: Steps, plane_NB: npt.NDArray[np.uint8], shared: Mapping[str, Tensor]
) -> Tensor:
    rows_ND = shared["mean"].repeat(len(plane_NB), 1)
    if codec.count:
        arrays = {name: tensor.numpy() for name, tensor in shared.items()}
        values_NC = torch.from_numpy(codec.coefficients(plane_NB, arrays))
        if codec.basis:
            rows_ND += values_NC @ shared["basis"]
        else:
            full_NR = values_NC.new_zeros(rows_ND.shape)
            full_NR[:, : codec.count] = values_NC * shared["basis"]
            rows_ND += rotated(full_NR)
    return rows_ND.mul_(2.0**codec.exponent)


def unknown_counts(path: Path) -> UsageError:
    """Nobody says which tokens are frequent."""
    return UsageError(
        f"--keep-rows: how often tokens stand in text is not known of {path}",
        hint=f"run: tol count DATA --tokenizer {path} -o counts.safetensors, "
        "and add --weights counts.safetensors",
    )


def lineage(history: Sequence[HistoryEntry]) -> str:
    """``build -> compress nf4 -> drop-layers``, for messages."""
    return " -> ".join(step.command for step in history)
