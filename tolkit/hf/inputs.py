"""What transformers hands to `forward`, as the decoder wants it: padding and caches.

B batch, T new positions, S positions so far (the new ones included).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache

from tolkit.errors import UsageError
from tolkit.model.layers import KeyValueStore

__all__ = ["GrowingCache", "positions_of", "visible_positions"]


class GrowingCache:
    """A transformers Cache as a `tolkit.model.DecoderCache`; what the decoder stores goes there.

    Raises:
        UsageError: not a Cache object, or one of fixed size.
    """

    def __init__(self, cache: Any) -> None:
        if not isinstance(cache, Cache) or isinstance(cache, StaticCache):
            raise UsageError(
                f"past_key_values: {type(cache).__name__} is not supported, expected a cache that "
                "grows",
                hint="use transformers.DynamicCache, or leave it to generate()",
            )
        self._cache = cache
        self._length = int(cache.get_seq_length())

    @property
    def length(self) -> int:
        """Positions stored when the call began."""
        return self._length

    def layer(self, layer: int) -> KeyValueStore:
        """The store of one layer."""

        def store(keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]:
            keys_BHSC, values_BHSC = self._cache.update(keys_BHTC, values_BHTC, layer)
            return keys_BHSC, values_BHSC

        return store

    def advance(self, count: int) -> None:
        """Nothing: the cache counted while it stored."""
        self._length += count

    def check_room(self, count: int) -> None:
        """Nothing: it grows."""


def visible_positions(mask_BS: Tensor, length: int) -> Tensor:
    """Which positions each of the last `length` attends to: bool [B, 1, T, S].

    Those up to itself that `mask_BS` marks with a nonzero value. Padding attends to itself: a
    position that sees nothing would be NaN.
    """
    seen = mask_BS.shape[1]
    key_S = torch.arange(seen, device=mask_BS.device)
    query_T1 = key_S[seen - length :, None]
    real_BTS = (key_S <= query_T1) & (mask_BS != 0)[:, None]
    return (real_BTS | (key_S == query_T1))[:, None]


def positions_of(mask_BS: Tensor, length: int) -> Tensor:
    """Rotary positions of the last `length`: how many tokens of the row come before, [B, T]."""
    counted_BS = (mask_BS != 0).long().cumsum(-1) - 1
    return counted_BS.clamp_(min=0)[:, mask_BS.shape[1] - length :]
