"""A dense model pruned to the active size of memory models, beside them (paper, Figure 11)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tolkit.data import read_documents
from tolkit.data.limit import limited
from tolkit.errors import MismatchError, UsageError
from tolkit.evaluate import Windows, windows_of
from tolkit.model import count_parameters
from tolkit.study.context import Context
from tolkit.study.fields import QUALITY, Field
from tolkit.study.figure import COLOURS, panel, plain_ticks, with_errors
from tolkit.study.paper import PRUNING
from tolkit.study.prune import prune, sparsity_for
from tolkit.study.pruning_methods import METHODS, NEEDS_TEXT
from tolkit.study.spec import words
from tolkit.study.store import Point
from tolkit.study.study import TAKES, EvaluatedStudy, Opened, Variant
from tolkit.tables import Runnable

__all__ = ["PruningStudy"]

_UNPRUNED = "none"
_STYLES: Mapping[str, Any] = {
    "magnitude": {"color": COLOURS[1], "marker": "s"},
    "wanda": {"color": COLOURS[2], "marker": "^", "linestyle": "--"},
    "sparsegpt": {"color": COLOURS[3], "marker": "D"},
}
_LOOKS: Sequence[Mapping[str, Any]] = (
    {"color": COLOURS[5], "marker": "o", "markersize": 9},
    {"color": COLOURS[0], "marker": "*", "markersize": 13},
    {"color": COLOURS[0], "marker": "P", "markersize": 10},
    {"color": COLOURS[0], "marker": "X", "markersize": 10},
)


@dataclass(frozen=True)
class _Target:
    """A model to be as small as: its name in the table, and its active block parameters."""

    name: str
    runnable: Runnable
    active: int


class PruningStudy(EvaluatedStudy):
    """Figure 11."""

    name = "pruning"
    title = "A dense model pruned to the active size of memory models"
    about = (
        "The dense model loses the same share of every block projection until as many block "
        "parameters remain as are active in the other model (its blocks without token FFNs); the "
        "other model itself stands beside, method none. Changes and KL are against the dense model."
    )
    fields = (
        Field("model", "model", "text"),
        Field("method", "pruned by", "text"),
        Field("target", "to size of", "text"),
        Field("active_params", "active", "millions"),
        Field("sparsity", "sparsity", "percent"),
        *QUALITY,
    )
    paper = PRUNING
    takes = TAKES | {"against", "calibration", "calibration_windows"}
    at_once = 2

    def fingerprint(self, context: Context) -> Mapping[str, Any]:
        """See Study; the calibration text too."""
        found = {**super().fingerprint(context)}
        if _methods(context) & NEEDS_TEXT:
            found["calibration"] = _calibration(context).text_digest
            found["calibration_windows"] = context.spec.calibration_windows
        return found

    def variants(self, context: Context) -> list[Variant]:
        """For each target: itself, then the dense model pruned in every way."""
        dense = context.runnable
        if dense.model.config.has_tables:
            raise UsageError(
                f"{dense.path}: has token tables, the model to prune is a dense one",
                hint="give the dense checkpoint, and this one with --against",
            )
        methods = [name for name in METHODS if name in _methods(context)]
        if not context.spec.against:
            raise UsageError(
                "against: names no checkpoint to be as small as", hint="add --against CKPT"
            )
        total = count_parameters(dense.model.config).total
        found = [_as_is(context, dense, "dense", total)]
        for target in _targets(context):
            label = f"{target.name} ({target.runnable.identity[:8]})"
            found.append(_as_is(context, target.runnable, label, target.active, target.name))
            sparsity = sparsity_for(dense.model, total, target.active)
            for method in methods:
                facts: dict[str, Any] = {
                    "model": "dense",
                    "method": method,
                    "active_params": target.active,
                    "sparsity": sparsity,
                    "target": target.name,
                }
                key = f"dense to {label} {method}"
                found.append(Variant(key, facts, _pruner(context, method, sparsity)))
        return found

    def draw(self, figure: Any, rows: Sequence[Point]) -> None:
        """Perplexity over active parameters, relative to the dense model on the same tokens."""
        axes = panel(figure, "active block parameters (millions)", "perplexity relative to dense")
        shown = [
            {**row, "millions": row["active_params"] / 1e6, "ratio": 1 + row["ppl_increase"]}
            for row in rows
            if row["ppl_increase"] is not None
        ]
        x, y, se = "millions", "ratio", "ppl_increase_se"
        for method, style in _STYLES.items():
            chosen = sorted((row for row in shown if row["method"] == method), key=_active)
            if chosen:
                with_errors(axes, chosen, x, y, se, style, f"dense, {method}")
        unpruned = [row for row in shown if row["method"] == _UNPRUNED]
        for row, look in zip(unpruned, cycle(_LOOKS), strict=False):
            label = "dense, unpruned" if row["model"] == "dense" else row["model"]
            with_errors(axes, [row], x, y, se, {**look, "linestyle": "none"}, label)
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        axes.legend()


def _active(row: Point) -> int:
    return int(row["active_params"])


def _methods(context: Context) -> frozenset[str]:
    names = words(context.spec.values) if context.spec.values else list(METHODS)
    for name in names:
        if name not in METHODS:
            raise UsageError(f"values: {name!r} is no method, expected {', '.join(METHODS)}")
    return frozenset(names)


def _targets(context: Context) -> list[_Target]:
    paths = [Path(path) for path in context.spec.against]
    names = [path.resolve().name for path in paths]
    found = []
    for path, name in zip(paths, names, strict=True):
        runnable = context.loaded(path)
        if runnable.tokenizer.digest != context.runnable.tokenizer.digest:
            raise MismatchError(
                f"{path}: its tokenizer is not that of {context.spec.model}, perplexities would "
                "not compare",
                hint="train both with the same tokenizer",
            )
        label = name if names.count(name) == 1 else str(path)
        active = count_parameters(runnable.model.config).active
        found.append(_Target(label, runnable, active))
    return found


def _as_is(
    context: Context, runnable: Runnable, key: str, active: int, name: str = "dense"
) -> Variant:
    facts = {"model": name, "method": _UNPRUNED, "active_params": active, "sparsity": 0.0}
    return Variant(f"{key} {_UNPRUNED}", facts, lambda stack: Opened(runnable))


def _pruner(context: Context, method: str, sparsity: float) -> Any:
    def open_(stack: ExitStack) -> Opened:
        dense, device = context.runnable, context.machine.device
        model = dense.model
        if model.embedding.device != device:
            model = copy.deepcopy(model).to(device)
        ids_BT = _calibration_ids(context, method).to(device)
        pruned = prune(model, method, sparsity, ids_BT, context.progress)
        return Opened(dataclasses.replace(dense, model=pruned))

    return open_


def _calibration(context: Context) -> Windows:
    """The beginning of the calibration text in full windows.

    Raises:
        UsageError: there is none.
    """
    spec, runnable = context.spec, context.runnable
    if not spec.calibration:
        raise UsageError(
            "calibration: wanda and sparsegpt look at text",
            hint="add --calibration TEXT, other text than --data",
        )
    length = spec.window or runnable.model.config.max_position_embeddings
    tokens = spec.calibration_windows * length + 1
    documents = limited(read_documents(list(spec.calibration)), runnable.tokenizer, tokens)
    return windows_of(documents, runnable.tokenizer, length, packed=True)


def _calibration_ids(context: Context, method: str) -> Tensor:
    """Ids int64 [B, T] of equally long windows; empty for methods that look at no text."""
    if method not in NEEDS_TEXT:
        return torch.empty(0, 1, dtype=torch.int64)
    windows = _calibration(context)
    if windows.text_digest == context.windows.text_digest:
        context.progress.warn("--calibration: is the text that is measured on, give other text")
    rows = [window.ids[:-1] for window in windows]
    longest = max(len(row) for row in rows)
    full = [row for row in rows if len(row) == longest][: context.spec.calibration_windows]
    return torch.from_numpy(np.stack(full).astype(np.int64))
