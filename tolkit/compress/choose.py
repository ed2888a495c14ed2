"""Choosing which layers' tables to leave out, by measuring what every candidate set costs.

A proxy would mislead: how much a table matters, how well the next one takes its place, and how
two absences add up differ from layer to layer (LAB finding 2). So every number here is an
evaluation: each layer alone first, then sets of them, with a standard error over windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tolkit.compress.choose_measure import LayerSet, Meter, SetCost
from tolkit.compress.choose_search import DropWish, Step, backward, better, forward, swapped
from tolkit.errors import GateError, UsageError
from tolkit.evaluate.forward import Machine
from tolkit.evaluate.gate_syntax import parse_gate
from tolkit.evaluate.windows import Windows
from tolkit.progress import Progress, TqdmProgress
from tolkit.tables import Runnable

__all__ = [
    "Choice",
    "DropWish",
    "SetCost",
    "Step",
    "choose_layers",
    "most_evaluations",
    "parse_bound",
]


@dataclass(frozen=True)
class Choice:
    """What was chosen and everything that was measured for it.

    Attributes:
        wish: what was asked for.
        cost: the chosen set, where its tables go, and what that costs.
        as_is: what the model costs before any layer goes: zero against itself.
        alone: each layer that has a table left out alone, in layer order.
        steps: of all searches, in the order they ran.
        found: search -> the set it ended with.
        reference: identity of what costs compare with.
        against_itself: that is the model as it is.
        evaluations: sets evaluated.     elapsed_s: seconds that took.
        n_tokens, n_windows, window_length, text_digest: the text.
    """

    wish: DropWish
    cost: SetCost
    as_is: SetCost
    alone: tuple[SetCost, ...]
    steps: tuple[Step, ...]
    found: Mapping[str, SetCost]
    reference: str
    against_itself: bool
    evaluations: int
    elapsed_s: float
    n_tokens: int
    n_windows: int
    window_length: int
    text_digest: str

    @property
    def layers(self) -> LayerSet:
        """The chosen layers, ascending."""
        return self.cost.layers

    def to_history(self) -> dict[str, Any]:
        """What decided, for a bundle's history: the same on every machine, so no measurement."""
        wish = self.wish
        asked = {
            "auto": wish.auto,
            "max_kl": wish.max_kl,
            "max_ppl_increase": wish.max_ppl_increase,
        }
        return {
            **{name: value for name, value in asked.items() if value is not None},
            "search": wish.search,
            "text": self.text_digest[:16],
            "window": self.window_length,
            **({} if self.against_itself else {"reference": self.reference[:16]}),
        }


def choose_layers(
    runnable: Runnable,
    windows: Windows,
    wish: DropWish,
    *,
    reference: Runnable | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Measure what leaving out layers costs on a text, and choose which to leave out.

    Each layer alone; forward: from none, the layer that costs least beside the chosen ones is
    added; backward: from the up to twice as many that cost least alone, the one whose return
    helps most is put back; then chosen layers are exchanged with their neighbours. The larger of
    the found sets wins, at equal size the one of lower KL. Costs are of table sums before they
    are stored; the chosen set was selected on this very text, so other text is the fair judge.

    Cost: one forward pass a set, `most_evaluations` of them before exchanges.

    Args:
        runnable: a checkpoint with tables or a bundle; not changed.
        windows: from `windows_of`; two or more.
        reference: what costs compare with; by default the model as it is.
        machine: where to run; its tables are streamed whatever it says.

    Raises:
        UsageError: a dense model, more layers than there are, windows too long.
        GateError: no layer at all can go within the bound.
        DataError: text of fewer than two windows.     MismatchError: another tokenizer.
        NonFiniteError: NaN or infinite logits.        ResourceError: out of memory.
    """
    meter = Meter(
        runnable,
        reference,
        windows,
        fold=wish.fold,
        machine=machine or Machine(),
        progress=progress or TqdmProgress(),
    )
    kept = meter.kept
    if wish.auto is not None and wish.auto >= len(kept):
        raise UsageError(
            f"auto: {wish.auto} of {len(kept)} layers that have a table, expected 1 to "
            f"{len(kept) - 1}"
        )
    follow = most_evaluations(len(kept), wish) - len(kept)
    as_is, *alone = meter.costs(
        [(), *([(layer,) for layer in kept] if len(kept) > 1 else [])], "each layer alone", follow
    )
    _require_possible(alone, wish)
    steps, found = _search(meter, wish, alone)
    return Choice(
        wish=wish,
        cost=better(list(found.values())),
        as_is=as_is,
        alone=tuple(alone),
        steps=tuple(steps),
        found=found,
        reference=(reference or runnable).identity,
        against_itself=reference is None,
        evaluations=meter.evaluations,
        elapsed_s=meter.elapsed_s,
        n_tokens=windows.n_tokens,
        n_windows=len(windows),
        window_length=windows.length,
        text_digest=windows.text_digest,
    )


def most_evaluations(kept: int, wish: DropWish) -> int:
    """Sets that are evaluated at most before exchanges, of `kept` layers that have a table.

    Under a bound the number depends on what is found; this is all of them.
    """
    most = wish.most(kept)
    alone = 1 + kept
    ahead = sum(kept - chosen for chosen in range(1, most))
    start = min(2 * most, kept - 1)
    back = sum(range(most + 1, start + 1)) if wish.auto is not None else sum(range(2, start + 1))
    return alone + {"forward": ahead, "backward": back, "auto": ahead + back}[wish.search]


def parse_bound(text: str, name: str) -> float:
    """A bound as gates write it: ``0.01``, or ``0.4%`` for the change of perplexity.

    Args:
        name: ``max_kl`` or ``max_ppl_increase``, named in errors.

    Raises:
        UsageError: no number, or a percentage of what is no ratio.
    """
    metric = {"max_kl": "kl_mean", "max_ppl_increase": "ppl_increase"}[name]
    example = "0.01" if name == "max_kl" else "0.4%"
    try:
        return parse_gate(f"{metric}<={text}").limit
    except UsageError as error:
        raise UsageError(
            f"{name}: {text!r} is not a bound, expected a number like {example}"
        ) from error


def _require_possible(alone: list[SetCost], wish: DropWish) -> None:
    """GateError when not even one layer can go."""
    if not alone:
        raise UsageError("auto: only one layer has a table, nothing can be left out")
    if any(wish.allows(cost) for cost in alone):
        return
    cheapest = min(alone, key=lambda cost: cost.kl_nats.value)
    kl, change = cheapest.kl_nats, cheapest.ppl_increase
    bound = f"KL {wish.max_kl:g}"
    if wish.max_ppl_increase is not None:
        bound = f"{100 * wish.max_ppl_increase:g} % perplexity"
        cheapest = min(alone, key=lambda cost: cost.ppl_increase.value)
    raise GateError(
        f"{'max_kl' if wish.max_kl is not None else 'max_ppl_increase'}: no layer can go within "
        f"{bound}, the cheapest, layer {cheapest.layers[0]}, costs KL {kl.value:.5f} +/- "
        f"{kl.se:.5f} and {100 * change.value:+.3f} +/- {100 * change.se:.3f} % perplexity",
        hint="the upper end of the 95 % interval must hold: raise the bound, or give more text",
    )


def _search(
    meter: Meter, wish: DropWish, alone: list[SetCost]
) -> tuple[list[Step], dict[str, SetCost]]:
    """All steps of the searches asked for, and the set each of them ended with."""
    steps: list[Step] = []
    found: dict[str, SetCost] = {}
    if wish.search != "backward":
        steps += forward(meter, wish)
        _keep_last(found, "forward", steps)
    if wish.search != "forward":
        least = len(found["forward"].layers) if found else 1
        back = backward(meter, wish, _start(meter, wish, alone, least), least)
        _keep_last(found, "backward", back)
        steps += back
    if wish.search == "auto":
        exchanged = swapped(meter, wish, better(list(found.values())))
        _keep_last(found, "swap", exchanged)
        steps += exchanged
    return steps, found


def _start(meter: Meter, wish: DropWish, alone: list[SetCost], least: int) -> LayerSet:
    """Where going backward begins: the layers that cost least alone, more than will go."""
    by_cost = [c.layers[0] for c in sorted(alone, key=lambda c: (c.kl_nats.value, c.layers))]
    size = 2 * (wish.auto or least)
    if wish.auto is None and wish.search == "backward":
        size = sum(wish.allows(cost) for cost in alone)
    return tuple(sorted(by_cost[: min(size, len(meter.kept) - 1)]))


def _keep_last(found: dict[str, SetCost], name: str, steps: list[Step]) -> None:
    """Note the last set a search took, where it took one."""
    taken = [step.taken for step in steps if step.taken is not None]
    if taken:
        found[name] = taken[-1]
