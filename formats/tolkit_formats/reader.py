"""Opening a bundle and reading its rows: numpy, bounds first, checks on by default.

Letters: V vocabulary, L layers, D hidden, N rows asked for, S record stride, B bytes of a plane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit_formats.codecs import Codec, Raw
from tolkit_formats.errors import BundleError, UsageError
from tolkit_formats.folder import BundleFolder
from tolkit_formats.limits import NO_SLOT
from tolkit_formats.manifest import Manifest
from tolkit_formats.predictor import unit_rows
from tolkit_formats.rans import RowCoder
from tolkit_formats.records import Plane, Tier
from tolkit_formats.shards import RecordShards
from tolkit_formats.shared_arrays import SharedArrays, shared_name
from tolkit_formats.tensorfile import TensorFile

__all__ = ["Bundle", "Where", "open_bundle", "shared_name"]

Where = slice | npt.NDArray[np.int64]


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
        self._folder = BundleFolder(path)
        self.manifest: Manifest = self._folder.manifest
        self._shared = SharedArrays(self._folder)
        self.shards = RecordShards(
            path,
            self.manifest,
            lambda: self.tensor_file("tables/checksums.safetensors"),
            self._shared.coder,
            check_crc=check_crc,
        )
        self._shared.check_headers()
        self._folder.check_headers()

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
        pieces = [
            (tier, where, self.shards.take(tier, slots[where]))
            for tier, where in self.by_tier(slots)
        ]
        return self.decoded(token_ids, pieces)

    def by_tier(self, slots: npt.NDArray[np.int64]) -> list[tuple[Tier, Where]]:
        """The tiers that slots [n] lie in, each with an index of its slots; all: ``slice(None)``.

        Empty for no slots.
        """
        tiers = self.manifest.tiers
        if len(tiers) == 1:
            return [(tiers[0], slice(None))] if len(slots) else []
        found: list[tuple[Tier, Where]] = []
        for tier in tiers:
            inside = (slots >= tier.first_slot) & (slots < tier.first_slot + tier.num_rows)
            where = np.flatnonzero(inside)
            if len(where):
                found.append((tier, where))
        return found

    def decoded(
        self,
        token_ids: npt.ArrayLike,
        pieces: Sequence[tuple[Tier, Where, npt.NDArray[np.uint8]]],
    ) -> npt.NDArray[np.float32]:
        """Rows float32 [n, kept layers, D] of tokens whose records are at hand.

        Args:
            pieces: for each tier, which of the tokens lie in it, and their records, decoded to
                symbols where they are coded. Planes stored as f32 may come back as views of them.
        """
        count = len(np.asarray(token_ids))
        shape = (count, len(self.layer_ids), self.hidden_size)
        out: npt.NDArray[np.float32] | None = None
        if len(pieces) == 1:
            out = _stored_rows(pieces[0][0], pieces[0][2], shape)
        if out is None:
            out = np.empty(shape, np.float32)
            for tier, where, records in pieces:
                for i, plane in enumerate(tier.planes):
                    plane_NB = records[:, plane.offset : plane.offset + plane.length]
                    shared = self._shared.prepared(tier, plane)
                    out[where, i] = plane.codec.decode(plane_NB, shared)
        if self.manifest.predictors:
            unit_ND = unit_rows(self.embedded(token_ids))
            for i, layer in enumerate(self.layer_ids):
                weights_DD = self.predictor_weights(layer)
                if weights_DD is not None:
                    out[:, i] += unit_ND @ weights_DD.T
        return out

    def coder(self, tier: Tier) -> RowCoder:
        """The entropy coder of a tier of coded records."""
        return self._shared.coder(tier)

    def embedded(self, token_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Rows of the backbone's embedding, float32 [n, D]; ids within 0..V-1."""
        rows = np.array(self._folder.embedding_VD[np.asarray(token_ids, np.int64)])
        if rows.dtype == np.uint16:  # bf16 as the reader maps it
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)

    def predictor_weights(self, layer: int) -> npt.NDArray[np.float32] | None:
        """A plane's predictor, float32 [D out, D in], kept while the cache has room; or None."""
        return self._shared.predictor_weights(layer)

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
        return self._folder.ffn_file(layer)

    @property
    def embedding(self) -> npt.NDArray[Any]:
        """The backbone's embedding [V, D] as stored (BF16 as its uint16 bits), digest checked."""
        return self._folder.embedding_VD

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

    @property
    def slot_of_token(self) -> npt.NDArray[np.uint32] | None:
        """U32 [V] token -> slot, or None where slot = token id."""
        return self._folder.slot_of_token

    def shared(self, layer: int) -> Mapping[str, npt.NDArray[Any]]:
        """Shared arrays of a plane (a basis, a predictor), of all tiers; as they are stored."""
        self.plane(layer)
        return self._shared.of_layer(layer)

    @property
    def common(self) -> Mapping[str, npt.NDArray[Any]]:
        """Shared arrays of all planes (the models of the entropy coder), as they are stored."""
        return self._shared.common

    # Files.

    def token_counts(self) -> npt.NDArray[np.uint64] | None:
        """U64 [V] how often each token stood in the training text, or None."""
        return self._folder.token_counts()

    def file_bytes(self, name: str) -> bytes | None:
        """A root file (config.json, tokenizer.json...), digest checked; None if absent."""
        return self._folder.file_bytes(name)

    def config(self) -> dict[str, Any]:
        """config.json, parsed; BundleError unless it is the source model's and of these sizes."""
        return self._folder.config()

    def tensor_file(self, name: str) -> TensorFile:
        """A safetensors file of the bundle, its digest compared before anything in it is used."""
        return self._folder.tensor_file(name)


def _stored_rows(
    tier: Tier, records_NS: npt.NDArray[np.uint8], shape: tuple[int, int, int]
) -> npt.NDArray[np.float32] | None:
    """Records that are float32 rows already, as such, without a copy; None where they are not."""
    if any(plane.codec != Raw(shape[2], "f32") for plane in tier.planes) or not tier.planes:
        return None
    values_NW = records_NS[:, : tier.payload_bytes].view("<f4")
    return np.lib.stride_tricks.as_strided(
        values_NW, shape, (records_NS.strides[0], 4 * shape[2], 4)
    )
