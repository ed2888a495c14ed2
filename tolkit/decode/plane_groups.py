"""Decoders of planes that are alike, and the shared arrays they need, expanded on a device.

n rows asked for, K kept layers, D hidden, S record stride, P planes of equal layout, B bytes of a
plane, R rows of a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tolkit.decode.element_planes import ElementDecoder, element_decoder
from tolkit.decode.field_planes import BandsFields, ExpandedPlane, StepsFields
from tolkit.errors import BundleError
from tolkit_formats.codecs import Bands, Codec, Steps, Svd
from tolkit_formats.reader import Bundle
from tolkit_formats.records import Plane, Tier

__all__ = ["PlaneRows", "PlanesDecoder", "SharedArrays", "plane_rows", "tier_decoders"]


class PlaneRows(Protocol):
    """Rows of some planes of a tier."""

    def __call__(self, records_nS: Tensor) -> Tensor:
        """Of records U8 [n, S]: float32 [n, P, D]."""

    def plane(self, index: int, plane_nB: Tensor) -> Tensor:
        """Of one plane's bytes U8 [n, B]: float32 [n, D]."""


class SharedArrays:
    """Shared arrays of a bundle's layers, each basis expanded once for all tiers."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        self._bundle = bundle
        self._device = device
        self._bases: dict[object, Tensor] = {}

    def stored(self, layer: int) -> Mapping[str, NDArray[Any]]:
        """As stored, the entropy coder's among them."""
        return {**self._bundle.shared(layer), **self._bundle.common}

    @property
    def bases(self) -> list[Tensor]:
        """All that were expanded so far."""
        return list(self._bases.values())

    def basis(self, layer: int, codec: Bands | Steps | Svd) -> Tensor:
        """All rows of a layer's basis, float32 [R, D] on the device."""
        key = (layer, None if isinstance(codec, Svd) else codec.basis)
        if key not in self._bases:
            stored = self._bundle.shared(layer)
            if isinstance(codec, Svd):
                basis_RD = np.asarray(stored["basis"], np.float32)
            else:
                basis_RD = self.named(layer, lambda: codec.basis_rows(stored))
            self._bases[key] = torch.from_numpy(basis_RD).to(self._device)
        return self._bases[key]

    def predictor(self, layer: int) -> NDArray[np.float32] | None:
        return self._bundle.predictor_weights(layer)

    def named(self, layer: int, make: Callable[[], Any]) -> Any:
        """What `make` gives; the layer is named in what it raises."""
        try:
            return make()
        except BundleError as error:
            where = f"{self._bundle.path}/tables/bases.safetensors: layer {layer}"
            raise BundleError(f"{where}: {error.message}") from error


@dataclass(frozen=True)
class PlanesDecoder:
    """Decoder of some planes of a tier.

    Attributes:
        places: which of the kept layers.
        index: the same, for indexing rows [n, K, D].
        rows: theirs.
    """

    places: tuple[int, ...]
    index: slice | Tensor
    rows: PlaneRows


def _index(places: Sequence[int], device: torch.device) -> slice | Tensor:
    first, stop = places[0], places[-1] + 1
    if stop - first == len(places):
        return slice(first, stop)
    return torch.tensor(places, device=device)


def tier_decoders(tier: Tier, shared: SharedArrays, device: torch.device) -> list[PlanesDecoder]:
    """One decoder for all planes of bands, of steps, and of each other codec."""
    groups: dict[object, list[tuple[int, Plane]]] = {}
    for place, plane in enumerate(tier.planes):
        codec = plane.codec
        key: object = codec.name if isinstance(codec, (Bands, Steps)) else codec
        groups.setdefault(key, []).append((place, plane))
    decoders = []
    for members in groups.values():
        places = tuple(place for place, _ in members)
        rows = plane_rows([plane for _, plane in members], shared, device)
        decoders.append(PlanesDecoder(places, _index(places, device), rows))
    return decoders


def plane_rows(planes: Sequence[Plane], shared: SharedArrays, device: torch.device) -> PlaneRows:
    """Of planes that are all bands, all steps, or all of one other codec."""
    if isinstance(planes[0].codec, (Bands, Steps)):
        return _FieldRows(planes, shared, device)
    return _ElementRows(planes, shared, device)


class _ElementRows:
    """Planes of one codec that stores values, or (svd) coefficients, one by one."""

    def __init__(self, planes: Sequence[Plane], shared: SharedArrays, device: torch.device) -> None:
        codec: Codec = planes[0].codec
        self._offsets = [plane.offset for plane in planes]
        self._length = planes[0].length
        steps = {b - a for a, b in zip(self._offsets, self._offsets[1:], strict=False)}
        self._step = steps.pop() if len(steps) == 1 else None
        self._bases_PRD: Tensor | None = None
        if isinstance(codec, Svd):
            self._bases_PRD = torch.stack([shared.basis(p.layer, codec) for p in planes])
            codec = codec.inner
        self._decoder: ElementDecoder = element_decoder(codec, device)

    def __call__(self, records_nS: Tensor) -> Tensor:
        values_nPW = self._decoder(self._planes(records_nS))
        if self._bases_PRD is None:
            return values_nPW
        return torch.bmm(values_nPW.transpose(0, 1), self._bases_PRD).transpose(0, 1)

    def plane(self, index: int, plane_nB: Tensor) -> Tensor:
        """Float32 [n, D] of one plane's bytes."""
        values_nW = self._decoder(plane_nB[:, None])[:, 0]
        return values_nW if self._bases_PRD is None else values_nW @ self._bases_PRD[index]

    def _planes(self, records_nS: Tensor) -> Tensor:
        """U8 [n, P, B], without a copy where the planes lie at equal distances."""
        first, count, length = self._offsets[0], len(self._offsets), self._length
        if count == 1:
            return records_nS[:, None, first : first + length]
        if self._step is None:
            return torch.stack([records_nS[:, at : at + length] for at in self._offsets], dim=1)
        return records_nS.as_strided(
            (len(records_nS), count, length),
            (records_nS.stride(0), self._step, 1),
            records_nS.storage_offset() + first,
        )


class _FieldRows:
    """All planes of codec bands, or all of codec steps, of a tier."""

    def __init__(self, planes: Sequence[Plane], shared: SharedArrays, device: torch.device) -> None:
        self._fields = shared.named(planes[0].layer, lambda: _fields(planes, shared, device))
        self._planes = [_expanded_plane(plane, shared, device) for plane in planes]
        self._offsets = [plane.offset for plane in planes]

    def __call__(self, records_nS: Tensor) -> Tensor:
        values_nC = self._fields.coefficients(records_nS)
        pieces = values_nC.split(self._fields.counts, dim=1)
        return torch.stack(
            [plane.rows(piece) for plane, piece in zip(self._planes, pieces, strict=True)], dim=1
        )

    def plane(self, index: int, plane_nB: Tensor) -> Tensor:
        """Float32 [n, D] of one plane's bytes."""
        first = sum(self._fields.counts[:index])
        part = slice(first, first + self._fields.counts[index])
        values_nc = self._fields.coefficients(plane_nB, part, start=self._offsets[index])
        return self._planes[index].rows(values_nc)


def _fields(
    planes: Sequence[Plane], shared: SharedArrays, device: torch.device
) -> BandsFields | StepsFields:
    bands, steps = [], []
    for plane in planes:
        if isinstance(plane.codec, Bands):
            bands.append((plane.codec, shared.stored(plane.layer), plane.offset))
        elif isinstance(plane.codec, Steps):
            steps.append((plane.codec, shared.stored(plane.layer), plane.offset))
    return BandsFields(bands, device) if bands else StepsFields(steps, device)


def _expanded_plane(plane: Plane, shared: SharedArrays, device: torch.device) -> ExpandedPlane:
    codec = plane.codec
    assert isinstance(codec, (Bands, Steps))
    stored = codec.stored_C if isinstance(codec, Bands) else np.arange(codec.count)
    mean_D = torch.from_numpy(np.asarray(shared.stored(plane.layer)["mean"], np.float32)).to(device)
    if not codec.basis or not len(stored):
        return ExpandedPlane(mean_D, None, torch.from_numpy(stored).to(device), codec.exponent)
    basis_RD = shared.basis(plane.layer, codec)
    if np.array_equal(stored, np.arange(len(stored))):
        basis_cD = basis_RD[: len(stored)]
    else:
        basis_cD = basis_RD[torch.from_numpy(stored).to(device)]
    return ExpandedPlane(mean_D, basis_cD, None, codec.exponent)
