"""What tables are made from: a checkpoint's FFNs or an existing bundle, behind one interface.

V vocabulary, L layers, D hidden, N rows of a block. Rows are addressed by slot: slot 0 is the most
frequent token where counts are known (SPEC section 5), the token with id 0 otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.errors import BundleError, CheckpointError, InputError
from tolkit.model import CheckpointFiles, LayerFfn, checkpoint_tensors
from tolkit.model.files import require_finite
from tolkit.parallel import all_intra_op_threads
from tolkit_formats import digests, files
from tolkit_formats.codecs import Codec, Svd
from tolkit_formats.manifest import HistoryEntry, LayerDigests, LayerStatus, Sources
from tolkit_formats.reader import Bundle, open_bundle
from tolkit_formats.tensorfile import TensorStream

__all__ = [
    "BundleSource",
    "CheckpointSource",
    "PlaneReader",
    "TableSource",
    "decode_plane",
    "is_bundle",
    "open_source",
]

_COPY_BYTES = 8 << 20

PlaneReader = Callable[[int, int], Tensor]
"""`reader(first_slot, stop_slot)` -> float32 [N, D]; safe to call from several threads."""


class TableSource(Protocol):
    """Where planes come from, and everything of the source that a bundle keeps."""

    path: Path
    vocab_size: int
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

    def plane(self, layer: int) -> PlaneReader:
        """Get ready to read one layer's table."""

    def plane_codec(self, layer: int) -> Codec | None:
        """How the layer is stored, None when it is computed from weights."""

    def token_at(self, slot: int) -> int:
        """Token id whose rows lie in a slot."""

    def stored_plane(self, layer: int, first_slot: int, stop_slot: int) -> npt.NDArray[np.uint8]:
        """A stored plane's bytes U8 [N, B], for copying (bundles only)."""

    def stored_shared(self, layer: int) -> Mapping[str, Tensor]:
        """A stored plane's shared arrays in their stored dtypes, for copying (bundles only)."""

    def sources(self) -> Sources:
        """Digests of weights, tokenizer and config; reads all weights once."""

    def root_files(self) -> Mapping[str, bytes]:
        """config.json and tokenizer files."""

    def write_backbone(self, path: Path) -> None:
        """Write backbone.safetensors."""

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
        self.vocab_size = config.vocab_size
        self.num_layers = config.num_hidden_layers
        self.hidden_size = config.hidden_size
        self.statuses = (LayerStatus("kept"),) * self.num_layers
        self.combine = "residual_add"
        self.lookup_scale: float = 1
        self.out_of_range = "error"
        self.identity: str | None = None
        self.history: tuple[HistoryEntry, ...] = ()
        self.token_counts_V = self._files.token_counts()
        self.slot_of_token_V = None
        self._sources: Sources | None = None
        self._token_of_slot = torch.arange(self.vocab_size)
        if self.token_counts_V is not None:
            self.slot_of_token_V = slots_by_count(self.token_counts_V)
            order = np.argsort(self.slot_of_token_V)
            self._token_of_slot = torch.from_numpy(order.astype(np.int64))

    def plane(self, layer: int) -> PlaneReader:
        """Loads this layer's FFN (LayerFfn states the memory); `sources` has checked it."""
        with all_intra_op_threads():  # widening weights rounds nothing, so threads change no bit
            ffn = LayerFfn(self._files, layer, checked=self._sources is not None)
        token_of_slot = self._token_of_slot

        def read(first_slot: int, stop_slot: int) -> Tensor:
            return ffn(token_of_slot[first_slot:stop_slot])

        return read

    def plane_codec(self, layer: int) -> Codec | None:
        """None: rows are computed."""
        return None

    def token_at(self, slot: int) -> int:
        """See TableSource."""
        return int(self._token_of_slot[slot])

    def stored_plane(self, layer: int, first_slot: int, stop_slot: int) -> npt.NDArray[np.uint8]:
        """Never: a checkpoint stores no planes."""
        raise AssertionError("a checkpoint has no stored planes")

    def stored_shared(self, layer: int) -> Mapping[str, Tensor]:
        """Never: a checkpoint stores no planes."""
        raise AssertionError("a checkpoint has no stored planes")

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
        names = self._backbone_names()
        infos = {name: self._files.info(name) for name in names}
        directory = [(name, info.dtype, info.shape) for name, info in infos.items()]
        with TensorStream(path, directory, {"format": "pt"}) as stream:
            for name in names:
                view = files.bytes_view(self._files.array(name))
                for start in range(0, len(view), _COPY_BYTES):
                    stream.write(view[start : start + _COPY_BYTES])

    def require_unchanged(self) -> None:
        """CheckpointError when a file was written to since it was opened."""
        self._files.require_unchanged()


class BundleSource:
    """Planes decoded from a bundle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bundle: Bundle = open_bundle(path)
        manifest = self.bundle.manifest
        if len(manifest.tiers) != 1 or manifest.num_rows != manifest.vocab_size:
            raise InputError(
                f"{path}: has {manifest.num_rows:,} records in {len(manifest.tiers)} tiers for "
                f"{manifest.vocab_size:,} tokens; only whole tables of one tier are read here"
            )
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

    def plane(self, layer: int) -> PlaneReader:
        """Widens the plane's basis, if it has one."""
        bundle = self.bundle
        shared = shared_tensors(bundle, layer)

        def read(first_slot: int, stop_slot: int) -> Tensor:
            pieces = bundle.plane_bytes(layer, first_slot, stop_slot)
            return torch.cat([decode_plane(codec, plane, shared) for codec, plane in pieces])

        return read

    def plane_codec(self, layer: int) -> Codec | None:
        """The codec of a kept layer."""
        return self.bundle.plane_codec(layer)

    def token_at(self, slot: int) -> int:
        """See TableSource."""
        slots = self.slot_of_token_V
        return slot if slots is None else int(np.flatnonzero(slots == slot)[0])

    def stored_plane(self, layer: int, first_slot: int, stop_slot: int) -> npt.NDArray[np.uint8]:
        """See TableSource."""
        pieces = self.bundle.plane_bytes(layer, first_slot, stop_slot)
        return np.concatenate([plane for _, plane in pieces])

    def stored_shared(self, layer: int) -> Mapping[str, Tensor]:
        """See TableSource."""
        return {k: torch.from_numpy(np.array(v)) for k, v in self.bundle.shared(layer).items()}

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
        view = files.bytes_view(files.map_bytes(self.path / "backbone.safetensors"))
        expected = self.bundle.manifest.files["backbone.safetensors"].sha256
        if hashlib.sha256(view).hexdigest() != expected:
            raise BundleError(f"{self.path}/backbone.safetensors: does not match its digest")
        with files.FileWriter(path, expected_bytes=len(view)) as writer:
            for start in range(0, len(view), _COPY_BYTES):
                writer.write(view[start : start + _COPY_BYTES])

    def require_unchanged(self) -> None:
        """Nothing to do: every byte read was checked against the manifest."""


def shared_tensors(bundle: Bundle, layer: int) -> Mapping[str, Tensor]:
    """A plane's shared arrays as float32 tensors."""
    return {
        name: torch.from_numpy(np.asarray(array, dtype=np.float32))
        for name, array in bundle.shared(layer).items()
    }


def decode_plane(
    codec: Codec, plane_NB: npt.NDArray[np.uint8], shared: Mapping[str, Tensor]
) -> Tensor:
    """Rows float32 [N, D] from stored bytes; the basis product runs in torch.

    numpy's own matrix product would use its own threads beside torch's.
    """
    if isinstance(codec, Svd):
        coeffs_NR = torch.from_numpy(codec.inner.decode(plane_NB, {}))
        return coeffs_NR @ shared["basis"]
    return torch.from_numpy(codec.decode(plane_NB, {}))


def lineage(history: Sequence[HistoryEntry]) -> str:
    """``build -> compress nf4 -> drop-layers``, for messages."""
    return " -> ".join(step.command for step in history)
