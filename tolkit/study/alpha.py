"""How much the tables contribute: alpha * FFN(X0) for falling alpha (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tolkit.evaluate.adjust import scaled
from tolkit.study.context import Context
from tolkit.study.fields import QUALITY, Field
from tolkit.study.figure import OURS, PAPER, panel, plain_ticks, with_errors
from tolkit.study.paper import TABLE_1
from tolkit.study.spec import numbers
from tolkit.study.store import Point
from tolkit.study.study import EvaluatedStudy, Opened, Variant

__all__ = ["AlphaStudy"]

_WIDE = 10
_ALPHAS = "1.0,0.9,0.8,0.7,0.6,0.5"


class AlphaStudy(EvaluatedStudy):
    """Table 1."""

    name = "alpha"
    title = "What the token tables contribute: alpha x FFN(X0)"
    about = "Every table row is multiplied by alpha; 1 is the model as it is, 0 has no tables."
    fields = (Field("alpha", "alpha", "exact"), *QUALITY)
    paper = TABLE_1
    shares_rows = True

    def variants(self, context: Context) -> list[Variant]:
        """One variant an alpha."""
        alphas = numbers(context.spec.values or _ALPHAS, low=0, high=10)
        return [_variant(context, alpha) for alpha in alphas]

    def draw(self, figure: Any, rows: Sequence[Point]) -> None:
        """Relative perplexity over alpha, the paper's beside."""
        ours = sorted(rows, key=lambda row: float(row["alpha"]))
        axes = panel(figure, "alpha (1 is the model as it is)", "perplexity relative to alpha 1")
        ratios = [
            {**row, "ratio": 1 + row["ppl_increase"]}
            for row in ours
            if row["ppl_increase"] is not None
        ]
        with_errors(axes, ratios, "alpha", "ratio", "ppl_increase_se", OURS, "this model")
        theirs = [(alpha, 1 + (TABLE_1.change(alpha) or 0.0)) for alpha in TABLE_1.ppl]
        axes.plot(*zip(*theirs, strict=True), **PAPER, label="the paper's 1B model, wikitext-2")
        if max((row["ratio"] for row in ratios), default=1) > _WIDE:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis)
        axes.invert_xaxis()
        axes.legend()


def _variant(context: Context, alpha: float) -> Variant:
    runnable = scaled(context.shared, alpha)
    return Variant(f"alpha {alpha:g}", {"alpha": alpha}, lambda stack: Opened(runnable))
