"""The arrays that rows of a bundle share: bases, codebooks, predictors, models of the coder.

Letters: D hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit_formats import codecs
from tolkit_formats.entropy import models_of, tier_coder
from tolkit_formats.errors import BundleError
from tolkit_formats.folder import BundleFolder
from tolkit_formats.rans import Models, RowCoder
from tolkit_formats.records import Plane, Tier
from tolkit_formats.tensorfile import TensorFile

__all__ = ["SharedArrays", "shared_name"]

_EXPANDED_BYTES = 256 << 20
_BASES = "tables/bases.safetensors"

Arrays = Mapping[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def shared_name(layer: int, name: str) -> str:
    """Name of a plane's shared array in tables/bases.safetensors."""
    return f"layer.{layer}.{name}"


class SharedArrays:
    """tables/bases.safetensors of an open bundle, and what decoders make of it.

    Args:
        folder: the bundle's files.
    """

    def __init__(self, folder: BundleFolder) -> None:
        self._folder = folder
        self._manifest = folder.manifest
        self._expanded: dict[tuple[int | str, int], Arrays] = {}
        self._expanded_bytes = 0
        self._coders: dict[int, RowCoder] = {}
        self._coders_lock = threading.Lock()

    def check_headers(self) -> None:
        """Names and shapes, for opening; the digest is compared when content is first used."""
        file = self._folder.side_file(_BASES)
        if file is None:
            return
        expected = {
            shared_name(layer, array): stored
            for layer in self._manifest.layer_ids
            for array, stored in self._shapes(layer).items()
        }
        if self._manifest.coding is not None:
            expected |= self._manifest.coding.shared_shapes()
        for array, (dtype, shape) in expected.items():
            file.expect(array, dtype, shape)
        for array in sorted(file.infos.keys() - expected.keys()):
            raise BundleError(f"{file.path}: tensor {array[:80]!r} belongs to nothing")

    def of_layer(self, layer: int) -> Arrays:
        """Shared arrays of a kept layer's planes, of all tiers; as they are stored."""
        return self._arrays(layer, self._shapes(layer))

    @cached_property
    def common(self) -> Arrays:
        """Shared arrays of all planes (the models of the entropy coder), as they are stored."""
        coding = self._manifest.coding
        if coding is None:
            return {}
        shapes = coding.shared_shapes().items()
        return {name: np.array(self._bases.expect(name, *shape)) for name, shape in shapes}

    def prepared(self, tier: Tier, plane: Plane) -> Arrays:
        """What a plane's decoder needs; empty for codecs without shared arrays."""
        shapes = plane.codec.shared_shapes()
        if not shapes:
            return {}
        return self._cached(
            (tier.index, plane.layer),
            lambda: codecs.prepared(
                plane.codec, {**self._arrays(plane.layer, shapes), **self.common}
            ),
        )

    def predictor_weights(self, layer: int) -> npt.NDArray[np.float32] | None:
        """A plane's predictor, float32 [D out, D in], kept while the cache has room; or None."""
        predictor = self._manifest.predictors.get(layer)
        if predictor is None:
            return None
        shapes = predictor.shared_shapes()
        made = self._cached(
            ("predictor", layer),
            lambda: {"weights": predictor.weights_DD(self._arrays(layer, shapes))},
        )
        return made["weights"]

    def coder(self, tier: Tier) -> RowCoder:
        """The coder of a tier's records; its tables are made on first use."""
        with self._coders_lock:
            if tier.index not in self._coders:
                self._coders[tier.index] = self._made_coder(tier)
            return self._coders[tier.index]

    def _made_coder(self, tier: Tier) -> RowCoder:
        assert self._manifest.coding is not None
        classes = []
        for plane in tier.planes:
            shapes = plane.codec.shared_shapes()
            name = f"classes.{tier.index}"
            if name in shapes:
                arrays = self._arrays(plane.layer, {name: shapes[name]})
                classes.append(arrays[name])
        try:
            return tier_coder(self._models, classes, self._manifest.coding)
        except BundleError as error:
            raise BundleError(f"{self._bases.path}: {error.message}") from error

    @cached_property
    def _models(self) -> Models:
        try:
            return models_of(self.common)
        except BundleError as error:
            raise BundleError(f"{self._bases.path}: {error.message}") from error

    def _shapes(self, layer: int) -> Shapes:
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for tier in self._manifest.tiers:
            for plane in tier.planes:
                if plane.layer == layer:
                    shapes |= plane.codec.shared_shapes()
        if layer in self._manifest.predictors:
            shapes |= self._manifest.predictors[layer].shared_shapes()
        return shapes

    def _arrays(self, layer: int, shapes: Shapes) -> Arrays:
        return {
            name: self._bases.expect(shared_name(layer, name), dtype, shape)
            for name, (dtype, shape) in shapes.items()
        }

    def _cached(self, key: tuple[int | str, int], make: Callable[[], Arrays]) -> Arrays:
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
        return self._folder.tensor_file(_BASES)
