"""Where a block's table rows come from: the FFN itself, a bundle, or rows shared by micro-batches.

n distinct token ids, L layers, D hidden size. The FFN of a memory block sees only the token id
(paper, sections 2.4-2.6), so every source is asked once per call for the distinct ids, and the
decoder gathers. Summed gradients of repeated tokens flow back through that gather, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, overload

from torch import Tensor

__all__ = ["FfnRows", "HasPlanes", "LazyPlanes", "RowSource"]


class RowSource(Protocol):
    """Gives the table rows of distinct tokens."""

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """Rows of `ids_n` (int64 [n], distinct, sorted): per layer a float [n, D], or None.

        None means that the layer has no table (dropped or folded into another).
        """


class LazyPlanes(Sequence[Tensor | None]):
    """L planes computed when indexed, none kept; so one layer's rows are alive at a time."""

    def __init__(self, layers: int, plane: Callable[[int], Tensor | None]) -> None:
        self._layers = layers
        self._plane = plane

    def __len__(self) -> int:
        return self._layers

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor | None]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor | None] | None:
        if isinstance(index, slice):
            return [self._plane(layer) for layer in range(*index.indices(self._layers))]
        if not -self._layers <= index < self._layers:
            raise IndexError(index)
        return self._plane(index % self._layers)

    def __iter__(self) -> Iterator[Tensor | None]:
        return (self._plane(layer) for layer in range(self._layers))


class HasPlanes(Protocol):
    """The part of a decoder this module needs."""

    @property
    def num_layers(self) -> int: ...

    def memory_ffn(self, layer: int, embedded_nD: Tensor) -> Tensor: ...

    def embed(self, ids: Tensor) -> Tensor: ...


class FfnRows:
    """The model's own FFN as a row source: rows computed layer by layer, when asked for."""

    def __init__(self, model: HasPlanes) -> None:
        self._model = model

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """See RowSource; differentiable with respect to FFN, norm and embedding weights."""
        return self.planes(self._model.embed(ids_n))

    def planes(self, embedded_nD: Tensor) -> Sequence[Tensor | None]:
        """The same from embedding rows [n, D] at hand."""
        return LazyPlanes(
            self._model.num_layers, lambda layer: self._model.memory_ffn(layer, embedded_nD)
        )
