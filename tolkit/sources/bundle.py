"""Tables that a bundle stores.

V vocabulary, D hidden, N rows of a block, B bytes of a plane.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.errors import BundleError, InputError
from tolkit.runtime.record_decoder import PlaneDecoder
from tolkit.sources.interface import COPY_BYTES, PlaneReader, slots_by_count
from tolkit_formats import files
from tolkit_formats.codecs import Codec
from tolkit_formats.manifest import Sources
from tolkit_formats.predictor import unit_rows
from tolkit_formats.reader import Bundle, open_bundle

__all__ = ["BundleSource"]


class BundleSource:
    """Planes decoded from a bundle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bundle: Bundle = open_bundle(path)
        manifest = self.bundle.manifest
        if manifest.num_rows != manifest.vocab_size:
            raise InputError(
                f"{path}: has {manifest.num_rows:,} records for {manifest.vocab_size:,} tokens; "
                "only whole tables are read here"
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
        self.tier_ranges = tuple((t.first_slot, t.first_slot + t.num_rows) for t in manifest.tiers)
        self.predictors = manifest.predictors
        self.coding = manifest.coding
        self.errors = manifest.encoding.errors
        self._stored_slot_V: npt.NDArray[np.int64] | None = None  # of new slots, once reordered

    def use_counts(self, counts_V: npt.NDArray[np.uint64]) -> None:
        """See TableSource; stored records stay where they are and are picked one by one."""
        slot_of_token_V = slots_by_count(counts_V)
        token_of_slot = np.argsort(slot_of_token_V)
        self._stored_slot_V = self.bundle.slots_of(token_of_slot)
        self.token_counts_V, self.slot_of_token_V = counts_V, slot_of_token_V
        self.tier_ranges = ((0, self.vocab_size),)

    def plane(self, layer: int) -> PlaneReader:
        """Expands the plane's basis and predictor, if it has them."""
        bundle = self.bundle
        decoder = PlaneDecoder(bundle, layer)
        weights_DD = bundle.predictor_weights(layer)

        def read(first_slot: int, stop_slot: int) -> Tensor:
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
        view = files.bytes_view(files.map_bytes(self.path / "backbone.safetensors"))
        expected = self.bundle.manifest.files["backbone.safetensors"].sha256
        if hashlib.sha256(view).hexdigest() != expected:
            raise BundleError(f"{self.path}/backbone.safetensors: does not match its digest")
        with files.FileWriter(path, expected_bytes=len(view)) as writer:
            for start in range(0, len(view), COPY_BYTES):
                writer.write(view[start : start + COPY_BYTES])

    def require_unchanged(self) -> None:
        """Nothing to do: every byte read was checked against the manifest."""


def _with_dtypes(
    arrays: Mapping[str, npt.NDArray[Any]],
) -> dict[str, tuple[str, npt.NDArray[Any]]]:
    dtypes = {"uint8": "U8", "uint16": "U16", "float16": "F16", "float32": "F32"}
    return {name: (dtypes[array.dtype.name], np.array(array)) for name, array in arrays.items()}
