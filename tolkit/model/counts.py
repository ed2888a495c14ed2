"""How many parameters a model has, the way the paper counts (Tables 4 and 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tolkit.model.config import ModelConfig
from tolkit.model.files import expected_shapes

__all__ = ["ParameterCounts", "count_parameters"]


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of values.

    Attributes:
        active: blocks and final norm without the token FFNs and their norms: what stays on the
            device when rows come from a table.
        total: blocks and final norm, everything.
        embedding: the V x D embedding.
        head: the V x D head; 0 when tied.
    """

    active: int
    total: int
    embedding: int
    head: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts of one configuration; nothing is allocated."""
    sizes = {name: math.prod(shape) for name, shape in expected_shapes(config).items()}
    embedding = sizes.pop("model.embed_tokens.weight")
    head = sizes.pop("lm_head.weight", 0)
    memory = sum(size for name, size in sizes.items() if ".memory_" in name)
    total = sum(sizes.values())
    return ParameterCounts(total - memory, total, embedding, head)
