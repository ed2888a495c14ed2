"""Training runs in tests: without noise, and interrupted at a step or an I/O call."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tolkit.progress import SilentProgress
from tolkit.train import TrainReport, TrainSpec, train

WORDS = ["sun", "moon", "star", "sky", "the", "a", "of", "in", "rises", "falls", "blue", "night"]


def lines_of_words(count: int) -> str:
    """`count` lines of eight words; equal for equal counts."""
    generator = random.Random(0)
    return "".join(" ".join(generator.choices(WORDS, k=8)) + ".\n" for _ in range(count))


def quiet(spec: TrainSpec) -> TrainReport:
    return train(spec, SilentProgress())


class Interrupted(BaseException):
    pass


class Interrupting(SilentProgress):
    """Raises once `steps` steps are done, as a signal between two steps would."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    @contextmanager
    def task(self, label: str, total: float, unit: str) -> Iterator[Interrupting]:
        yield self

    def advance(self, amount: float) -> None:
        self.left -= int(amount)
        if self.left <= 0 and amount:
            raise Interrupted

    def note(self, text: str) -> None:
        pass


def kill_at(call: int) -> Callable[[str, str], None]:
    """A fault hook that ends the process's work at the `call`-th I/O call."""
    left = [call]

    def hook(operation: str, path: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted

    return hook
