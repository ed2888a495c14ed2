"""Opening a bundle and reading its rows: numpy, bounds first, checks on by default.

Letters: V vocabulary, L layers, D hidden, N rows asked for, S record stride, B bytes of a plane.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit_formats import digests, files, strict_json
from tolkit_formats.codecs import Codec, prepared
from tolkit_formats.entropy import models_of, tier_coder
from tolkit_formats.errors import BundleError, InputError, UsageError
from tolkit_formats.limits import (
    MAX_MANIFEST_BYTES,
    MAX_SMALL_FILE_BYTES,
    NO_SLOT,
)
from tolkit_formats.manifest import Manifest
from tolkit_formats.manifest_rules import parse_manifest
from tolkit_formats.partial import FFN_FILE, check_ffn_header, ffn_layers, require_ffn_digests
from tolkit_formats.predictor import unit_rows
from tolkit_formats.rans import Models, RowCoder
from tolkit_formats.records import Plane, Tier
from tolkit_formats.shards import RecordShards
from tolkit_formats.tensorfile import TensorFile

__all__ = ["Bundle", "open_bundle", "shared_name"]


_EMBEDDING = "model.embed_tokens.weight"
_EXPANDED_BYTES = 256 << 20
_SIDE_FILES = (
    "tables/bases.safetensors",
    "tables/checksums.safetensors",
    "tables/slots.safetensors",
    FFN_FILE,
)


def shared_name(layer: int, name: str) -> str:
    """Name of a plane's shared array in tables/bases.safetensors."""
    return f"layer.{layer}.{name}"


def open_bundle(path: str | Path, *, check_crc: bool = True) -> Bundle:
    """Open a bundle folder for reading. Reads the manifest and headers, no rows.

    Args:
        path: a ``NAME.tol`` folder.
        check_crc: compare each record's CRC-32 when it is first read, and the digests of a shard
            file's first and last 1 MiB when it is first used, so that an intact shard of another
            bundle or another place is noticed too.

    Raises:
        InputError: no such folder, or not a bundle.
        UnsupportedVersionError: written for a newer reader.
        BundleError: a rule of SPEC.md is broken; the message names file and field.
    """
    return Bundle(Path(path), check_crc=check_crc)


class Bundle:
    """An open bundle. Get one from `open_bundle`.

    Attributes:
        path: its folder.
        manifest: everything tol.json says.
        shards: the stored records.
    """

    def __init__(self, path: Path, *, check_crc: bool = True) -> None:
        self.path = path
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "no such bundle"
            raise InputError(f"{path}: {what}", hint="give the NAME.tol folder tol build wrote")
        where = f"{path}/tol.json"
        try:
            files.require_regular(path / "tol.json")
        except InputError as error:
            raise BundleError(
                f"{path}: holds no readable tol.json, so it is not a (finished) bundle",
                hint="give the NAME.tol folder tol build wrote",
            ) from error
        data = files.read_bytes(path / "tol.json", limit_bytes=MAX_MANIFEST_BYTES)
        self.manifest: Manifest = parse_manifest(data, where)
        self._check_sizes()
        # Everything rows need is opened now: what is published in its place later changes nothing.
        self._side_files = {
            name: TensorFile(path / name) for name in _SIDE_FILES if name in self.manifest.files
        }
        self._expanded: dict[tuple[int | str, int], Mapping[str, npt.NDArray[Any]]] = {}
        self._expanded_bytes = 0
        self._known_ffns: set[int] = set()
        self._coders: dict[int, RowCoder] = {}
        self._coders_lock = threading.Lock()
        self.shards = RecordShards(
            path,
            self.manifest,
            lambda: self.tensor_file("tables/checksums.safetensors"),
            self._coder,
            check_crc=check_crc,
        )
        self._check_side_headers()

    # What the manifest says, in the words users ask for.

    @property
    def identity(self) -> str:
        """SHA-256 of the manifest's canonical form, in hex."""
        return self.manifest.identity

    @property
    def vocab_size(self) -> int:
        """V, tokens of the source model."""
        return self.manifest.vocab_size

    @property
    def num_layers(self) -> int:
        """L, layers of the source model, dropped ones included."""
        return self.manifest.num_layers

    @property
    def hidden_size(self) -> int:
        """D, values of a token in one layer."""
        return self.manifest.hidden_size

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Original indices of the layers `rows` returns."""
        return self.manifest.layer_ids

    @property
    def table_bytes(self) -> int:
        """Bytes of everything under tables/."""
        return self.manifest.table_bytes

    @property
    def bits_per_value(self) -> float:
        """8 x table_bytes / (V x L x D), V and L as in the source model."""
        return self.manifest.bits_per_value

    def plane(self, layer: int) -> Plane:
        """Codec and place of one kept layer (of the first tier)."""
        for plane in self.manifest.tiers[0].planes:
            if plane.layer == layer:
                return plane
        raise UsageError(f"layer {layer}: has no table in {self.path}, kept: {self.layer_ids}")

    def plane_codec(self, layer: int) -> Codec:
        """Codec of one kept layer (of the first tier)."""
        return self.plane(layer).codec

    # Rows.

    def rows(self, token_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Decoded table rows.

        Args:
            token_ids: [n] integers, 0 <= id < V, in any order, repeats allowed.

        Returns:
            float32 [n, kept layers, D] in the order of `layer_ids`.

        Raises:
            UsageError: an id out of range.
            BundleError: a record whose CRC does not match, or a token without a record.
        """
        slots = self.slots_of(token_ids)
        out = np.empty((len(slots), len(self.layer_ids), self.hidden_size), np.float32)
        for tier in self.manifest.tiers:
            inside: npt.NDArray[np.bool_] | slice = slice(None)
            if len(self.manifest.tiers) > 1:
                inside = (slots >= tier.first_slot) & (slots < tier.first_slot + tier.num_rows)
                if not inside.any():
                    continue
            records = self.shards.take(tier, slots[inside])
            for i, plane in enumerate(tier.planes):
                plane_NB = records[:, plane.offset : plane.offset + plane.length]
                out[inside, i] = plane.codec.decode(plane_NB, self._prepared(tier, plane))
        if self.manifest.predictors:
            unit_ND = unit_rows(self.embedded(token_ids))
            for i, layer in enumerate(self.layer_ids):
                weights_DD = self.predictor_weights(layer)
                if weights_DD is not None:
                    out[:, i] += unit_ND @ weights_DD.T
        return out

    def embedded(self, token_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Rows of the backbone's embedding, float32 [n, D]; ids within 0..V-1."""
        rows = np.array(self._embedding[np.asarray(token_ids, np.int64)])
        if rows.dtype == np.uint16:  # bf16 as the reader maps it
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)

    def predictor_weights(self, layer: int) -> npt.NDArray[np.float32] | None:
        """A plane's predictor, float32 [D out, D in], kept while the cache has room; or None."""
        predictor = self.manifest.predictors.get(layer)
        if predictor is None:
            return None
        shapes = predictor.shared_shapes()
        made = self._cached(
            ("predictor", layer),
            lambda: {"weights": predictor.weights_DD(self._shared_arrays(layer, shapes))},
        )
        return made["weights"]

    def records(self, token_ids: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Stored bytes [n, stride] of tokens, CRC-checked. Only for bundles of one tier."""
        if len(self.manifest.tiers) != 1:
            raise UsageError(
                f"{self.path}: has {len(self.manifest.tiers)} tiers, records needs one"
            )
        return self.shards.take(self.manifest.tiers[0], self.slots_of(token_ids))

    def plane_pieces(
        self, layer: int, slots: npt.NDArray[np.int64]
    ) -> list[tuple[Tier, npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
        """One layer's stored bytes of slots in any order, CRC-checked.

        Returns:
            for each tier touched: it, which of `slots` lie in it, and U8 [rows, plane bytes].
        """
        pieces = []
        for tier in self.manifest.tiers:
            inside = (slots >= tier.first_slot) & (slots < tier.first_slot + tier.num_rows)
            where = np.flatnonzero(inside)
            if len(where):
                (plane,) = [plane for plane in tier.planes if plane.layer == layer]
                records = self._records(tier, slots[where])
                pieces.append((tier, where, records[:, plane.offset : plane.offset + plane.length]))
        return pieces

    def _records(self, tier: Tier, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Records of slots of one tier: mapped where they follow each other within a shard."""
        first, stop = int(slots[0]) - tier.first_slot, int(slots[-1]) - tier.first_slot + 1
        same_shard = first // tier.rows_per_shard == (stop - 1) // tier.rows_per_shard
        if same_shard and stop - first == len(slots) and bool((np.diff(slots) == 1).all()):
            return self.shards.run(tier, first, stop)
        return self.shards.take(tier, slots)

    def plane_bytes(
        self, layer: int, first_slot: int, stop_slot: int
    ) -> list[tuple[Codec, npt.NDArray[np.uint8]]]:
        """One layer's stored bytes of a run of slots, CRC-checked.

        Returns:
            pieces in slot order: the codec there and U8 [rows, plane bytes], mapped views. One
            piece unless the run crosses a shard or a tier.
        """
        pieces = []
        for tier in self.manifest.tiers:
            first = max(first_slot - tier.first_slot, 0)
            stop = min(stop_slot - tier.first_slot, tier.num_rows)
            (plane,) = [plane for plane in tier.planes if plane.layer == layer]
            while first < stop:
                end = min(stop, (first // tier.rows_per_shard + 1) * tier.rows_per_shard)
                records = self.shards.run(tier, first, end)
                bytes_NB = records[:, plane.offset : plane.offset + plane.length]
                pieces.append((plane.codec, bytes_NB))
                first = end
        return pieces

    def slots_of(self, token_ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Slot of each token id [n]; UsageError out of range, BundleError without a record."""
        ids = self._checked_ids(token_ids)
        if self.slot_of_token is None:
            return ids
        slots: npt.NDArray[np.int64] = self.slot_of_token[ids].astype(np.int64)
        if slots.size and slots.max() == NO_SLOT:
            missing = ids[slots == NO_SLOT][0]
            raise BundleError(
                f"{self.path}: token id {missing} has no record (partial tables)",
                hint="has_record says which tokens have one; tolkit computes the rows of the "
                "others (tolkit.runtime.recompute)",
            )
        return slots

    def has_record(self, token_ids: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether each token id [n] has a record; UsageError out of range."""
        ids = self._checked_ids(token_ids)
        if self.slot_of_token is None:
            return np.ones(len(ids), bool)
        found: npt.NDArray[np.bool_] = self.slot_of_token[ids] != NO_SLOT
        return found

    def ffn_file(self, layer: int) -> TensorFile:
        """The file with a layer's memory FFN, under `partial.ffn_names`; its digests checked.

        Raises:
            UsageError: the bundle keeps no weights of this layer.    BundleError: damaged.
        """
        if FFN_FILE not in self.manifest.files or layer not in ffn_layers(self.manifest.layers):
            raise UsageError(f"{self.path}: keeps no FFN weights of layer {layer}")
        if layer not in self._known_ffns:
            require_ffn_digests(self._ffn, layer, self.manifest.sources.layers[layer])
            self._known_ffns.add(layer)
        return self._ffn

    @cached_property
    def _ffn(self) -> TensorFile:
        return self.tensor_file(FFN_FILE)

    @property
    def embedding(self) -> npt.NDArray[Any]:
        """The backbone's embedding [V, D] as stored (BF16 as its uint16 bits), digest checked."""
        return self._embedding

    def _checked_ids(self, token_ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise UsageError(
                f"token ids: expected a 1-D array of integers, got {ids.dtype} {ids.shape}"
            )
        ids = ids.astype(np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise UsageError(f"token id {bad}: out of range, the vocabulary has {self.vocab_size}")
        return ids

    @cached_property
    def slot_of_token(self) -> npt.NDArray[np.uint32] | None:
        """U32 [V] token -> slot, or None where slot = token id."""
        if not self.manifest.mapped_slots:
            return None
        name = "tables/slots.safetensors"
        slots = self.tensor_file(name).expect("slots", "U32", (self.vocab_size,))
        used = slots[slots != NO_SLOT]
        if len(used) != self.manifest.num_rows or not np.array_equal(
            np.sort(used), np.arange(self.manifest.num_rows, dtype=np.uint32)
        ):
            raise BundleError(f"{self.path}/{name}: is not a one-to-one map onto the records")
        return np.array(slots, np.uint32)

    def shared(self, layer: int) -> Mapping[str, npt.NDArray[Any]]:
        """Shared arrays of a plane (a basis, a predictor), of all tiers; as they are stored."""
        self.plane(layer)
        return self._shared_arrays(layer, self._shared_shapes(layer))

    @cached_property
    def common(self) -> Mapping[str, npt.NDArray[Any]]:
        """Shared arrays of all planes (the models of the entropy coder), as they are stored."""
        coding = self.manifest.coding
        if coding is None:
            return {}
        shapes = coding.shared_shapes().items()
        return {name: np.array(self._bases.expect(name, *shape)) for name, shape in shapes}

    def token_counts(self) -> npt.NDArray[np.uint64] | None:
        """U64 [V] how often each token stood in the training text, or None."""
        if "token_counts.safetensors" not in self.manifest.files:
            return None
        file = self.tensor_file("token_counts.safetensors")
        return np.array(file.expect("token_counts", "U64", (self.vocab_size,)), np.uint64)

    def file_bytes(self, name: str) -> bytes | None:
        """A root file (config.json, tokenizer.json...), digest checked; None if absent."""
        entry = self.manifest.files.get(name)
        if entry is None:
            return None
        data = files.read_bytes(self.path / name, limit_bytes=MAX_SMALL_FILE_BYTES)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(f"{self.path}/{name}: does not match its digest in tol.json")
        return data

    def config(self) -> dict[str, Any]:
        """config.json, parsed; BundleError unless it is the source model's and of these sizes."""
        where = f"{self.path}/config.json"
        data = self.file_bytes("config.json")
        assert data is not None, "every manifest lists it"
        config = strict_json.parse(data, where)
        if not isinstance(config, dict):
            raise BundleError(f"{where}: expected a JSON object")
        if digests.json_digest(config) != self.manifest.sources.config:
            raise BundleError(f"{where}: is not the one the tables are for")
        for name, size in (
            ("vocab_size", self.vocab_size),
            ("num_hidden_layers", self.num_layers),
            ("hidden_size", self.hidden_size),
        ):
            if config.get(name, size) != size:
                raise BundleError(
                    f"{where}: {name} is {str(config[name])[:20]}, tol.json says {size}"
                )
        return config

    def tensor_file(self, name: str) -> TensorFile:
        """A safetensors file of the bundle, its digest compared before anything in it is used."""
        file = self._side_files.get(name) or TensorFile(self.path / name)
        if file.block_sha256().hex() != self.manifest.files[name].sha256:
            raise BundleError(f"{file.path}: does not match its digest in tol.json: damaged")
        return file

    # Plumbing.

    def _check_sizes(self) -> None:
        for folder in (self.path / "tables",):
            if folder.is_symlink() or not folder.is_dir():
                raise BundleError(f"{folder}: is not a folder")
        for name, entry in self.manifest.files.items():
            try:
                size_bytes = files.require_regular(self.path / name)
            except InputError as error:
                raise BundleError(error.message) from error
            if size_bytes != entry.size_bytes:
                raise BundleError(
                    f"{self.path}/{name}: {size_bytes:,} bytes, expected {entry.size_bytes:,}"
                )

    def _check_side_headers(self) -> None:
        """Shapes are checked when opening; digests when their content is first used."""
        for name, file in self._side_files.items():
            if name == "tables/slots.safetensors":
                file.expect("slots", "U32", (self.vocab_size,))
            elif name == FFN_FILE:
                check_ffn_header(file, ffn_layers(self.manifest.layers), self.hidden_size)
            elif name == "tables/bases.safetensors":
                expected = {
                    shared_name(layer, array): stored
                    for layer in self.layer_ids
                    for array, stored in self._shared_shapes(layer).items()
                }
                if self.manifest.coding is not None:
                    expected |= self.manifest.coding.shared_shapes()
                for array, (dtype, shape) in expected.items():
                    file.expect(array, dtype, shape)
                for array in sorted(file.infos.keys() - expected.keys()):
                    raise BundleError(f"{file.path}: tensor {array[:80]!r} belongs to nothing")

    def _shared_shapes(self, layer: int) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for tier in self.manifest.tiers:
            for plane in tier.planes:
                if plane.layer == layer:
                    shapes |= plane.codec.shared_shapes()
        if layer in self.manifest.predictors:
            shapes |= self.manifest.predictors[layer].shared_shapes()
        return shapes

    def _shared_arrays(
        self, layer: int, shapes: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> Mapping[str, npt.NDArray[Any]]:
        return {
            name: self._bases.expect(shared_name(layer, name), dtype, shape)
            for name, (dtype, shape) in shapes.items()
        }

    def _prepared(self, tier: Tier, plane: Plane) -> Mapping[str, npt.NDArray[Any]]:
        """What a plane's decoder needs; empty for codecs without shared arrays."""
        shapes = plane.codec.shared_shapes()
        if not shapes:
            return {}
        return self._cached(
            (tier.index, plane.layer),
            lambda: prepared(
                plane.codec, {**self._shared_arrays(plane.layer, shapes), **self.common}
            ),
        )

    def _coder(self, tier: Tier) -> RowCoder:
        """The coder of a tier's records; its tables are made on first use."""
        with self._coders_lock:
            if tier.index not in self._coders:
                self._coders[tier.index] = self._made_coder(tier)
            return self._coders[tier.index]

    def _made_coder(self, tier: Tier) -> RowCoder:
        assert self.manifest.coding is not None
        classes = []
        for plane in tier.planes:
            shapes = plane.codec.shared_shapes()
            name = f"classes.{tier.index}"
            if name in shapes:
                arrays = self._shared_arrays(plane.layer, {name: shapes[name]})
                classes.append(arrays[name])
        try:
            return tier_coder(self._models, classes, self.manifest.coding)
        except BundleError as error:
            raise BundleError(f"{self._bases.path}: {error.message}") from error

    @cached_property
    def _models(self) -> Models:
        try:
            return models_of(self.common)
        except BundleError as error:
            raise BundleError(f"{self._bases.path}: {error.message}") from error

    def _cached(
        self, key: tuple[int | str, int], make: Callable[[], Mapping[str, npt.NDArray[Any]]]
    ) -> Mapping[str, npt.NDArray[Any]]:
        """Expanded arrays, made once while they fit _EXPANDED_BYTES, else at every call."""
        if key in self._expanded:
            return self._expanded[key]
        try:
            made = make()
        except BundleError as error:
            where = f"{self._bases.path}: layer {key[1]}"
            raise BundleError(f"{where}: {error.message}") from error
        size_bytes = sum(array.nbytes for array in made.values())
        if self._expanded_bytes + size_bytes <= _EXPANDED_BYTES:
            self._expanded[key] = made
            self._expanded_bytes += size_bytes
        return made

    @cached_property
    def _bases(self) -> TensorFile:
        return self.tensor_file("tables/bases.safetensors")

    @cached_property
    def _embedding(self) -> npt.NDArray[Any]:
        backbone = self.tensor_file("backbone.safetensors")
        info = backbone.infos.get(_EMBEDDING)
        shape = (self.vocab_size, self.hidden_size)
        if info is None or info.shape != shape or info.dtype not in ("F32", "F16", "BF16"):
            raise BundleError(
                f"{backbone.path}: {_EMBEDDING} is missing or no {list(shape)} of F32, F16 or BF16"
            )
        weight_VD = backbone.expect(_EMBEDDING, info.dtype, shape)
        if digests.array_digest(info.dtype, shape, [weight_VD]) != self.manifest.sources.embedding:
            raise BundleError(
                f"{backbone.path}: {_EMBEDDING} is not the one the tables are for "
                "(sources.embedding in tol.json)"
            )
        return weight_VD
