"""Which layers matter: each layer's table left out, alone (paper, Figures 4 and 12)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

from tolkit.compress.fold import drop
from tolkit.compress.spec import parse_layers
from tolkit.evaluate.adjust import layers_with_tables, without_ffn, without_layers
from tolkit.study.context import Context
from tolkit.study.fields import QUALITY, Field
from tolkit.study.figure import CAREFUL, PLAIN, panel, per_cent_ticks, whole_ticks, with_errors
from tolkit.study.paper import DROP
from tolkit.study.store import Point
from tolkit.study.study import EvaluatedStudy, Opened, Variant
from tolkit_formats.manifest import LayerStatus

__all__ = ["DropStudy"]

_WIDE = 50
"""How often the median change the largest may be before the axis becomes logarithmic."""


class DropStudy(EvaluatedStudy):
    """Figures 4 and 12, and what folding makes of them."""

    name = "drop"
    title = "Leaving out one layer's FFN"
    about = (
        "One layer at a time is left out: dropped as in the paper, or folded, its table added to "
        "that of the next layer (the last layer's to the one before). A dense model's FFNs can "
        "only be dropped."
    )
    fields = (
        Field("layer", "layer", "count"),
        Field("mode", "mode", "text"),
        Field("into", "into", "count"),
        *QUALITY,
    )
    paper = DROP
    shares_rows = True

    def variants(self, context: Context) -> list[Variant]:
        """Two variants a layer, one for a dense model."""
        config = context.runnable.model.config
        count, asked = config.num_hidden_layers, context.spec.values
        chosen = None if asked is None else parse_layers(asked, count, "values")
        if not config.has_tables:
            return [_dense(context, layer) for layer in chosen or range(count)]
        kept = layers_with_tables(context.runnable)
        layers = chosen or tuple(kept)
        if len(kept) == 1 and layers == tuple(kept):
            return [_table(context, kept[0], None)]
        whole = [LayerStatus("kept" if i in kept else "dropped") for i in range(count)]
        into = [drop(whole, [layer], fold=True, option="values")[layer].into for layer in layers]
        receivers = zip(layers, into, strict=True)
        return [_table(context, layer, to) for layer, into_ in receivers for to in (None, into_)]

    def draw(self, figure: Any, rows: Sequence[Point]) -> None:
        """Change of perplexity over the layer left out."""
        axes = panel(figure, "layer left out", "change of perplexity")
        changes = [abs(row["ppl_increase"]) for row in rows if row["ppl_increase"] is not None]
        middle = median(changes) if changes else 0.0
        if middle and max(changes) > _WIDE * middle:
            axes.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(2 * middle)))
        for mode, style in (("dropped", PLAIN), ("folded", CAREFUL)):
            chosen = [row for row in rows if row["mode"] == mode]
            if chosen:
                with_errors(axes, chosen, "layer", "ppl_increase", "ppl_increase_se", style, mode)
        axes.axhline(0, color="#555555", linewidth=0.8)
        per_cent_ticks(axes.yaxis)
        whole_ticks(axes.xaxis)
        axes.legend()


def _table(context: Context, layer: int, into: int | None) -> Variant:
    mode = "dropped" if into is None else "folded"

    def open_(stack: ExitStack) -> Opened:
        return Opened(without_layers(context.shared, {layer: into}))

    return Variant(f"layer {layer} {mode}", {"layer": layer, "mode": mode, "into": into}, open_)


def _dense(context: Context, layer: int) -> Variant:
    def open_(stack: ExitStack) -> Opened:
        return Opened(without_ffn(context.runnable, layer))

    facts = {"layer": layer, "mode": "dropped", "into": None}
    return Variant(f"layer {layer} dropped", facts, open_)
