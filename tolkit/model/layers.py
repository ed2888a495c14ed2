"""The parts of a block: norm, rotary positions, attention, feed-forward. No biases anywhere.

B batch, T positions of this call, S positions seen so far, H heads, C head width, D hidden,
K FFN inner size, N any number of rows. Weights are [out, in] as in torch.nn.Linear.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from torch import Tensor, nn

from tolkit.model import training_ops
from tolkit.model.config import ModelConfig

__all__ = [
    "Attention",
    "Linear",
    "LinearPair",
    "RmsNorm",
    "SwiGlu",
    "rms_norm",
    "rope_at",
    "rope_tables",
    "swiglu",
]


def rms_norm(states_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) x weight over the last axis; statistics in float32 or wider."""
    if states_ND.requires_grad and states_ND.dtype == weight_D.dtype == torch.float32:
        return training_ops.rms_norm(states_ND, weight_D, eps)
    return F.rms_norm(states_ND, weight_D.shape, weight_D, eps)


def swiglu(states_ND: Tensor, gate_KD: Tensor, up_KD: Tensor, down_DK: Tensor) -> Tensor:
    """W_down((W_up x) * SiLU(W_gate x)), the FFN of the paper's section 2.1; [N, D] -> [N, D]."""
    return F.linear(F.silu(F.linear(states_ND, gate_KD)) * F.linear(states_ND, up_KD), down_DK)


def rope_tables(
    config: ModelConfig, start: int, length: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, C] of positions start..start+length-1, angles in float32."""
    return _rope(config, torch.arange(start, start + length, device=device), dtype)


def rope_at(
    config: ModelConfig, positions_BT: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, C] of each row's own positions (int64 [B, T]), as above."""
    return _rope(config, positions_BT[:, None], dtype)


def _rope(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=positions.device).float()
    frequencies = 1.0 / (config.rope_theta ** (steps / config.head_dim))
    angles = positions.float()[..., None] * frequencies
    both = torch.cat((angles, angles), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def _rotate(heads_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    first, second = heads_BHTC.chunk(2, dim=-1)
    return heads_BHTC * cos_TC + torch.cat((-second, first), dim=-1) * sin_TC


class RmsNorm(nn.Module):
    """RMS norm with a learned scale [D]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        return rms_norm(states, self.weight, self.eps)


class Linear(nn.Linear):
    """A bias-free projection whose weights are left for the decoder to draw or load."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: drawing them here would double the start-up of a large model."""


class SwiGlu(nn.Module):
    """Gated FFN D -> K -> D."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, inner_size)
        self.up_proj = Linear(hidden_size, inner_size)
        self.down_proj = Linear(inner_size, hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return swiglu(states, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class LinearPair(nn.Module):
    """D -> K -> D without a nonlinearity: the paper's "linear dense module" read literally."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, inner_size)
        self.down_proj = Linear(inner_size, hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        projected: Tensor = self.down_proj(self.up_proj(states))
        return projected


class KeyValueStore(Protocol):
    """One layer's part of a cache: takes new keys and values, returns all so far."""

    def __call__(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]: ...


class Attention(nn.Module):
    """Causal grouped-query attention with half-split rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        width, kv_width = config.hidden_size, self.kv_heads * self.head_dim
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, kv_width)
        self.v_proj = Linear(width, kv_width)
        self.o_proj = Linear(width, width)

    def forward(
        self,
        states_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        store: KeyValueStore | None = None,
        visible_B1TS: Tensor | None = None,
    ) -> Tensor:
        batch, length, _ = states_BTD.shape
        queries = self.q_proj(states_BTD).view(batch, length, self.heads, self.head_dim)
        keys = self.k_proj(states_BTD).view(batch, length, self.kv_heads, self.head_dim)
        values = self.v_proj(states_BTD).view(batch, length, self.kv_heads, self.head_dim)
        plain = rope[0].dtype == queries.dtype and not queries.requires_grad
        rotate = _rotate if plain else training_ops.rotate
        queries_BHTC = rotate(queries.transpose(1, 2), *rope)
        keys_BHSC, values_BHSC = rotate(keys.transpose(1, 2), *rope), values.transpose(1, 2)
        if store is not None:
            keys_BHSC, values_BHSC = store(keys_BHSC, values_BHSC)
        mixed_BHTC = self._attend(queries_BHTC, keys_BHSC, values_BHSC, visible_B1TS)
        merged_BTD = mixed_BHTC.transpose(1, 2).reshape(batch, length, -1)
        output_BTD: Tensor = self.o_proj(merged_BTD)
        return output_BTD

    def _attend(
        self,
        queries_BHTC: Tensor,
        keys_BHSC: Tensor,
        values_BHSC: Tensor,
        visible_B1TS: Tensor | None,
    ) -> Tensor:
        groups = self.heads // self.kv_heads
        if queries_BHTC.dtype != keys_BHSC.dtype:  # a cache in a wider format than the model
            mixed_BHTC = self._attend(
                queries_BHTC.to(keys_BHSC.dtype), keys_BHSC, values_BHSC, visible_B1TS
            )
            return mixed_BHTC.to(queries_BHTC.dtype)
        if groups > 1 and queries_BHTC.shape[2] == 1 and keys_BHSC.shape[2] > 1:
            # One position sees all there is, so the heads of a group can stand in for positions,
            # and the cache need not be copied for each of them.
            grouped_BHGC = queries_BHTC.reshape(len(queries_BHTC), self.kv_heads, groups, -1)
            mixed_BHGC = F.scaled_dot_product_attention(
                grouped_BHGC, keys_BHSC, values_BHSC, attn_mask=visible_B1TS
            )
            return mixed_BHGC.reshape(queries_BHTC.shape)
        if groups > 1:  # not enable_gqa: only some fused kernels take it, the rest build T x S
            keys_BHSC = keys_BHSC.repeat_interleave(groups, dim=1)
            values_BHSC = values_BHSC.repeat_interleave(groups, dim=1)
        if torch.is_autocast_enabled("cpu") and queries_BHTC.device.type == "cpu":
            length = queries_BHTC.shape[2]
            whole = visible_B1TS is None and length == keys_BHSC.shape[2]
            if whole and 1 < length <= training_ops.LONGEST_ATTENTION:
                return training_ops.attend(queries_BHTC, keys_BHSC, values_BHSC)
            # Autocast would pick the CPU's bfloat16 kernel, which is slower than the float32 one.
            with torch.autocast("cpu", enabled=False):
                return _attention(
                    queries_BHTC.float(), keys_BHSC.float(), values_BHSC.float(), visible_B1TS
                )
        return _attention(queries_BHTC, keys_BHSC, values_BHSC, visible_B1TS)


def _attention(
    queries_BHTC: Tensor, keys_BHSC: Tensor, values_BHSC: Tensor, visible_B1TS: Tensor | None
) -> Tensor:
    if visible_B1TS is not None:
        return F.scaled_dot_product_attention(
            queries_BHTC, keys_BHSC, values_BHSC, attn_mask=visible_B1TS
        )
    length, seen = queries_BHTC.shape[2], keys_BHSC.shape[2]
    if length == 1 or length == seen:
        return F.scaled_dot_product_attention(
            queries_BHTC, keys_BHSC, values_BHSC, is_causal=length > 1
        )
    mask_TS = torch.ones(length, seen, dtype=torch.bool, device=queries_BHTC.device)
    return F.scaled_dot_product_attention(
        queries_BHTC, keys_BHSC, values_BHSC, attn_mask=mask_TS.tril(seen - length)
    )
