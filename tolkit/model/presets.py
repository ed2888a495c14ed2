"""The paper's shapes (MemoryLLM Tables 4 and 5) and a tiny one for two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from tolkit.errors import UsageError
from tolkit.model.config import Architecture, ModelConfig

__all__ = ["PRESETS", "Shape", "preset"]

_ARCHITECTURES = ("dense", "memory", "flex")
_BETAS = (1, 2, 3)


@dataclass(frozen=True)
class Shape:
    """One scale of the paper: D, heads, L, K, and K of FFN-M at beta 1, 2, 3."""

    vocab_size: int
    hidden_size: int
    heads: int
    layers: int
    ffn_size: int
    memory_sizes: tuple[int, int, int]
    max_positions: int


_LLAMA3_VOCAB = 128_256

PRESETS = MappingProxyType(
    {
        "tiny": Shape(4096, 192, 6, 8, 512, (448, 384, 320), 256),
        "250m": Shape(_LLAMA3_VOCAB, 960, 16, 24, 2560, (2240, 1920, 1600), 2048),
        "750m": Shape(_LLAMA3_VOCAB, 1600, 16, 24, 4272, (3738, 3200, 2668), 2048),
        # The paper's table lists the 1B column against beta in the opposite order; its parameter
        # split per layer settles it: FFN-M shrinks as beta grows.
        "1b": Shape(_LLAMA3_VOCAB, 2048, 32, 24, 5464, (4778, 4096, 3418), 2048),
    }
)


def preset(
    name: str, arch: str, beta: int = 3, vocab_size: int | None = None, tie: bool = True
) -> ModelConfig:
    """Configuration of one of the paper's models.

    Args:
        name: tiny, 250m, 750m or 1b.
        arch: dense, memory or flex.
        beta: flex only: FFN-C holds about beta x D^2 parameters (1, 2 or 3), as a SwiGLU of
            inner size round(beta x D / 3).
        vocab_size: V; by default the preset's (Llama 3's 128,256; 4,096 for tiny).
        tie: whether the head shares the embedding matrix.

    Raises:
        UsageError: an unknown name, architecture or beta, or a V below 1.
    """
    shape = PRESETS.get(name)
    if shape is None:
        raise UsageError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    if arch not in _ARCHITECTURES:
        raise UsageError(f"arch: expected one of {', '.join(_ARCHITECTURES)}, got {arch!r}")
    if arch == "flex" and beta not in _BETAS:
        raise UsageError(f"beta: expected 1, 2 or 3, got {beta!r}")
    if vocab_size is not None and vocab_size < 1:
        raise UsageError(f"vocab_size: expected at least 1, got {vocab_size}")
    architecture: Architecture = arch  # type: ignore[assignment]  # checked above
    context_size = {"dense": shape.ffn_size, "memory": 0}.get(
        arch, round(beta * shape.hidden_size / 3)
    )
    memory_size = {"dense": 0, "memory": shape.ffn_size}.get(arch)
    return ModelConfig(
        architecture=architecture,
        vocab_size=shape.vocab_size if vocab_size is None else vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=context_size,
        memory_intermediate_size=(
            shape.memory_sizes[beta - 1] if memory_size is None else memory_size
        ),
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=tie,
    )
