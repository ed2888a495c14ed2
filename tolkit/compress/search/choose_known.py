"""Costs of leaving out layers, kept in a file of measurements and taken from one.

L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tolkit.compress.search.choose_measure import Meter, SetCost
from tolkit.compress.search.choose_search import sets_of_one
from tolkit.errors import DataError
from tolkit.evaluate.forward import Machine
from tolkit.evaluate.judge import Judge
from tolkit.evaluate.result import Metric
from tolkit.measured import LayerCosts, Measured
from tolkit.progress import Progress
from tolkit.quality_log import Setting
from tolkit.tables import Runnable

__all__ = ["known_costs", "layer_costs", "measure_layers"]


def measure_layers(
    model: Runnable, judge: Judge, *, fold: bool = True, progress: Progress
) -> list[SetCost]:
    """What leaving out each layer alone costs, its table folded to either side.

    Cost: about a forward pass a layer and side.

    Raises:
        UsageError: a dense model.      DataError: text of fewer than two windows.
        MismatchError, NonFiniteError, ResourceError.
    """
    meter = Meter(
        model,
        _other(model, judge),
        judge.windows,
        fold=fold,
        machine=Machine(judge.device, judge.dtype, judge.batch_tokens),
        progress=progress,
    )
    return meter.costs(sets_of_one(meter.kept, fold=fold), "each layer alone")


def layer_costs(
    costs: Iterable[SetCost], model: Runnable, judge: Judge, *, fold: bool = True
) -> LayerCosts:
    """As an entry of a file of measurements."""
    entries = tuple(
        {
            "layers": list(cost.into),
            "into": list(cost.into.values()),
            "kl_nats": _metric_json(cost.kl_nats),
            "ppl_increase": _metric_json(cost.ppl_increase),
        }
        for cost in costs
    )
    return LayerCosts(model.identity, _setting(model, judge), fold, entries)


def known_costs(
    measured: Measured, model: Runnable, judge: Judge, *, fold: bool = True
) -> list[SetCost]:
    """The entries of this model, text and reference; none where they differ in anything.

    Raises:
        DataError: an entry is incomplete.
    """
    setting = _setting(model, judge)
    found: list[SetCost] = []
    for entry in measured.layers:
        if entry.model == model.identity and entry.setting == setting and entry.fold == fold:
            found += [_cost(cost) for cost in entry.costs]
    return found


def _other(model: Runnable, judge: Judge) -> Runnable | None:
    """The reference where it is not the model itself."""
    reference = judge.reference
    return None if reference is None or reference.identity == model.identity else reference


def _setting(model: Runnable, judge: Judge) -> Setting:
    setting = judge.setting
    if setting.reference is not None:
        return setting
    return Setting(**{**vars(setting), "reference": model.identity})


def _metric_json(metric: Metric) -> dict[str, float | int]:
    low, high = metric.interval
    return {"value": metric.value, "se": metric.se, "n": metric.n, "low": low, "high": high}


def _cost(entry: Mapping[str, Any]) -> SetCost:
    try:
        into = dict(zip(entry["layers"], entry["into"], strict=True))
        kl, change = (Metric(**entry[name]) for name in ("kl_nats", "ppl_increase"))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"measured: a cost of layers is incomplete: {error}") from error
    return SetCost(into, kl, change)
