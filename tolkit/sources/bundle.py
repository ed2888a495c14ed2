"""Tables that a bundle stores.

V vocabulary, D hidden, N rows of a block, B bytes of a plane.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.cold_rows import ColdPlanes
from tolkit.decode.record_decoder import PlaneDecoder
from tolkit.errors import BundleError, InputError, UsageError
from tolkit.sources.interface import (
    COPY_BYTES,
    PlaneReader,
    slots_by_count,
    unknown_counts,
    write_weights,
)
from tolkit_formats import files
from tolkit_formats.codecs import Codec
from tolkit_formats.limits import NO_SLOT
from tolkit_formats.manifest import Sources
from tolkit_formats.partial import ffn_names
from tolkit_formats.predictor import unit_rows
from tolkit_formats.reader import Bundle, open_bundle

__all__ = ["BundleSource"]


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
        decoder = PlaneDecoder(bundle, layer)
        weights_DD = bundle.predictor_weights(layer)
        stored_rows = bundle.manifest.num_rows
        tokens = torch.from_numpy(self._tokens)

        @cache  # most readers never come to the cold slots
        def cold() -> Callable[[Tensor], Tensor]:
            assert self._cold is not None, "a whole table has no slots behind the stored ones"
            return self._cold.plane(layer)

        def read(first_slot: int, stop_slot: int) -> Tensor:
            if stop_slot <= stored_rows:
                return read_stored(first_slot, stop_slot)
            cold_ND = cold()(tokens[max(first_slot, stored_rows) : stop_slot])
            if first_slot >= stored_rows:
                return cold_ND
            return torch.cat([read_stored(first_slot, stored_rows), cold_ND])

        def read_stored(first_slot: int, stop_slot: int) -> Tensor:
            pieces = bundle.plane_pieces(layer, self._stored_slots(first_slot, stop_slot))
            rows_ND = torch.empty((stop_slot - first_slot, self.hidden_size))
            for tier, where, plane_NB in pieces:
                # Products run in torch: numpy's would use its own threads beside torch's.
                rows_ND[where] = decoder.rows(tier.index, torch.from_numpy(np.array(plane_NB)))
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
            for start in range(0, len(view), COPY_BYTES):
                writer.write(view[start : start + COPY_BYTES])

    def write_ffn(self, path: Path, layers: Sequence[int]) -> None:
        """The weights of these layers from a partial bundle, their digests checked."""
        names = sorted(name for layer in layers for name in ffn_names(layer).values())
        found = {layer: self.bundle.ffn_file(layer) for layer in layers}
        file = found[layers[0]]
        write_weights(path, {name: file.infos[name] for name in names}, file.array)

    def require_unchanged(self) -> None:
        """Nothing to do: every byte read was checked against the manifest."""


def _with_dtypes(
    arrays: Mapping[str, npt.NDArray[Any]],
) -> dict[str, tuple[str, npt.NDArray[Any]]]:
    dtypes = {"uint8": "U8", "uint16": "U16", "float16": "F16", "float32": "F32"}
    return {name: (dtypes[array.dtype.name], np.array(array)) for name, array in arrays.items()}
