"""Runnables and documents for evaluation tests, made from the pico model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _pico import pico_model, pico_tokenizer_files

from tolkit.data import Document, Tokenizer
from tolkit.evaluate import EvalResult, Runnable, Windows, evaluate
from tolkit.model import Decoder, FfnRows, RowSource
from tolkit.progress import SilentProgress

LETTERS = "the cat sat on a mat, and who are you to say it did not? Well then: 42 times 7.\n"


def pico_tokenizer() -> Tokenizer:
    files = pico_tokenizer_files()
    return Tokenizer(files["tokenizer.json"], files["tokenizer_config.json"], "pico")


def text_of(characters: int, seed: int = 0) -> str:
    """Repeatable nonsense made of the words of LETTERS."""
    generator = torch.Generator().manual_seed(seed)
    words = LETTERS.split(" ")
    picks = torch.randint(0, len(words), (characters,), generator=generator).tolist()
    return " ".join(words[i] for i in picks)[:characters]


def documents_of(*sizes: int) -> list[Document]:
    return [Document(f"doc{i}", text_of(size, seed=i)) for i, size in enumerate(sizes)]


@dataclass
class FakeRunnable:
    """What a loaded checkpoint or bundle looks like to the evaluation."""

    model: Decoder
    rows: RowSource | None
    tokenizer: Tokenizer
    kind: str = "checkpoint"
    identity: str = "0" * 64
    table_bytes: int | None = None
    bits_per_value: float | None = None
    adjust: None = None


class NoisyRows:
    """The model's own rows plus noise that depends only on the token; `calls` counts fetches."""

    def __init__(self, model: Decoder, noise: float, *, dropped: Sequence[int] = ()) -> None:
        self.model, self.noise, self.dropped = model, noise, dropped
        self.calls = 0

    def fetch(self, ids_n: torch.Tensor) -> list[torch.Tensor | None]:
        self.calls += 1
        exact = FfnRows(self.model).fetch(ids_n)
        planes: list[torch.Tensor | None] = []
        for layer in range(self.model.num_layers):
            plane_nD = exact[layer]
            assert plane_nD is not None
            generator = torch.Generator().manual_seed(layer)
            error_VD = torch.randn(
                self.model.config.vocab_size, plane_nD.shape[1], generator=generator
            )
            noisy_nD = plane_nD + self.noise * error_VD[ids_n]
            planes.append(None if layer in self.dropped else noisy_nD)
        return planes


def pico_pair(noise: float = 0.05, **overrides: object) -> tuple[FakeRunnable, FakeRunnable]:
    """A reference and a candidate whose table rows are off by `noise`."""
    model, tokenizer = pico_model(**overrides), pico_tokenizer()
    reference = FakeRunnable(model, None, tokenizer)
    candidate = FakeRunnable(model, NoisyRows(model, noise), tokenizer, "bundle", "1" * 64)
    return reference, candidate


def run_evaluation(
    candidates: Sequence[Runnable], reference: Runnable | None, windows: Windows, **options: Any
) -> list[EvalResult]:
    """`evaluate` on the CPU, without progress unless `options` say otherwise."""
    settings: dict[str, Any] = {"device": "cpu", "progress": SilentProgress(), **options}
    return evaluate(candidates, reference, windows, **settings)
