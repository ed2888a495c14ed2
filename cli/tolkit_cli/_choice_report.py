"""What `tol drop-layers` says about a choice it measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tolkit_cli._output import Column, Output
from tolkit_cli._units import duration_text, percent_text

if TYPE_CHECKING:
    from tolkit.compress.search.choose import Choice, SetCost
    from tolkit.evaluate import Metric

__all__ = ["show_alone", "show_choice"]


def show_choice(out: Output, choice: Choice) -> None:
    """Conditions, each layer alone, the path of sets, and the chosen one."""
    windows = f"in {choice.n_windows:,} windows of {choice.window_length}"
    out.field("metrics", "tokens", choice.n_tokens, "text", f"{choice.n_tokens:,} tokens {windows}")
    out.record("metrics", windows=choice.n_windows, text_digest=choice.text_digest)
    against = "the bundle as it is" if choice.reference is None else choice.reference[:16]
    out.field("metrics", "reference", choice.reference or "as it is", "costs against", against)
    measured = f"{choice.evaluations} sets of layers in {duration_text(choice.elapsed_s)}"
    out.field("metrics", "evaluations", choice.evaluations, "measured", measured)
    out.record("metrics", search_s=round(choice.elapsed_s, 3))
    if choice.as_is is not None:
        _cost_field(out, "as_is", "before dropping", choice.as_is)
    out.text()
    show_alone(out, choice.alone)
    out.text()
    rows = [
        {"search": step.search, "compared": len(step.candidates), **_row(step.taken)}
        for step in choice.steps
        if step.taken is not None
    ]
    out.table("path", _columns(out, "search", "compared", "layers"), rows)
    out.text()
    steps = [
        {
            "search": step.search,
            "taken": None if step.taken is None else _facts(step.taken),
            "candidates": [_facts(cost) for cost in step.candidates],
        }
        for step in choice.steps
    ]
    out.record("metrics", steps=steps, found={k: _facts(v) for k, v in choice.found.items()})
    out.field("metrics", "chosen", list(choice.layers), "chosen layers", _set_text(choice.cost))
    _cost_field(out, "cost", "cost together", choice.cost)


def show_alone(out: Output, costs: Sequence[SetCost]) -> None:
    """What each layer alone costs."""
    out.table("alone", _columns(out, "layer", "into"), [_row(cost) for cost in costs])


def _set_text(cost: SetCost) -> str:
    """Layers with where their tables go: "4>3 7>8", or "4 7" where they are dropped."""
    return " ".join(
        str(layer) if to is None else f"{layer}>{to}" for layer, to in cost.into.items()
    )


def _cost_field(out: Output, key: str, title: str, cost: SetCost) -> None:
    """One cost: an object in JSON, a line elsewhere."""
    kl, change = _kl_text(cost.kl_nats), _change_text(cost.ppl_increase)
    low, high = cost.ppl_increase.interval
    reach = f"95 % interval {percent_text(low, signed=True)} to {percent_text(high, signed=True)}"
    out.record("metrics", **{key: _facts(cost)})
    out.text(f"{title:<20}  KL {kl} nats, perplexity {change} ({reach})")


def _facts(cost: SetCost) -> dict[str, Any]:
    """Raw numbers of one set."""
    kl, change = cost.kl_nats, cost.ppl_increase
    return {
        "layers": list(cost.layers),
        "into": list(cost.into.values()),
        "kl_mean_nats": kl.value,
        "kl_mean_nats_se": kl.se,
        "kl_mean_nats_interval": list(kl.interval),
        "ppl_increase": change.value,
        "ppl_increase_se": change.se,
        "ppl_increase_interval": list(change.interval),
    }


def _row(cost: SetCost) -> dict[str, Any]:
    """A set as a table row; `layer` and `into` are those of its first layer."""
    layer = cost.layers[0]
    return {
        **_facts(cost),
        "layers": _set_text(cost),
        "layer": layer,
        "into": cost.into[layer],
        "kl_text": _kl_text(cost.kl_nats),
        "ppl_text": _change_text(cost.ppl_increase),
    }


_TITLES = {"into": "folds into", "compared": "sets"}


def _columns(out: Output, *names: str) -> list[Column]:
    """Naming columns, then both costs; their errors inside for people, in columns elsewhere."""
    columns = [
        Column(name, _TITLES.get(name, name), right=name not in ("search", "layers"))
        for name in names
    ]
    costs = (("kl_mean_nats", "KL", "kl_text"), ("ppl_increase", "perplexity", "ppl_text"))
    for key, title, human in costs:
        columns.append(Column(key, title, human=human))
        if out.mode != "human":
            columns.append(Column(f"{key}_se", ""))
    return columns


def _kl_text(metric: Metric) -> str:
    return f"{metric.value:.5f} +-{metric.se:.5f}"


def _change_text(metric: Metric) -> str:
    return f"{percent_text(metric.value, signed=True)} +-{percent_text(metric.se)}"
