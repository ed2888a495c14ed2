"""The models a benchmark runs, the paper's or twins of a user's, and what each must read.

V vocabulary, L layers, D hidden, K FFN inner size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from tolkit.errors import UsageError
from tolkit.model import Decoder, ModelConfig
from tolkit.model.presets import preset

__all__ = ["ARCHITECTURES", "Arithmetic", "arithmetic", "preset_config", "twin_config"]

ARCHITECTURES = ("dense", "flex-1", "flex-2", "flex-3", "memory")


@dataclass(frozen=True)
class Arithmetic:
    """What one token costs at least, batch 1.

    Attributes:
        weights_bytes: parameters in fast memory, the FFNs that tables stand for left out.
        weights_read_bytes: of them read for a token: all matrices once, of an untied embedding
            one row.
        cache_read_bytes: keys and values read when the context is full.
        flops: of matrix products and attention, two a multiplication and addition.
    """

    weights_bytes: int
    weights_read_bytes: int
    cache_read_bytes: int
    flops: int


def arithmetic(model: Decoder, context: int, cache_dtype: torch.dtype) -> Arithmetic:
    """Of a decoder (on the meta device too), `context` positions full, cached in `cache_dtype`."""
    config = model.config
    parameters = list(model.parameters())
    weights_bytes = sum(p.nbytes for p in parameters)
    matrices = sum(p.numel() for p in parameters if p.dim() > 1)
    read_bytes, embedding_VD = weights_bytes, model.embedding
    if not config.tie_word_embeddings:
        read_bytes -= embedding_VD.nbytes
        matrices -= embedding_VD.numel()
    row_bytes = config.hidden_size * embedding_VD.element_size()
    kept = context * config.num_key_value_heads * config.head_dim
    item_bytes = torch.empty(0, dtype=cache_dtype).element_size()
    attention = 4 * config.num_hidden_layers * context * config.hidden_size
    return Arithmetic(
        weights_bytes=weights_bytes,
        weights_read_bytes=read_bytes + row_bytes,
        cache_read_bytes=2 * config.num_hidden_layers * kept * item_bytes,
        flops=2 * matrices + attention,
    )


def preset_config(
    name: str,
    architecture: str,
    *,
    layers: int | None = None,
    vocab_size: int | None = None,
    positions: int | None = None,
) -> ModelConfig:
    """One of the paper's shapes, with other layers, vocabulary or most positions where given.

    Raises:
        UsageError: no such preset or architecture, or impossible numbers.
    """
    kind, beta = _parted(architecture)
    config = preset(name, kind, beta or 3, vocab_size)
    return _changed(config, layers, positions)


def twin_config(
    like: ModelConfig, architecture: str, *, positions: int | None = None
) -> ModelConfig:
    """`like` with another architecture: K is kept in sum, as in the paper's presets.

    Raises:
        UsageError: no such architecture.
    """
    kind, beta = _parted(architecture)
    inner = like.intermediate_size + like.memory_intermediate_size
    context = {"dense": inner, "memory": 0}.get(kind, round((beta or 0) * like.hidden_size / 3))
    config = dataclasses.replace(
        like,
        architecture=kind,  # type: ignore[arg-type]  # checked in _parted
        intermediate_size=context,
        memory_intermediate_size=0 if kind == "dense" else max(1, inner - context),
        context_mlp_type="swiglu",
    )
    return _changed(config, None, positions)


def _parted(architecture: str) -> tuple[str, int | None]:
    """``flex-2`` -> flex, 2."""
    if architecture not in ARCHITECTURES:
        raise UsageError(f"arch: expected {', '.join(ARCHITECTURES)}, got {architecture!r}")
    kind, _, beta = architecture.partition("-")
    return kind, int(beta) if beta else None


def _changed(config: ModelConfig, layers: int | None, positions: int | None) -> ModelConfig:
    return dataclasses.replace(
        config,
        num_hidden_layers=layers or config.num_hidden_layers,
        max_position_embeddings=max(positions or 0, config.max_position_embeddings),
    )
