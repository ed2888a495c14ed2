"""A text and a reference to judge bundles by, and the records that gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tolkit.errors import DataError, NonFiniteError
from tolkit.evaluate.baseline import planned_setting
from tolkit.evaluate.evaluate import evaluate
from tolkit.evaluate.quality import quality_record
from tolkit.evaluate.windows import Windows
from tolkit.progress import Progress
from tolkit.quality_log import Setting
from tolkit.tables import Runnable, load_runnable

__all__ = ["Judge"]


@dataclass(frozen=True)
class Judge:
    """What bundles are measured on, and against.

    Attributes:
        reference: what divergence and change of perplexity compare with; None measures
            perplexity only.
        windows: from `windows_of`, two or more.
        dtype, device, batch_tokens: as `evaluate` takes them.
    """

    reference: Runnable | None
    windows: Windows
    dtype: str = "float32"
    device: str = "auto"
    batch_tokens: int | None = None

    @property
    def setting(self) -> Setting:
        """What an earlier record must share to say the same."""
        identity = None if self.reference is None else self.reference.identity
        return planned_setting(self.windows, identity)

    def require_two_windows(self) -> None:
        """DataError for a text whose measurements have no error."""
        if len(self.windows) < 2:
            raise DataError(
                "text: one window, expected at least 2: its error cannot be known",
                hint="give more --data, or a smaller --window",
            )

    def records(self, paths: Sequence[Path], progress: Progress) -> list[dict[str, Any]]:
        """The record of each bundle (`quality_record`), all in one pass over the text.

        Raises:
            NonFiniteError: NaN or infinite logits.      MismatchError: another tokenizer.
            ResourceError: out of memory.
        """
        results = evaluate(
            [load_runnable(path) for path in paths],
            self.reference,
            self.windows,
            dtype=self.dtype,
            device=self.device,
            batch_tokens=self.batch_tokens,
            progress=progress,
            labels=[str(path) for path in paths],
        )
        for path, result in zip(paths, results, strict=True):
            if result.problems:
                raise NonFiniteError(result.problems[0], hint=f"run: tol verify {path}")
        return [quality_record(result) for result in results]
