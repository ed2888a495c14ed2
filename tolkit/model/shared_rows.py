"""Rows computed once for all micro-batches of an optimiser step.

n distinct ids of one micro-batch, N of all of them, L layers, D hidden.

    shared = SharedRows(model, all_ids)          # N rows a layer, once
    for ids in micro_batches:
        loss_of(model.hidden(ids, rows=shared)).backward()   # fills this object's gradients
    shared.backward()                            # one pass into FFN, norms and embedding
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tolkit.errors import UsageError
from tolkit.model.rows import HasPlanes, LazyPlanes

__all__ = ["SharedRows"]


class SharedRows:
    """A row source over fixed ids whose gradients wait for one final `backward`.

    The gradients equal those of running the FFN in every micro-batch, up to the order of float
    sums. Without `recompute` the FFN's activations of all layers are kept until `backward`
    (about 4 L N (2 D + 3 K) bytes in float32); with it one layer's at a time, for one more FFN
    forward pass. Rows and their gradients take 8 L N D bytes either way.

    Args:
        model: a decoder with its memory FFN.
        ids: the ids of all micro-batches, int64, any shape.
        recompute: trade time for memory as above. `backward` must then run under the same
            autocast setting as the constructor.
    """

    def __init__(self, model: HasPlanes, ids: Tensor, *, recompute: bool = False) -> None:
        self._model = model
        self._recompute = recompute
        self._ids_N = torch.unique(ids)
        self._embedded_ND = model.embed(self._ids_N).detach().requires_grad_()
        self._planes: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._gradients: list[Tensor | None] = [None] * model.num_layers
        for layer in range(model.num_layers):
            with torch.set_grad_enabled(not recompute):
                plane_ND = model.memory_ffn(layer, self._embedded_ND)
            if not recompute:
                self._planes.append(plane_ND)
            self._rows.append(plane_ND.detach().requires_grad_())

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """See RowSource. UsageError for an id that was not announced to the constructor."""
        assert self._rows, "backward ended these rows: the weights they came from have moved on"
        place_n = torch.searchsorted(self._ids_N, ids_n).clamp_(max=self._ids_N.shape[0] - 1)
        unknown_n = self._ids_N[place_n] != ids_n
        if unknown_n.any():
            raise UsageError(
                f"ids: token {int(ids_n[unknown_n][0])} is not among those the rows were "
                "computed for, expected the ids of all micro-batches"
            )

        def plane(layer: int) -> Tensor:
            borrowed_nD: Tensor = _Borrow.apply(  # type: ignore[no-untyped-call]  # torch has no types
                self._rows[layer], place_n, self, layer
            )
            return borrowed_nD

        return LazyPlanes(len(self._rows), plane)

    def add_gradient(self, layer: int, place_n: Tensor, gradient_nD: Tensor) -> None:
        """Add a micro-batch's gradient to the waiting ones (mutated); float32 or wider."""
        total_ND = self._gradients[layer]
        if total_ND is None:
            wide = torch.promote_types(self._rows[layer].dtype, torch.float32)
            total_ND = torch.zeros_like(self._rows[layer], dtype=wide)
            self._gradients[layer] = total_ND
        # The places are distinct, so this is a plain indexed add, and index_add_ is far slower.
        total_ND[place_n] = total_ND[place_n] + gradient_nD.to(total_ND.dtype)

    def backward(self) -> None:
        """Add the waiting gradients to the model's parameters and forget them (once a step)."""
        for layer, total_ND in enumerate(self._gradients):
            if total_ND is None:
                continue
            if self._recompute:
                with torch.enable_grad():
                    plane_ND = self._model.memory_ffn(layer, self._embedded_ND)
            else:
                plane_ND = self._planes[layer]
            torch.autograd.backward(plane_ND, total_ND.to(plane_ND.dtype))
            self._gradients[layer] = None
        self._planes.clear()
        self._rows.clear()
        if self._embedded_ND.grad is not None:
            with torch.enable_grad():
                embedded_ND = self._model.embed(self._ids_N)
            torch.autograd.backward(embedded_ND, self._embedded_ND.grad)
            self._embedded_ND.grad = None


class _Borrow(torch.autograd.Function):
    """Selects rows; the gradient goes to the lender's accumulator, not to a dense N x D tensor."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, place_n: Tensor, lender: SharedRows, layer: int
    ) -> Tensor:
        ctx.save_for_backward(place_n)
        ctx.lender, ctx.layer = lender, layer
        return rows_ND.index_select(0, place_n)

    @staticmethod
    def backward(ctx: Any, gradient_nD: Tensor) -> tuple[None, None, None, None]:
        (place_n,) = ctx.saved_tensors
        ctx.lender.add_gradient(ctx.layer, place_n, gradient_nD)
        return None, None, None, None
