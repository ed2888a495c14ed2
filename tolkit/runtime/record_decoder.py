"""Rows from the stored bytes of records, in torch: the oracle of the kernels, and the CPU's path.

V vocabulary, n rows asked for, K kept layers, D hidden, S record stride, P planes of equal layout,
B bytes of a plane, R rows of a basis. Everything shared by rows (codebooks, bases, predictors) is
expanded once and lies on the device; decoding reads nothing from the host and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tolkit.errors import BundleError
from tolkit.model.files import mapped_tensor
from tolkit.runtime.element_planes import ElementDecoder, element_decoder
from tolkit.runtime.field_planes import BandsFields, ExpandedPlane, StepsFields
from tolkit_formats.codecs import Bands, Codec, Steps, Svd
from tolkit_formats.reader import Bundle
from tolkit_formats.records import Plane, Tier

__all__ = ["RecordDecoder", "backbone_embedding", "unit_rows"]

_EMBEDDING = "model.embed_tokens.weight"


class RecordDecoder:
    """Decodes records of one bundle.

    Args:
        bundle: open bundle; its shared arrays are read, checked and expanded here.
        device: where records come from and rows go to.
        dtype: of the rows; they are computed in float32.
        embedding_VD: the model's embedding on `device`, where it is there anyway; else a bundle
            with predictors has it mapped (CPU) or copied (elsewhere) from its backbone.

    Attributes:
        size_bytes: of the expanded bases and predictors, the largest arrays it holds.

    Raises:
        BundleError: a shared array no encoder writes; the message names the layer.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        embedding_VD: Tensor | None = None,
    ) -> None:
        self.layer_ids = bundle.layer_ids
        self.device = device
        self.dtype = dtype
        self._width = bundle.hidden_size
        shared = _SharedArrays(bundle, device)
        self._tiers = [_tier_decoders(tier, shared, device) for tier in bundle.manifest.tiers]
        self._predictors = {
            place: torch.from_numpy(weights_DD).to(device)
            for place, layer in enumerate(bundle.layer_ids)
            if (weights_DD := shared.predictor(layer)) is not None
        }
        expanded = [*shared.bases, *self._predictors.values()]
        self.size_bytes = sum(tensor.nbytes for tensor in expanded)
        if self._predictors:
            self._embedding_VD = (
                backbone_embedding(bundle, device) if embedding_VD is None else embedding_VD
            )

    def decode(self, tier: int, records_nS: Tensor, ids_n: Tensor) -> Tensor:
        """Rows of records of one tier.

        Args:
            tier: index of the tier.
            records_nS: U8 on the device: stored records, or symbol planes where they are coded.
            ids_n: int64, the records' tokens; read only by a bundle with predictors.

        Returns:
            `dtype` [n, K, D], planes in the order of `layer_ids`.
        """
        records_nS = _aligned(records_nS)
        decoders = self._tiers[tier]
        if len(decoders) == 1 and not self._predictors:
            rows_nKD = decoders[0].rows(records_nS)
        else:
            rows_nKD = torch.empty(
                (len(records_nS), len(self.layer_ids), self._width), device=self.device
            )
            for decoder in decoders:
                rows_nKD[:, decoder.index] = decoder.rows(records_nS)
        self._add_predictions(rows_nKD, ids_n)
        return rows_nKD.to(self.dtype)

    def decode_plane(self, tier: int, place: int, plane_nB: Tensor, ids_n: Tensor) -> Tensor:
        """One plane of what `decode` gives, so that few layers' rows need be alive at a time.

        Args:
            place: which of `layer_ids`.
            plane_nB: U8 [n, B] on the device: that plane's bytes of the records.

        Returns:
            `dtype` [n, D].
        """
        (decoder,) = [decoder for decoder in self._tiers[tier] if place in decoder.places]
        if plane_nB.stride(-1) != 1 or plane_nB.stride(0) % 4 or plane_nB.storage_offset() % 4:
            plane_nB = _aligned(plane_nB)
        rows_nD = decoder.plane(decoder.places.index(place), plane_nB)
        if place in self._predictors:
            unit_nD = unit_rows(self._embedding_VD.index_select(0, ids_n))
            rows_nD = rows_nD + unit_nD @ self._predictors[place].T
        return rows_nD.to(self.dtype)

    def _add_predictions(self, rows_nKD: Tensor, ids_n: Tensor) -> None:
        if not self._predictors:
            return
        unit_nD = unit_rows(self._embedding_VD.index_select(0, ids_n))
        for place, weights_DD in self._predictors.items():
            rows_nKD[:, place] += unit_nD @ weights_DD.T


def unit_rows(embedded_nD: Tensor) -> Tensor:
    """Rows scaled to a root mean square of 1, a row of zeros left alone: float32 [n, D]."""
    wide_nD = embedded_nD.float()
    mean_n1 = wide_nD.square().mean(dim=1, keepdim=True)
    return wide_nD / torch.where(mean_n1 > 0, mean_n1, 1.0).sqrt()


def _aligned(records_nS: Tensor) -> Tensor:
    """The records in one piece that views of four-byte numbers can be taken of."""
    records_nS = records_nS.contiguous()
    return records_nS.clone() if records_nS.storage_offset() % 4 else records_nS


def backbone_embedding(bundle: Bundle, device: torch.device) -> Tensor:
    """A bundle's embedding [V, D] as stored: mapped on a CPU, copied elsewhere."""
    bundle.embedded([0])  # compares its digest with the one the tables are for
    return mapped_tensor(bundle.tensor_file("backbone.safetensors"), _EMBEDDING).to(device)


class _SharedArrays:
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
class _PlanesDecoder:
    """Decoder of some planes of a tier.

    Attributes:
        places: which of the kept layers.
        index: the same, for indexing rows [n, K, D].
        rows: records U8 [n, S] -> float32 [n, P, D].
        plane: which of them, its bytes U8 [n, B] -> float32 [n, D].
    """

    places: tuple[int, ...]
    index: slice | Tensor
    rows: Callable[[Tensor], Tensor]
    plane: Callable[[int, Tensor], Tensor]


def _index(places: Sequence[int], device: torch.device) -> slice | Tensor:
    first, stop = places[0], places[-1] + 1
    if stop - first == len(places):
        return slice(first, stop)
    return torch.tensor(places, device=device)


def _tier_decoders(tier: Tier, shared: _SharedArrays, device: torch.device) -> list[_PlanesDecoder]:
    """One decoder for all planes of bands, of steps, and of each other codec."""
    groups: dict[object, list[tuple[int, Plane]]] = {}
    for place, plane in enumerate(tier.planes):
        codec = plane.codec
        key: object = codec.name if isinstance(codec, (Bands, Steps)) else codec
        groups.setdefault(key, []).append((place, plane))
    decoders = []
    for members in groups.values():
        planes = [plane for _, plane in members]
        rows: _FieldRows | _ElementRows
        if isinstance(planes[0].codec, (Bands, Steps)):
            rows = _FieldRows(planes, shared, device)
        else:
            rows = _ElementRows(planes, shared, device)
        places = tuple(place for place, _ in members)
        decoders.append(_PlanesDecoder(places, _index(places, device), rows, rows.plane))
    return decoders


class _ElementRows:
    """Planes of one codec that stores values, or (svd) coefficients, one by one."""

    def __init__(
        self, planes: Sequence[Plane], shared: _SharedArrays, device: torch.device
    ) -> None:
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
            (records_nS.shape[1], self._step, 1),
            records_nS.storage_offset() + first,
        )


class _FieldRows:
    """All planes of codec bands, or all of codec steps, of a tier."""

    def __init__(
        self, planes: Sequence[Plane], shared: _SharedArrays, device: torch.device
    ) -> None:
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
    planes: Sequence[Plane], shared: _SharedArrays, device: torch.device
) -> BandsFields | StepsFields:
    bands, steps = [], []
    for plane in planes:
        if isinstance(plane.codec, Bands):
            bands.append((plane.codec, shared.stored(plane.layer), plane.offset))
        elif isinstance(plane.codec, Steps):
            steps.append((plane.codec, shared.stored(plane.layer), plane.offset))
    return BandsFields(bands, device) if bands else StepsFields(steps, device)


def _expanded_plane(plane: Plane, shared: _SharedArrays, device: torch.device) -> ExpandedPlane:
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
