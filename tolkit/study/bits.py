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
    PLAIN,
    log_floor,
    named_points,
    panel,
    plain_ticks,
)
from tolkit.study.paper import TABLE_7
from tolkit.study.spec import words
from tolkit.study.store import Point
from tolkit.study.study import EvaluatedStudy, Variant

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
    takes = frozenset({"values", "keep", "threads"})
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
        """KL divergence over true bits a value."""
        axes = panel(
            figure,
            "bits per value, all side information counted",
            "KL divergence from the FFN path (nats a token)",
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        shown = log_floor(rows, "kl_mean_nats")
        styles = {"feedback": (CAREFUL, "with error feedback"), "plain": (PLAIN, "plain")}
        for mode, (style, label) in styles.items():
            chosen = [row for row in shown if row["mode"] == mode]
            named_points(axes, chosen, "bits_per_value", "kl_mean_nats", "codec", style, label)
        plain_ticks(axes.xaxis, sorted({float(row["bits_per_value"]) for row in rows}))
        axes.legend()
