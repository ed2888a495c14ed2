"""Keys and values of the positions already read, so that decoding reads each token once.

L layers, B batch, H key-value heads, S capacity in positions, C head width.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tolkit.errors import UsageError
from tolkit.model.config import ModelConfig
from tolkit.model.layers import KeyValueStore

__all__ = ["DecoderCache", "KVCache"]


class DecoderCache(Protocol):
    """What `Decoder.hidden` asks of a cache; `KVCache` is one."""

    @property
    def length(self) -> int:
        """Positions filled."""

    def layer(self, layer: int) -> KeyValueStore:
        """The store of one layer at the current length; it does not advance the length."""

    def advance(self, count: int) -> None:
        """Count `count` more positions as filled, once all layers have stored theirs."""

    def check_room(self, count: int) -> None:
        """Raise UsageError when `count` more positions do not fit."""


class KVCache:
    """Preallocated keys and values, [L, B, H, S, C] each; filled in place by `Decoder.hidden`.

    `length` is the number of positions filled; set it lower to take back tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            max_len,
            config.head_dim,
        )
        self.keys_LBHSC = torch.empty(shape, dtype=dtype, device=device)
        self.values_LBHSC = torch.empty(shape, dtype=dtype, device=device)
        self.max_len = max_len
        self.length = 0

    def layer(self, layer: int) -> KeyValueStore:
        """See `DecoderCache`; the store writes in place."""
        return partial(self._append, layer)

    def advance(self, count: int) -> None:
        """See `DecoderCache`."""
        self.length += count

    def check_room(self, count: int) -> None:
        """See `DecoderCache`."""
        if self.length + count > self.max_len:
            raise UsageError(
                f"cache: {self.length} + {count} positions do not fit, expected at most "
                f"{self.max_len}"
            )

    def keep_rows(self, index_B: Tensor) -> None:
        """Only these rows of the batch, int64 on the cache's device, in this order; copies them."""
        filled = self.length
        for name in ("keys_LBHSC", "values_LBHSC"):
            old_LBHSC: Tensor = getattr(self, name)
            shape = list(old_LBHSC.shape)
            shape[1] = len(index_B)
            new_LBHSC = old_LBHSC.new_empty(shape)
            new_LBHSC[:, :, :, :filled] = old_LBHSC[:, index_B, :, :filled]
            setattr(self, name, new_LBHSC)

    def _append(self, layer: int, keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + keys_BHTC.shape[2]
        keys_BHSC, values_BHSC = self.keys_LBHSC[layer], self.values_LBHSC[layer]
        keys_BHSC[:, :, self.length : end] = keys_BHTC
        values_BHSC[:, :, self.length : end] = values_BHTC
        return keys_BHSC[:, :, :end], values_BHSC[:, :, :end]
