"""Lower ranks in every layer alike: the paper's Table 8.

V vocabulary, L layers, D hidden, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tolkit.compress.spec import parse_ranks
from tolkit.evaluate.adjust import layers_with_tables, require_tables
from tolkit.study.bundles import MODES, compressed
from tolkit.study.context import Context
from tolkit.study.fields import QUALITY, Field
from tolkit.study.figure import CAREFUL, PAPER, PLAIN, panel, per_cent_ticks, with_errors
from tolkit.study.paper import TABLE_8
from tolkit.study.spec import numbers
from tolkit.study.store import Point
from tolkit.study.study import TAKES, EvaluatedStudy, Variant

__all__ = ["RankStudy"]

_CUTS = "0,10,20,30,40,50"


class RankStudy(EvaluatedStudy):
    """Table 8."""

    name = "rank"
    title = "Lower rank in every layer"
    about = (
        "Each layer's table is cut to rank r = floor((1 - cut) x D) and stored in 16 bits, with "
        "error feedback over depth (and token counts where known) and plain. ToL params and saved "
        "count values as the paper does, V x r + r x D against V x D; size is what is stored."
    )
    fields = (
        Field("cut_percent", "cut %", "exact"),
        Field("rank", "r", "count"),
        Field("mode", "mode", "text"),
        Field("tol_params", "ToL params", "millions"),
        Field("saved", "saved", "percent"),
        Field("bytes", "size", "bytes"),
        Field("bits_per_value", "bits/value"),
        *QUALITY,
    )
    paper = TABLE_8
    takes = TAKES | {"keep"}
    at_once = len(MODES)

    def variants(self, context: Context) -> list[Variant]:
        """Two variants a cut."""
        require_tables(context.runnable)
        config = context.runnable.model.config
        V, D = config.vocab_size, config.hidden_size
        L = len(layers_with_tables(context.runnable))
        found = []
        for cut in numbers(context.spec.values or _CUTS, low=0, high=99.9):
            rank = parse_ranks(f"{100 - cut:g}%", 1, D)[0]
            values = V * D if rank == D else V * rank + rank * D
            facts = {
                "cut_percent": cut,
                "rank": rank,
                "tol_params": L * values,
                "saved": 1 - values / (V * D),
            }
            asked = None if rank == D else str(rank)
            found += [
                compressed(context, f"cut {cut:g} % {mode}", facts, mode, rank=asked, codec="f16")
                for mode in MODES
            ]
        return found

    def draw(self, figure: Any, rows: Sequence[Point]) -> None:
        """Change of perplexity over the cut, the paper's beside."""
        axes = panel(figure, "rank cut (% of D)", "change of perplexity")
        styles = {"feedback": (CAREFUL, "with error feedback"), "plain": (PLAIN, "plain")}
        for mode, (style, label) in styles.items():
            chosen = [row for row in rows if row["mode"] == mode]
            with_errors(
                axes, chosen, "cut_percent", "ppl_increase", "ppl_increase_se", style, label
            )
        theirs = [(cut, TABLE_8.change(cut) or 0.0) for cut in TABLE_8.ppl]
        axes.plot(*zip(*theirs, strict=True), **PAPER, label="the paper's 1B model, C4, plain")
        axes.axhline(0, color="#555555", linewidth=0.8)
        per_cent_ticks(axes.yaxis)
        axes.legend()
