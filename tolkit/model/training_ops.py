"""Rotation, norm and attention with backward passes written out, for training.

Autograd's own passes for these three took longer than the four projections of a memory block on
a CPU (torch 2.13, one thread, B T = 4096, D 512; tests/bench/reports/2026-11-21-training.md).
Values equal the plain formulas to rounding.

B batch, T positions, H heads, C head width, D hidden, N any number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["LONGEST_ATTENTION", "attend", "pad_rows", "rms_norm", "rotate"]

LONGEST_ATTENTION = 512  # beyond, T x T probabilities take too much memory
_ROW_MULTIPLE = 64
_BLOCK_SCORES = 1 << 20  # float32 scores worked on at once: 4 MiB stay in cache


def rotate(heads_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Half-split rotary embedding, in the dtype of `cos_TC`."""
    rotated: Tensor = _Rotate.apply(heads_BHTC, cos_TC, sin_TC)  # type: ignore[no-untyped-call]  # torch has no types
    return rotated


def rms_norm(states_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) x weight over the last axis, float32 or wider throughout."""
    normed: Tensor = _RmsNorm.apply(states_ND, weight_D, eps)  # type: ignore[no-untyped-call]  # torch has no types
    return normed


def attend(queries_BHTC: Tensor, keys_BHTC: Tensor, values_BHTC: Tensor) -> Tensor:
    """Causal attention of positions 0..T-1 over themselves with bfloat16 products.

    Softmax is float32. Keeps the probabilities, B H T T bfloat16, for backward, so T should not
    exceed LONGEST_ATTENTION. Result bfloat16 [B, H, T, C], laid out as [B, T, H, C].
    """
    mixed: Tensor = _Attend.apply(queries_BHTC, keys_BHTC, values_BHTC)  # type: ignore[no-untyped-call]  # torch has no types
    return mixed


def pad_rows(rows_nD: Tensor) -> Tensor:
    """Zero rows added up to a multiple of 64.

    The number of distinct ids differs from step to step, and oneDNN compiles (2 ms) and keeps
    (1 MB) a bfloat16 product for every new number of rows.
    """
    return torch.nn.functional.pad(rows_nD, (0, 0, 0, -rows_nD.shape[0] % _ROW_MULTIPLE))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TC, sin_TC)
        ctx.dtype = heads.dtype
        return _turn(heads, cos_TC, sin_TC)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_TC, sin_TC = ctx.saved_tensors
        return _turn(grads[0], cos_TC, -sin_TC).to(ctx.dtype), None, None


def _turn(heads: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    heads = heads.to(cos_TC.dtype)  # one cast: mixed dtypes take torch's slow path every time
    turned = heads * cos_TC
    turned[..., :half].addcmul_(heads[..., half:], sin_TC[..., :half], value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sin_TC[..., half:])
    return turned


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        # The very steps of F.rms_norm, so that rows are the same bits with and without gradients.
        scale_N1 = states.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(states, weight_D, scale_N1)
        normed: Tensor = states * scale_N1
        return normed.mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        states, weight_D, scale_N1 = ctx.saved_tensors
        grad, width = grads[0], states.shape[-1]
        normed: Tensor = states * scale_N1
        product = grad * normed
        grad_weight_D = product.reshape(-1, width).sum(0)
        # d x = scale x (g w - normed x mean(g w normed))
        mean_N1 = (product @ weight_D).div_(width).unsqueeze(-1)
        grad_states = torch.mul(grad, weight_D, out=product)
        grad_states = grad_states.sub_(normed.mul_(mean_N1)).mul_(scale_N1)
        return grad_states, grad_weight_D, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch, heads, length, width = queries.shape
        q, k, v = (_stacked(t) for t in (queries, keys, values))
        q *= width**-0.5
        mask_TT = torch.full((length, length), float("-inf"), device=q.device).triu_(1)
        probabilities = torch.empty(batch * heads, length, length, dtype=q.dtype, device=q.device)
        mixed_BTHC = torch.empty(batch, length, heads, width, dtype=q.dtype, device=q.device)
        for part, windows in _blocks(batch, heads, length):
            scores = torch.bmm(q[part], k[part].transpose(1, 2)).float().add_(mask_TT)
            probabilities[part] = torch.softmax(scores, -1)
            mixed = torch.bmm(probabilities[part], v[part])
            mixed_BTHC[windows].transpose(1, 2).copy_(mixed.view(-1, heads, length, width))
        ctx.save_for_backward(q, k, v, probabilities, mixed_BTHC)
        ctx.dtypes = queries.dtype, keys.dtype, values.dtype
        return mixed_BTHC.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, probabilities, mixed_BTHC = ctx.saved_tensors
        batch, length, heads, width = mixed_BTHC.shape
        grad_BHTC = grads[0]
        delta_n1 = (grad_BHTC.float() * mixed_BTHC.transpose(1, 2)).sum(-1).view(-1, length, 1)
        grad = _stacked(grad_BHTC)
        results = [
            torch.empty(batch, length, heads, width, dtype=dtype, device=q.device).transpose(1, 2)
            for dtype in ctx.dtypes
        ]
        for part, windows in _blocks(batch, heads, length):
            p = probabilities[part]
            scores = torch.bmm(grad[part], v[part].transpose(1, 2)).float()
            scores = scores.sub_(delta_n1[part]).mul_(p).to(p.dtype)
            found = (
                torch.bmm(scores, k[part]) * width**-0.5,
                torch.bmm(scores.transpose(1, 2), q[part]),
                torch.bmm(p.transpose(1, 2), grad[part]),
            )
            for result, block in zip(results, found, strict=True):
                result[windows] = block.view(-1, heads, length, width)
        return results[0], results[1], results[2]


def _stacked(heads_BHTC: Tensor) -> Tensor:
    """[B, H, T, C] of any layout as contiguous bfloat16 [B H, T, C], cast and moved in one pass."""
    batch, heads, length, width = heads_BHTC.shape
    stacked = torch.empty(
        batch, heads, length, width, dtype=torch.bfloat16, device=heads_BHTC.device
    )
    return stacked.copy_(heads_BHTC).view(-1, length, width)


def _blocks(batch: int, heads: int, length: int) -> list[tuple[slice, slice]]:
    """Slices of [B H] and of [B] that cover the same whole windows."""
    windows = max(1, _BLOCK_SCORES // (heads * length * length))
    return [
        (slice(start * heads, (start + windows) * heads), slice(start, start + windows))
        for start in range(0, batch, windows)
    ]
