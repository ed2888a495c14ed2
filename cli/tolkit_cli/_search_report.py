"""What commands say about bundles they measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tolkit_cli._output import Column, Output
from tolkit_cli._units import bytes_text, duration_text, number_text, percent_text

if TYPE_CHECKING:
    from tolkit.compress.search.drop_auto import Folded
    from tolkit.compress.search.smallest import Found
    from tolkit.evaluate.judge import Judge
    from tolkit.quality_log import RecordedMetric

__all__ = ["metric_columns", "metric_facts", "show_folded", "show_found", "show_text"]


def show_text(out: Output, judge: Judge) -> None:
    """What was measured on."""
    windows = judge.windows
    shape = f"in {len(windows):,} windows of {windows.length}"
    out.field("metrics", "tokens", windows.n_tokens, "text", f"{windows.n_tokens:,} tokens {shape}")
    setting = judge.setting
    out.record("metrics", text_digest=setting.text_digest, reference=setting.reference)


def show_found(out: Output, found: Found) -> None:
    """Every size that was tried, and the chosen one."""
    rows = [
        {
            "budget_bytes": point.budget_bytes,
            "bits_per_value": point.bits_per_value,
            "bytes": point.table_bytes,
            **metric_facts(
                {
                    "kl_mean_nats": point.kl_nats,
                    "ppl_increase": point.ppl_increase,
                    "ppl_token": point.ppl_token,
                }
            ),
            "holds": point.holds,
            "reused": point.reused,
        }
        for point in found.points
    ]
    measured = f"{found.evaluations} bundles in {duration_text(found.elapsed_s)}"
    out.field("metrics", "evaluations", found.evaluations, "measured", measured)
    out.record("metrics", search_s=round(found.elapsed_s, 3))
    bound = {"metric": found.bound.metric, "limit": found.bound.limit}
    chosen = {"budget_bytes": found.chosen.budget_bytes, "bytes": found.chosen.table_bytes}
    out.record("metrics", bound=bound, chosen=chosen)
    out.text()
    columns = [
        Column("bits_per_value", "bits/value", lambda value: f"{value:.4f}"),
        Column("bytes", "tables", bytes_text),
        *metric_columns(out),
        Column("holds", f"within {found.bound.said()}", _yes),
        Column("reused", "known before", _yes),
    ]
    if out.mode != "human":
        columns.insert(0, Column("budget_bytes", ""))
    out.table("tried", columns, rows, leading=1)
    out.text()


def show_folded(out: Output, found: Folded) -> None:
    """Every number of folded layers that was tried, and the chosen one."""
    rows = []
    for trial in found.trials:
        pairs = zip(trial.layers, trial.into, strict=True)
        rows.append(
            {
                "folded": len(trial.layers),
                "layers": " ".join(f"{layer}>{to}" for layer, to in pairs) or "none",
                "bytes": trial.table_bytes,
                **metric_facts(
                    {
                        "kl_mean_nats": trial.kl_nats,
                        "ppl_increase": trial.ppl_increase,
                        "ppl_token": trial.ppl_token,
                    }
                ),
                "reused": trial.reused,
            }
        )
    out.record("metrics", folded=list(found.chosen.layers), search_s=round(found.elapsed_s, 3))
    out.text()
    columns = [
        Column("folded", "folded"),
        Column("layers", "layers", right=False),
        Column("bytes", "tables", bytes_text),
        *metric_columns(out),
    ]
    out.table("tried", columns, rows)
    out.text()


_NAMES = (("kl_mean_nats", "KL"), ("ppl_increase", "perplexity"), ("ppl_token", "token ppl"))


def metric_columns(out: Output) -> list[Column]:
    """KL, change of perplexity and perplexity; errors inside for people, in columns elsewhere."""
    columns = []
    for key, title in _NAMES:
        columns.append(Column(key, title, human=f"{key}_text"))
        if out.mode != "human" and key != "ppl_token":
            columns += [Column(f"{key}_se", ""), Column(f"{key}_high", "")]
    return columns


def metric_facts(metrics: Mapping[str, RecordedMetric]) -> dict[str, Any]:
    """Values, errors, upper ends and texts of those there are, for `metric_columns`."""
    facts: dict[str, Any] = {}
    for key, _ in _NAMES:
        metric = metrics.get(key)
        if metric is None:
            facts |= {key: None, f"{key}_text": "-"}
            continue
        facts |= {key: metric.value, f"{key}_se": metric.se, f"{key}_high": metric.high}
        if key == "ppl_increase":
            text = f"{percent_text(metric.value, signed=True)} +-{percent_text(metric.se)}"
        elif key == "ppl_token":
            text = f"{metric.value:.4g}"
        else:
            text = f"{number_text(metric.value)} +-{number_text(metric.se)}"
        facts[f"{key}_text"] = text
    return facts


def _yes(value: bool) -> str:
    return "yes" if value else "no"
