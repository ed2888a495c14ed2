"""Pruning a dense model, layer by layer, with what pruned layers give flowing on to the next.

B windows, T positions, D hidden, I inputs of a projection, H = sum of x x^T over positions [I, I].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from torch import Tensor, nn

from tolkit.errors import NonFiniteError, UsageError
from tolkit.evaluate.runnable import full_float32
from tolkit.model import Block, Decoder
from tolkit.model.layers import SwiGlu, rope_tables
from tolkit.progress import Progress
from tolkit.study.pruning_methods import METHODS, NEEDS_TEXT

__all__ = ["block_values", "projections", "prune", "sparsity_for"]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FFN = ("gate_proj", "up_proj", "down_proj")


def prune(
    model: Decoder,
    method: str,
    sparsity: float,
    calibration_BT: Tensor,
    progress: Progress,
    batch: int = 8,
) -> Decoder:
    """A float32 copy of a dense model, its block projections without `sparsity` of their weights.

    Embedding, norms and head stay. Each layer's inputs come from the pruned layers before it;
    its own seven projections see what they see before any of them is pruned.

    Args:
        method: of `METHODS`.
        sparsity: 0..1, of every projection alike.
        calibration_BT: ids int64; windows of equal length on the model's device. Not looked at
            by "magnitude".
        batch: windows at a time.

    Raises:
        UsageError: the model has tables.
        NonFiniteError: activations are NaN or infinite.
    """
    if model.config.has_tables:
        raise UsageError("model: has token tables, only dense models are pruned")
    pruner = METHODS[method]
    pruned = copy.deepcopy(model).float()
    streams: list[Tensor] = []
    with full_float32(), torch.inference_mode():
        if method in NEEDS_TEXT:
            streams = [pruned.embed(ids_BT) for ids_BT in torch.split(calibration_BT, batch)]
        with progress.task(f"prune {method}", pruned.num_layers, "layer") as task:
            for layer in range(pruned.num_layers):
                block = pruned.block(layer)
                hessians = _hessians(pruned, block, streams)
                _require_finite(hessians, layer)
                for name, linear in projections(block).items():
                    weight = linear.weight
                    weight.copy_(pruner(weight, hessians.get(_INPUT_OF[name]), sparsity))
                streams = [_forward(pruned, block, stream) for stream in streams]
                task.advance(1)
    return pruned


def projections(block: Block) -> dict[str, nn.Linear]:
    """The seven weight matrices of a dense block, in the order of the forward pass."""
    attention = {name: getattr(block.self_attn, name) for name in _ATTENTION}
    return attention | {name: getattr(block.mlp, name) for name in _FFN}


def block_values(model: Decoder) -> int:
    """Weights of all block projections: what can be pruned."""
    return sum(
        linear.weight.numel()
        for layer in range(model.num_layers)
        for linear in projections(model.block(layer)).values()
    )


def sparsity_for(model: Decoder, total: int, target: int) -> float:
    """The share of block weights to lose so that `target` of `total` block parameters remain.

    Raises:
        UsageError: the target is not below the total, or below what norms alone hold.
    """
    prunable = block_values(model)
    if not total - prunable < target < total:
        raise UsageError(
            f"against: has {target:,} active block parameters, the dense model has {total:,}; "
            f"expected between {total - prunable:,} and that"
        )
    return (total - target) / prunable


# Which captured input each projection reads.
_INPUT_OF = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "mixed",
    "gate_proj": "ffn",
    "up_proj": "ffn",
    "down_proj": "inner",
}


def _hessians(model: Decoder, block: Block, streams: Sequence[Tensor]) -> dict[str, Tensor]:
    """H of each input of the block's projections, float64; empty without text."""
    sums: dict[str, Tensor] = {}

    def take(name: str, input_BTI: Tensor) -> None:
        rows_NI = input_BTI.flatten(0, -2).float()
        product_II = (rows_NI.T @ rows_NI).double()
        sums[name] = sums[name] + product_II if name in sums else product_II

    for stream_BTD in streams:
        with _watching(block, take):
            _forward(model, block, stream_BTD)
    return sums


def _require_finite(hessians: Mapping[str, Tensor], layer: int) -> None:
    for name, hessian_II in hessians.items():
        if not bool(torch.isfinite(hessian_II).all()):
            raise NonFiniteError(
                f"calibration: layer {layer}'s {name} input is NaN or infinite, expected finite",
                hint="check the weights",
            )


@contextmanager
def _watching(block: Block, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `take` with each input while the block runs."""
    ffn = block.mlp
    assert isinstance(ffn, SwiGlu)

    def ffn_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (states,) = inputs
        take("ffn", states)
        inner = F.silu(F.linear(states, ffn.gate_proj.weight))
        take("inner", inner * F.linear(states, ffn.up_proj.weight))

    def named(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: take(name, inputs[0])

    hooks = [
        block.self_attn.q_proj.register_forward_pre_hook(named("attention")),
        block.self_attn.o_proj.register_forward_pre_hook(named("mixed")),
        ffn.register_forward_pre_hook(ffn_input),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _forward(model: Decoder, block: Block, stream_BTD: Tensor) -> Tensor:
    rope = rope_tables(
        model.config, 0, stream_BTD.shape[1], dtype=stream_BTD.dtype, device=stream_BTD.device
    )
    after_BTD: Tensor = block(stream_BTD, rope, None, None)
    return after_BTD
