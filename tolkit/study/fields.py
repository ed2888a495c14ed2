"""The columns of a study's table: what they are called and how their values read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["QUALITY", "Field", "cell_text", "se_key"]

Kind = Literal[
    "text", "count", "exact", "number", "small", "percent", "change", "bytes", "millions"
]


@dataclass(frozen=True)
class Field:
    """One column.

    key: of the point; with `with_se`, ``<key>_se`` is its standard error.
    title: with the unit where there is one.
    kind: how values read: "exact" as given, "number" with four significant figures or more,
        "small" with three; "percent" and "change" (signed) are ratios, "millions" counts.
    """

    key: str
    title: str
    kind: Kind = "number"
    with_se: bool = False


QUALITY = (
    Field("ppl_token", "perplexity", "number", with_se=True),
    Field("ppl_increase", "change", "change", with_se=True),
    Field("kl_mean_nats", "KL nats", "small", with_se=True),
    Field("top1_agreement", "top-1", "percent", with_se=True),
)
"""What every evaluated study says of a point, against the model as it is."""


def se_key(field: Field) -> str:
    """Where the standard error of a field is."""
    return f"{field.key}_se"


def cell_text(field: Field, row: Mapping[str, Any], key: str | None = None) -> str:
    """A value of `row` as people read it; "-" where there is none.

    Args:
        key: another key of the row, such as the standard error's; by default the field's.
    """
    value = row.get(field.key if key is None else key)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    error = key is not None
    match field.kind:
        case "text":
            return str(value)
        case "count":
            return f"{value:,}"
        case "exact":
            return f"{value:g}"
        case "millions":
            return f"{value / 1e6:,.2f}M"
        case "bytes":
            return _bytes_text(value)
        case "small":
            return "0" if value == 0 else f"{value:.1e}" if error else f"{value:.3g}"
        case "percent":
            return f"{100 * value:.2f} %"
        case "change":
            text = f"{100 * value:.3f}"
            plus = "+" if value > 0 and float(text) and not error else ""
            return f"{plus}{'0.000' if float(text) == 0 else text} %"
    return f"{value:.2f}" if abs(value) >= 10 or error else f"{value:.4g}"


def _bytes_text(size_bytes: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.2f} {letter}B"
    return f"{size_bytes:.0f} B"
