"""What a generation gave and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tolkit.runtime.statistics import TableStatistics

__all__ = ["Generation", "GenerationStatistics"]


@dataclass(frozen=True)
class Generation:
    """One continued prompt.

    Attributes:
        index: the prompt's number in the call.
        prompt: as given; None where ids were.
        prompt_ids: what the model read.
        ids: new tokens, the end-of-text token included where it came.
        text: of the new tokens, without that token and without a stop text and what follows it.
        finish: ``eos``, ``stop`` (a stop text), ``length`` (max_new_tokens) or ``context`` (full).
    """

    index: int
    prompt: str | None
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish: str

    def to_json(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {
            "index": self.index,
            "prompt": self.prompt,
            "text": self.text,
            "finish": self.finish,
            "prompt_tokens": len(self.prompt_ids),
            "new_tokens": len(self.ids),
            "ids": list(self.ids),
        }


@dataclass(frozen=True)
class GenerationStatistics:
    """One call's figures so far.

    Attributes:
        prompts: how many were begun.
        prompt_tokens: ids of theirs read, in `prompt_s` seconds.
        new_tokens: chosen, the first of each prompt out of the prompt's own pass.
        steps: passes of one token a row, in `decode_s` seconds with the choosing.
        tables: what the source of rows counted; None without one that counts.
        weights_bytes: the model's weights in memory.
        peak_anonymous_bytes: memory of the process that is no file's, the most seen at steps.
        peak_device_bytes: torch's memory on the GPU.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    prompt_s: float = 0.0
    new_tokens: int = 0
    steps: int = 0
    decode_s: float = 0.0
    tables: TableStatistics | None = None
    weights_bytes: int = 0
    peak_anonymous_bytes: int | None = None
    peak_device_bytes: int | None = None

    @property
    def prompt_tokens_per_s(self) -> float | None:
        """Reading speed."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s else None

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens of all rows a second, those of the prompts' own passes left out."""
        return (self.new_tokens - self.prompts) / self.decode_s if self.steps else None

    @property
    def ms_per_token(self) -> float | None:
        """Milliseconds a step takes: what one row waits for its next token."""
        return 1e3 * self.decode_s / self.steps if self.steps else None

    @property
    def bytes_read_per_token(self) -> float | None:
        """Bytes of tables read for each token that went through the model."""
        passed = self.prompt_tokens + self.new_tokens - self.prompts
        return None if self.tables is None or not passed else self.tables.bytes_read / passed

    @property
    def hit_rate(self) -> float | None:
        """Share of the distinct rows of each pass that were not read for it, or just before it."""
        if self.tables is None or not self.tables.rows_distinct:
            return None
        return max(0.0, 1 - self.tables.rows_read / self.tables.rows_distinct)

    def to_json(self) -> dict[str, Any]:
        """All figures, those worked out too."""
        worked_out = (
            *("prompt_tokens_per_s", "tokens_per_s", "ms_per_token"),
            *("bytes_read_per_token", "hit_rate"),
        )
        facts = {**vars(self), **{name: getattr(self, name) for name in worked_out}}
        facts["tables"] = None if self.tables is None else vars(self.tables)
        return facts
