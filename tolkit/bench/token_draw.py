"""Token ids for benchmarks, drawn as text would use them. V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tolkit_formats.reader import Bundle

__all__ = ["known_order", "zipf_ids"]


def zipf_ids(vocab_size: int, count: int, seed: int, order_V: Tensor | None = None) -> list[int]:
    """Token ids that fall off by Zipf's law; equal for equal seeds.

    Args:
        order_V: all ids, the most frequent first; None spreads them over the vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
    weights_V = 1.0 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    cumulated_V = torch.cumsum(weights_V, 0)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64) * cumulated_V[-1]
    ranks = torch.searchsorted(cumulated_V, drawn).clamp_(max=vocab_size - 1)
    if order_V is None:
        order_V = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(7))
    return [int(i) for i in order_V[ranks]]


def known_order(bundles: Sequence[Bundle | None]) -> Tensor | None:
    """Ids by falling count, int64 [V], of the first bundle that has counts."""
    for bundle in bundles:
        counts_V = None if bundle is None else bundle.token_counts()
        if counts_V is not None:
            return torch.from_numpy(np.argsort(-counts_V.astype(np.float64), kind="stable"))
    return None
