"""What `tol generate` shows: text as it comes, results, figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tolkit_cli._output import Output
from tolkit_cli._units import bytes_text, count_text, percent_text

if TYPE_CHECKING:
    from tolkit.runtime import Generation, GenerationStatistics

__all__ = ["ReaderGoneError", "Shown", "note_statistics", "write_results"]

_EXCERPT = 60


class ReaderGoneError(Exception):
    """Nobody reads stdout any more, so nothing more need be generated."""


class Shown:
    """Texts on stdout: one prompt's while it is made, several one after the other.

    Plain output of several is a table: number, way of ending, tokens, and the text as a JSON
    string, so that each stays on its line.
    """

    def __init__(self, out: Output, prompts: int) -> None:
        self._out = out
        self._prompts = prompts
        if prompts > 1 and out.mode == "plain" and not out.quiet:
            out.stream("index\tfinish\tnew_tokens\ttext\n")

    def piece(self, index: int, text: str) -> None:
        """New text of a prompt."""
        if self._prompts == 1:
            self._out.stream(text)
        if self._out.stdout_closed:
            raise ReaderGoneError

    def result(self, found: Generation) -> None:
        """A prompt has ended."""
        if self._prompts == 1:
            self._out.stream("\n")
        elif self._out.mode == "plain":
            text = json.dumps(found.text, ensure_ascii=False)
            self._out.stream(f"{found.index}\t{found.finish}\t{len(found.ids)}\t{text}\n")
        else:
            self._out.stream(
                f"[{found.index + 1}/{self._prompts}] {_excerpt(found.prompt or '')}\n"
            )
            self._out.stream(f"{found.text}\n\n")


def _excerpt(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= _EXCERPT else line[: _EXCERPT - 3] + "..."


def write_results(out: Output, found: Sequence[Generation], path: Path) -> None:
    """One JSON object a line."""
    from tolkit_formats import files

    lines = [json.dumps(result.to_json(), ensure_ascii=False) + "\n" for result in found]
    files.write_atomic(path, "".join(lines).encode("utf-8", errors="replace"))
    out.field("outputs", "results", path)
    out.field("outputs", "prompts", len(found))
    out.quiet_value(path)


def note_statistics(out: Output, figures: GenerationStatistics) -> None:
    """The run's figures: in the JSON object, and for people on stderr."""
    out.record("metrics", **figures.to_json())
    speeds = [
        (figures.prompt_tokens, "prompt token", figures.prompt_tokens_per_s),
        (figures.new_tokens, "new token", figures.tokens_per_s),
    ]
    parts = [
        f"{count_text(count)} {unit}{'' if count == 1 else 's'}"
        + (f" ({count_text(rate)}/s)" if rate is not None else "")
        for count, unit, rate in speeds
    ]
    if figures.ms_per_token is not None:
        parts.append(f"{figures.ms_per_token:.2f} ms a step")
    out.note(", ".join(parts))
    if figures.bytes_read_per_token is not None:
        tables = [f"{bytes_text(figures.bytes_read_per_token)} of tables read a token"]
        if figures.hit_rate is not None:
            tables.append(f"{percent_text(figures.hit_rate, 1)} of rows in memory")
        out.note(", ".join(tables))
    memory = [f"{bytes_text(figures.weights_bytes)} of weights"]
    if figures.peak_anonymous_bytes is not None:
        memory.append(f"{bytes_text(figures.peak_anonymous_bytes)} of memory at most")
    if figures.peak_device_bytes is not None:
        memory.append(f"{bytes_text(figures.peak_device_bytes)} on the device")
    out.note(", ".join(memory))
