"""How compressible each layer's table is: its singular values (paper, Figure 13).

V vocabulary, L layers, D hidden, N rows of a block. The singular values of a V x D table are the
roots of the eigenvalues of its D x D Gram matrix, products and sums in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tolkit.compress.gram import BLOCK_ROWS, GramAccumulator, top_basis
from tolkit.evaluate.runnable import full_float32
from tolkit.model import LayerFfn, checkpoint_tensors
from tolkit.parallel import block_pool
from tolkit.sources import CheckpointSource, TableSource, open_source
from tolkit.study.context import Context
from tolkit.study.fields import Field
from tolkit.study.figure import panel, per_cent_ticks, whole_ticks
from tolkit.study.paper import SPECTRUM
from tolkit.study.store import Point
from tolkit_formats.digests import json_digest

__all__ = ["SpectrumStudy", "rank_for"]

SHARES = (0.90, 0.95, 0.99)
VALUES = "singular_values"
_STYLES = (("#9ecae1", "o"), ("#4292c6", "s"), ("#08519c", "^"))


class SpectrumStudy:
    """Figure 13."""

    name = "spectrum"
    title = "Singular values of each layer's table"
    about = (
        "Singular values of every layer's V x D table (every token counted once, no mean taken "
        "off), and the rank that holds 90, 95 and 99 % of its energy, the sum of their squares."
    )
    fields = (
        Field("layer", "layer", "count"),
        Field("largest", "largest"),
        Field("frobenius_norm", "norm"),
        *(Field(f"rank_{round(100 * p)}", f"rank for {round(100 * p)} %", "count") for p in SHARES),
        *(Field(f"share_{round(100 * p)}", f"{round(100 * p)} %: r/D", "percent") for p in SHARES),
    )
    paper = SPECTRUM
    takes: frozenset[str] = frozenset()

    def fingerprint(self, context: Context) -> Mapping[str, Any]:
        """The tables alone: weights, or the bundle."""
        source = open_source(context.spec.model)
        return {
            "study": self.name,
            "model": source.identity or json_digest(dataclasses.asdict(source.sources())),
            "device": context.machine.device.type,
        }

    def keys(self, context: Context) -> list[str]:
        """Layers that have a table."""
        statuses = open_source(context.spec.model).statuses
        return [f"layer {i}" for i, status in enumerate(statuses) if status.status == "kept"]

    def measure(self, context: Context, keys: Sequence[str]) -> Iterator[Sequence[Point]]:
        """One layer at a time."""
        source = open_source(context.spec.model)
        with context.progress.task("spectrum", len(keys) * source.vocab_size, "rows") as task:
            for key in keys:
                layer = int(key.rpartition(" ")[2])
                task.note(key)
                energies_D = _energies(context, source, layer, task.advance)
                yield [{"key": key, **_facts(layer, energies_D)}]

    def appendix(self, rows: Sequence[Point]) -> Mapping[str, str]:
        """All singular values, a column a layer."""
        lines = [",".join(["index", *(f"layer_{row['layer']}" for row in rows)])]
        for i, values in enumerate(zip(*(row[VALUES] for row in rows), strict=True)):
            lines.append(",".join([str(i), *map(str, values)]))
        return {"values": "\n".join(lines) + "\n"}

    def notes(self, context: Context, rows: Sequence[Point]) -> Sequence[str]:
        """Nothing more."""
        return ()

    def draw(self, figure: Any, rows: Sequence[Point]) -> None:
        """Spectra over the index; ranks that hold most of the energy over the layer."""
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        left = panel(figure, "index / D", "singular value / largest", (1, 2, 1))
        colours = colormaps["viridis"]
        low, high = (int(of(row["layer"] for row in rows)) for of in (min, max))
        span = Normalize(low, max(high, low + 1))
        for row in rows:
            values = np.asarray(row[VALUES])
            shares = (np.arange(len(values)) + 1) / len(values)
            height = np.maximum(values / max(values[0], 1e-300), 1e-9)
            left.plot(shares, height, color=colours(float(span(row["layer"]))), linewidth=1.3)
        left.set_yscale("log")
        left.set_ylim(bottom=_floor(rows))
        figure.colorbar(ScalarMappable(span, colours), ax=left, label="layer")
        right = panel(figure, "layer", "rank needed / D", (1, 2, 2))
        for share, style in zip(SHARES, _STYLES, strict=True):
            percent = round(100 * share)
            heights = [row[f"share_{percent}"] for row in rows]
            layers = [row["layer"] for row in rows]
            right.plot(
                layers, heights, color=style[0], marker=style[1], label=f"{percent} % of energy"
            )
        right.set_ylim(0, 1)
        per_cent_ticks(right.yaxis)
        whole_ticks(right.xaxis)
        right.legend()


def rank_for(energies_D: np.ndarray[Any, np.dtype[np.float64]], share: float) -> int:
    """The smallest rank whose leading energies hold `share` of their sum; 1 of nothing."""
    held = np.cumsum(energies_D)
    return int(np.searchsorted(held, share * held[-1] * (1 - 1e-12))) + 1


def _facts(layer: int, energies_D: Tensor) -> dict[str, Any]:
    energies = energies_D.cpu().numpy()
    ranks = {f"rank_{round(100 * share)}": rank_for(energies, share) for share in SHARES}
    values = np.sqrt(energies)
    return {
        "layer": layer,
        "largest": float(values[0]),
        "frobenius_norm": float(np.sqrt(energies.sum())),
        **ranks,
        **{name.replace("rank", "share"): rank / len(values) for name, rank in ranks.items()},
        VALUES: values.tolist(),
    }


def _energies(
    context: Context, source: TableSource, layer: int, advance: Callable[[float], None]
) -> Tensor:
    """Squared singular values of one layer's table, falling: float64 [D]."""
    device = context.machine.device
    with block_pool(context.spec.threads) as pool, full_float32():
        executor = pool.executor if device.type == "cpu" else None
        gram = GramAccumulator(
            source.hidden_size, pool=executor, product_dtype=torch.float64, device=device
        )
        rows = _rows(source, layer, device)
        spans = _spans(source.vocab_size, 1 if executor is None else pool.threads)
        for group in spans:
            for rows_ND in pool.map(lambda span: rows(*span), group):
                gram.add(rows_ND.to(device))
            advance(group[-1][1] - group[0][0])
    return top_basis(gram.gram_DD().cpu(), 1).energies_D


def _spans(vocab_size: int, at_once: int) -> list[list[tuple[int, int]]]:
    firsts = range(0, vocab_size, BLOCK_ROWS)
    spans = [(first, min(first + BLOCK_ROWS, vocab_size)) for first in firsts]
    return [spans[i : i + at_once] for i in range(0, len(spans), at_once)]


def _rows(source: TableSource, layer: int, device: torch.device) -> Callable[[int, int], Tensor]:
    """Rows of one layer by number; a checkpoint's FFN runs on the device."""
    if not isinstance(source, CheckpointSource):
        return source.plane(layer)
    ffn = LayerFfn(checkpoint_tensors(source.path), layer, device=device)
    return lambda first, stop: ffn(torch.arange(first, stop))


def _floor(rows: Sequence[Point]) -> float:
    """Where the axis ends: a table that lacks full rank has values of nothing but rounding."""
    ends = [float(row[VALUES][-1] / max(row["largest"], 1e-300)) for row in rows]
    return max(min(ends) / 2, 1e-6)
