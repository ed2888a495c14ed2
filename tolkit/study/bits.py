"""Fewer bits a value: the paper's Table 7, with every codec of this toolchain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tolkit.compress.spec import CODEC_NAMES
from tolkit.errors import UsageError
from tolkit.evaluate.adjust import require_tables
from tolkit.study.bundles import MODES, compressed
from tolkit.study.context import Context
from tolkit.study.fields import QUALITY, Field
from tolkit.study.figure import (
    CAREFUL,
    PAPER,
    PLAIN,
    log_floor,
    panel,
    per_cent_ticks,
    with_errors,
)
from tolkit.study.paper import TABLE_7
from tolkit.study.spec import words
from tolkit.study.store import Point
from tolkit.study.study import TAKES, EvaluatedStudy, Variant

__all__ = ["BitsStudy"]

_CODECS = ("f16", *CODEC_NAMES)
_BITS = {"f16": 16, "bf16": 16, "int8": 8}


class BitsStudy(EvaluatedStudy):
    """Table 7."""

    name = "bits"
    title = "Fewer bits a value"
    about = (
        "The tables are stored in each codec, with error feedback over depth and plain. Bits are "
        "those of the codes; bits/value counts everything stored, scales and checksums too."
    )
    fields = (
        Field("bits", "bits", "count"),
        Field("codec", "codec", "text"),
        Field("mode", "mode", "text"),
        Field("bytes", "size", "bytes"),
        Field("bits_per_value", "bits/value"),
        *QUALITY,
    )
    paper = TABLE_7
    takes = TAKES | {"keep"}
    at_once = len(MODES)

    def variants(self, context: Context) -> list[Variant]:
        """Two variants a codec."""
        require_tables(context.runnable)
        codecs = words(context.spec.values) if context.spec.values else _CODECS
        known = (*_CODECS, "bf16")
        for codec in codecs:
            if codec not in known:
                raise UsageError(f"values: {codec!r} is no codec, expected {', '.join(known)}")
        return [
            compressed(
                context,
                f"{codec} {mode}",
                {"bits": _BITS.get(codec, 4), "codec": codec},
                mode,
                codec=codec,
            )
            for codec in codecs
            for mode in MODES
        ]

    def draw(self, figure: Any, rows: Sequence[Point]) -> None:
        """KL divergence, and change of perplexity with the paper's beside, for each codec."""
        codecs = list(dict.fromkeys(row["codec"] for row in rows))
        placed = [{**row, "place": codecs.index(row["codec"])} for row in rows]
        left = panel(figure, "", "KL divergence (nats a token)", (1, 2, 1))
        right = panel(figure, "", "change of perplexity", (1, 2, 2))
        left.set_yscale("log")
        styles = {"feedback": (CAREFUL, "with error feedback"), "plain": (PLAIN, "plain")}
        for mode, (style, label) in styles.items():
            chosen = [row for row in placed if row["mode"] == mode]
            points = {**style, "linestyle": "none"}
            shown = log_floor(chosen, "kl_mean_nats")
            with_errors(left, shown, "place", "kl_mean_nats", "kl_mean_nats_se", points, label)
            with_errors(right, chosen, "place", "ppl_increase", "ppl_increase_se", points, label)
        theirs = {row["place"]: TABLE_7.change(row["bits"]) for row in placed}
        crosses = {**PAPER, "linestyle": "none"}
        right.plot(*zip(*theirs.items(), strict=True), **crosses, label="the paper's 1B model")
        sizes = {row["codec"]: f"{row['codec']}\n{row['bits_per_value']:.2f}" for row in rows}
        for axes in (left, right):
            axes.set_xticks(range(len(codecs)), [sizes[codec] for codec in codecs])
            axes.set_xlim(-0.5, len(codecs) - 0.5)
            axes.set_xlabel("codec, bits/value with all side information")
        per_cent_ticks(right.yaxis)
        right.axhline(0, color="#555555", linewidth=0.8)
        left.legend(*right.get_legend_handles_labels(), loc="lower right")
