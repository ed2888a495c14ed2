"""What transformers hands to `forward`, as the decoder wants it: caches."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, StaticCache

from tolkit.errors import UsageError
from tolkit.model.layers import KeyValueStore

__all__ = ["GrowingCache"]


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
