"""What the kernels are told about a bundle: places, scales and bases as flat arrays on the device.

K kept layers, P planes of a launch, C their coefficients one after the other, R rows of a basis,
D hidden. A basis stays as small as it is stored (int8 numbers or f16): its scales go into those of
the coefficients. The Hadamard rotation is a basis of ones and minus ones that layers share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tolkit.errors import BundleError
from tolkit.rotation import rotated
from tolkit.runtime.kernels.coefficients import (
    Coefficients,
    Elements,
    codes_at,
    of_bands,
    of_steps,
)
from tolkit_formats.codecs import Bands, Steps, Svd
from tolkit_formats.hadamard import hadamard_size
from tolkit_formats.reader import Bundle
from tolkit_formats.records import Plane, Tier

__all__ = ["ElementPlan", "ExpandPlan", "Plans", "Predictions"]


@dataclass(frozen=True)
class ElementPlan:
    """Planes of one codec. offset_P int32, place_P int32 (of K), table float32; on the device."""

    elements: Elements
    codes_at: int
    offset_P: Tensor
    place_P: Tensor
    table: Tensor


@dataclass(frozen=True)
class ExpandPlan:
    """Planes that a basis expands, one launch; the arguments of `expand_kernel` by its names.

    Attributes:
        kind: ``bands``, ``steps`` or ``elements`` (svd; then `elements` is the inner codec).
    """

    kind: str
    elements: Elements | None
    table: Tensor
    basis: Tensor
    mean_PD: Tensor
    factor_P: Tensor
    offset_P: Tensor
    place_P: Tensor
    start_P: Tensor
    count_P: Tensor
    extra_P: Tensor
    place_C: Tensor
    field_C: Tensor
    scale_C: Tensor
    row_C: Tensor
    predictor_P: Tensor


@dataclass(frozen=True)
class Predictions:
    """Weights of all predictors: int8 [P, D in, D out], float32 scales [P, D out]."""

    weights_PDD: Tensor
    scales_PD: Tensor


class Plans:
    """The launches of every tier of a bundle.

    Attributes:
        tiers: plans of each tier, in order.
        predictions: None where no plane has a predictor.
        added: (place, index of its predictor) of the planes that `expand_kernel` adds none to,
            since in some tier no basis expands them.
        size_bytes: of everything on the device.

    Raises:
        BundleError: a shared array no encoder writes; the message names the layer.
    """

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        self._bundle = bundle
        self._device = device
        self._numbers = _Pool(device)
        self._halves = _Pool(device)
        self._predictor_of: dict[int, int] = {}
        self.predictions = self._predictions()
        unexpanded = {
            plane.layer
            for tier in bundle.manifest.tiers
            for plane in tier.planes
            if not isinstance(plane.codec, (Bands, Steps, Svd))
        }
        self.added = tuple(
            (place, self._predictor_of.pop(layer))
            for place, layer in enumerate(bundle.layer_ids)
            if layer in self._predictor_of and layer in unexpanded
        )
        drafts = [self._drafts(tier) for tier in bundle.manifest.tiers]
        # Plans are finished when all bases are known, since tiers share one array of them.
        self.tiers = [[finish() for finish in of_tier] for of_tier in drafts]
        tensors = [t for plans in self.tiers for plan in plans for t in vars(plan).values()]
        if self.predictions is not None:
            tensors += vars(self.predictions).values()
        unique = {t.data_ptr(): t.nbytes for t in tensors if isinstance(t, Tensor)}
        self.size_bytes = sum(unique.values())

    def _drafts(self, tier: Tier) -> list[Callable[[], ElementPlan | ExpandPlan]]:
        groups: dict[object, list[tuple[int, Plane]]] = {}
        for place, plane in enumerate(tier.planes):
            codec = plane.codec
            key: object = codec
            if isinstance(codec, (Bands, Steps)):
                key = codec.name
            elif isinstance(codec, Svd):
                key = Elements.of(codec.inner)
            groups.setdefault(key, []).append((place, plane))
        return [self._draft(members) for members in groups.values()]

    def _draft(
        self, members: Sequence[tuple[int, Plane]]
    ) -> Callable[[], ElementPlan | ExpandPlan]:
        codec = members[0][1].codec
        if isinstance(codec, (Bands, Steps, Svd)):
            return self._expand_draft(members)
        elements = Elements.of(codec)
        plan = ElementPlan(
            elements,
            codes_at(codec),
            self._int32([plane.offset for _, plane in members]),
            self._int32([place for place, _ in members]),
            self._tensor(elements.table()),
        )
        return lambda: plan

    def _expand_draft(self, members: Sequence[tuple[int, Plane]]) -> Callable[[], ExpandPlan]:
        drawn = [self._named(plane, self._coefficients) for _, plane in members]
        counts = [len(part.row) for part in drawn]
        starts = np.cumsum(counts) - counts
        codec = members[0][1].codec
        elements = Elements.of(codec.inner) if isinstance(codec, Svd) else None
        tables = [part.table for part in drawn]
        extra = [part.extra for part in drawn]
        if isinstance(codec, Bands):
            extra = (np.cumsum([len(t) for t in tables]) - [len(t) for t in tables]).tolist()
            table = np.concatenate([*tables, np.zeros(1, np.float32)])
        else:
            table = max(tables, key=len)
        factors = [2.0 ** getattr(plane.codec, "exponent", 0) for _, plane in members]
        arrays = {
            "table": self._tensor(table),
            "mean_PD": self._tensor(np.stack([part.mean_D for part in drawn])),
            "factor_P": self._tensor(np.array(factors, np.float32)),
            "offset_P": self._int32([plane.offset for _, plane in members]),
            "place_P": self._int32([place for place, _ in members]),
            "start_P": self._int32(starts),
            "count_P": self._int32(counts),
            "extra_P": self._int32(extra),
            "place_C": self._int32(np.concatenate([part.place for part in drawn])),
            "field_C": self._int32(np.concatenate([part.field for part in drawn])),
            "scale_C": self._tensor(np.concatenate([part.scale for part in drawn])),
            "row_C": self._int32(np.concatenate([part.row for part in drawn])),
            "predictor_P": self._int32([self._predictor_of.get(p.layer, -1) for _, p in members]),
        }
        kind = "elements" if isinstance(codec, Svd) else codec.name
        pool = self._halves if isinstance(codec, Svd) else self._numbers
        return lambda: ExpandPlan(kind, elements, basis=pool.joined(), **arrays)

    def _coefficients(self, plane: Plane) -> Coefficients:
        codec = plane.codec
        stored = {**self._bundle.shared(plane.layer), **self._bundle.common}
        if isinstance(codec, Svd):
            first = self._halves.first_row(plane.layer, lambda: np.asarray(stored["basis"]))
            nothing = np.zeros(codec.rank, np.int64)
            return Coefficients(
                place=nothing,
                field=nothing,
                scale=nothing.astype(np.float32),
                row=first + np.arange(codec.rank),
                mean_D=np.zeros(codec.width, np.float32),
                table=Elements.of(codec.inner).table(),
                extra=codes_at(codec.inner),
            )
        assert isinstance(codec, (Bands, Steps))
        drawn = of_bands(codec, stored) if isinstance(codec, Bands) else of_steps(codec, stored)
        first, scales_R = self._field_basis(codec, plane.layer, stored)
        scale = drawn.scale * scales_R[drawn.row]
        return replace(drawn, scale=scale, row=first + drawn.row)

    def _field_basis(
        self, codec: Bands | Steps, layer: int, stored: Mapping[str, NDArray[Any]]
    ) -> tuple[int, NDArray[np.float32]]:
        """First row in the pool and the scale of each row: float32 [R]."""
        if codec.basis:
            first = self._numbers.first_row(
                (layer, codec.basis), lambda: codec.basis_numbers(stored).astype(np.int8)
            )
            return first, np.asarray(stored["basis_scales"], np.float32)
        scale = np.float32(hadamard_size(codec.width) ** -0.5)
        first = self._numbers.first_row("hadamard", lambda: _signs(codec.width))
        return first, np.full(codec.width, scale)

    def _predictions(self) -> Predictions | None:
        weights: list[Tensor] = []
        scales: list[Tensor] = []
        for layer, predictor in sorted(self._bundle.manifest.predictors.items()):
            stored = self._bundle.shared(layer)
            self._predictor_of[layer] = len(weights)
            numbers_DD = predictor.numbers_DD(stored).astype(np.int8)
            weights.append(self._tensor(np.ascontiguousarray(numbers_DD.T)))
            of_layer = np.asarray(stored["predictor_scales"], np.float32)
            scales.append(self._tensor(of_layer * np.float32(2.0**predictor.exponent)))
        return Predictions(torch.stack(weights), torch.stack(scales)) if weights else None

    def _named(self, plane: Plane, make: Callable[[Plane], Coefficients]) -> Coefficients:
        try:
            return make(plane)
        except BundleError as error:
            where = f"{self._bundle.path}/tables/bases.safetensors: layer {plane.layer}"
            raise BundleError(f"{where}: {error.message}") from error

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self._device)

    def _int32(self, numbers: Sequence[int] | NDArray[Any]) -> Tensor:
        return self._tensor(np.asarray(numbers, np.int32))


def _signs(width: int) -> NDArray[np.int8]:
    """The rotation's matrix without its norm: int8 [D, D] of -1, 0, 1."""
    turned = rotated(torch.eye(width)).sign()
    return turned.to(torch.int8).numpy()


class _Pool:
    """Rows of all bases one after the other, each basis once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: dict[object, int] = {}
        self._parts: list[Tensor] = []
        self._num_rows = 0

    def first_row(self, key: object, make: Callable[[], NDArray[Any]]) -> int:
        """Where a basis [R, D] begins; made when it is new."""
        if key not in self._first:
            self._first[key] = self._num_rows
            self._parts.append(torch.from_numpy(np.array(make())).to(self._device))
            self._num_rows += len(self._parts[-1])
        return self._first[key]

    def joined(self) -> Tensor:
        """All rows, one tensor."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0] if self._parts else torch.zeros(1, 1, dtype=torch.int8)
