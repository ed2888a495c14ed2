"""Presets and parameter counts against the paper's Tables 4 and 5."""

from __future__ import annotations

import pytest
import torch

from tolkit.errors import UsageError
from tolkit.model import Decoder, count_parameters, preset

# Active parameters in millions, truncated: dense, flex beta 3, 2, 1, memory; then the total.
PAPER = {
    "250m": (265, 154, 132, 110, 88, 265),
    "750m": (737, 430, 368, 307, 245, 737),
    "1b": (1208, 704, 604, 503, 402, 1208),
}
COLUMNS = [("dense", 3), ("flex", 3), ("flex", 2), ("flex", 1), ("memory", 3)]
CASES = [
    pytest.param(name, arch, beta, figures[column], figures[5], id=f"{name}-{arch}-{beta}")
    for name, figures in PAPER.items()
    for column, (arch, beta) in enumerate(COLUMNS)
]


@pytest.mark.parametrize(("name", "arch", "beta", "active_millions", "total_millions"), CASES)
@pytest.mark.parametrize("tie", [True, False])
def test_counts_are_the_papers(
    name: str, arch: str, beta: int, active_millions: int, total_millions: int, tie: bool
) -> None:
    config = preset(name, arch, beta, tie=tie)
    counts = count_parameters(config)
    assert counts.active // 10**6 == active_millions
    assert counts.total // 10**6 == total_millions
    assert counts.embedding == 128_256 * config.hidden_size
    assert counts.head == (0 if tie else counts.embedding)


@pytest.mark.parametrize("arch", ["dense", "memory", "flex"])
def test_counts_are_those_of_the_modules(arch: str) -> None:
    config = preset("tiny", arch, tie=False)
    whole = sum(p.numel() for p in Decoder(config).parameters())
    counts = count_parameters(config)
    assert counts.total + counts.embedding + counts.head == whole
    with torch.device("meta"):
        backbone = sum(p.numel() for p in Decoder(config, with_ffn=False).parameters())
    assert counts.active + counts.embedding + counts.head == backbone


@pytest.mark.parametrize(("beta", "context_millions", "memory_millions"), [
    (1, 4.194, 29.360), (2, 8.388, 25.165), (3, 12.582, 20.971),
])  # fmt: skip
def test_flex_splits_one_ffn_in_two(
    beta: int, context_millions: float, memory_millions: float
) -> None:
    """Per layer at 1B; K is rounded, so a few thousand parameters differ from beta x D^2."""
    config = preset("1b", "flex", beta)
    width = 3 * config.hidden_size
    assert width * config.intermediate_size == pytest.approx(context_millions * 1e6, rel=1e-3)
    assert width * config.memory_intermediate_size == pytest.approx(memory_millions * 1e6, rel=2e-3)


def test_the_tiny_preset() -> None:
    config = preset("tiny", "memory")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (4096, 192, 8)
    assert preset("tiny", "memory", vocab_size=300).vocab_size == 300
    sizes = [
        preset("tiny", "flex", beta).memory_intermediate_size
        + preset("tiny", "flex", beta).intermediate_size
        for beta in (1, 2, 3)
    ]
    assert sizes == [512] * 3


@pytest.mark.parametrize(("arguments", "problem"), [
    (("2b", "memory"), "preset: expected one of tiny, 250m, 750m, 1b, got '2b'"),
    (("tiny", "moe"), "arch: expected one of dense, memory, flex, got 'moe'"),
    (("tiny", "flex", 4), "beta: expected 1, 2 or 3, got 4"),
    (("tiny", "flex", 3, 0), "vocab_size: expected at least 1, got 0"),
])  # fmt: skip
def test_unknown_presets(arguments: tuple[object, ...], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        preset(*arguments)  # type: ignore[arg-type]
    assert caught.value.message == problem
