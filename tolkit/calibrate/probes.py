"""Zero probes where a table's error is first read, and the gradients that arrive there.

L layers, B rows, T positions, N scored positions, D hidden.

Under error feedback the next table pays back what table L lost, so only the block in between reads
the error. Probe L therefore stands at what block L+1 *reads* of the stream, not in the stream
itself: at the input of its attention norm and, in a flex model, at that of FFN-C's norm too, since
table L+1 is added after both. The last probe stands at the input of the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tolkit.calibrate.sampling import sampled_gradient
from tolkit.evaluate.runnable import Placed
from tolkit.model import Decoder

__all__ = ["reader_gradients"]

_Hook = Callable[[nn.Module, Any], tuple[Tensor]]


def reader_gradients(
    placed: Placed, ids_BT: Tensor, place_N: Tensor, uniforms_N: Tensor
) -> list[Tensor]:
    """Gradients of the model's own sampled-label log-likelihood at each table's reader.

    The log-likelihood is summed over the N positions, so a gradient holds what an error at its
    position does to the later positions of its row as well. One forward and one backward pass
    serve all layers; beside what autograd keeps, 2 L B T D values live at once.

    Args:
        placed: a model with tables, on the device of the other arguments; weights and hooks are
            as before afterwards.
        ids_BT: int64, what the model reads.
        place_N: int64, the scored positions' places in the flattened rows.
        uniforms_N: float64 in [0, 1), what draws the label of each.

    Returns:
        Per layer [N, D] in the number format of the pass; NaN where the model's output is.
    """
    with torch.enable_grad(), _probed(placed.model) as probes:
        hidden_BTD = placed.hidden(ids_BT)
    flat_nD = hidden_BTD.detach().flatten(0, 1)
    gradient_ND, _ = sampled_gradient(flat_nD[place_N], placed.head_weight, uniforms_N)
    outer_nD = torch.zeros_like(flat_nD).index_copy_(0, place_N, gradient_ND)
    found = list(torch.autograd.grad(hidden_BTD, probes, outer_nD.view_as(hidden_BTD)))
    for layer, gradient_BTD in enumerate(found):  # in place: a second list of copies is large
        found[layer] = gradient_BTD.flatten(0, 1).index_select(0, place_N)
    return found


@contextmanager
def _probed(model: Decoder) -> Iterator[list[Tensor]]:
    """Inside, a forward pass appends its probe of every layer; only they take gradients."""
    probes: list[Tensor] = []
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    handles = [norm.register_forward_pre_hook(hook) for norm, hook in _hooks(model, probes)]
    try:
        model.requires_grad_(False)
        yield probes
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)


def _hooks(model: Decoder, probes: list[Tensor]) -> Iterator[tuple[nn.Module, _Hook]]:
    def fresh(norm: nn.Module, args: Any) -> tuple[Tensor]:
        (states_BTD,) = args
        probes.append(torch.zeros_like(states_BTD, requires_grad=True))
        return (states_BTD + probes[-1],)

    def same(norm: nn.Module, args: Any) -> tuple[Tensor]:
        (states_BTD,) = args
        return (states_BTD + probes[-1],)

    for layer in range(1, model.num_layers):
        block = model.block(layer)
        yield block.input_layernorm, fresh
        if block.post_attention_layernorm is not None:
            yield block.post_attention_layernorm, same
    yield model.model.norm, fresh
