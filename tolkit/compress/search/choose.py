"""Choosing which layers' tables to leave out, by measuring what every candidate set costs.

A proxy would mislead: how much a table matters, how well the next one takes its place, and how
two absences add up differ from layer to layer (LAB finding 2). So every number here is an
evaluation: each layer alone first, then sets of them, with a standard error over windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tolkit.compress.search.choose_measure import Gone, Meter, SetCost
from tolkit.compress.search.choose_search import DropWish, Step, better, search_sets, sets_of_one
from tolkit.errors import GateError, UsageError
from tolkit.evaluate.forward import Machine
from tolkit.evaluate.gates.syntax import parse_gate
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
        as_is: what the model costs before any layer goes; None where costs compare with it.
        alone: each layer that has a table left out alone, in layer order; folded into the
            previous kept one, and into the next.
        steps: of all searches, in the order they ran.
        found: search -> the set it ended with.
        reference: identity of what costs compare with; None for the model as it is.
        evaluations: sets evaluated.     elapsed_s: seconds that took.
        n_tokens, n_windows, window_length, text_digest: the text.
    """

    wish: DropWish
    cost: SetCost
    as_is: SetCost | None
    alone: tuple[SetCost, ...]
    steps: tuple[Step, ...]
    found: Mapping[str, SetCost]
    reference: str | None
    evaluations: int
    elapsed_s: float
    n_tokens: int
    n_windows: int
    window_length: int
    text_digest: str

    @property
    def measured(self) -> tuple[SetCost, ...]:
        """Every set that was evaluated, the model as it is included where that was."""
        costs = [*(() if self.as_is is None else (self.as_is,)), *self.alone]
        costs += [cost for step in self.steps for cost in step.candidates]
        return tuple({tuple(cost.into.items()): cost for cost in costs}.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """The chosen layers, ascending."""
        return self.cost.layers

    @property
    def into(self) -> Mapping[int, int] | None:
        """Chosen layer -> the kept one its table is added to; None where tables are dropped."""
        into = {layer: to for layer, to in self.cost.into.items() if to is not None}
        return into or None

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
            **({} if self.reference is None else {"reference": self.reference[:16]}),
        }


def choose_layers(
    runnable: Runnable,
    windows: Windows,
    wish: DropWish,
    *,
    reference: Runnable | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
    known: Sequence[SetCost] = (),
) -> Choice:
    """Measure what leaving out layers costs on a text, and choose which to leave out.

    Each layer alone, its table folded to either side; forward: from none, the layer that costs
    least beside the chosen ones is added; backward: from the up to twice as many that cost least
    alone, the one whose return helps most is put back; then chosen layers are exchanged with
    neighbours, and tables go to the other side, while that helps. The larger of the found sets
    wins, at equal size the one of lower KL. Costs are of table sums before they are stored; the
    set was selected on this very text, so other text is the fair judge.

    Cost: one forward pass a set, `most_evaluations` of them before exchanges.

    Args:
        runnable: a checkpoint with tables or a bundle; not changed.
        windows: from `windows_of`; two or more.
        reference: what costs compare with; by default the model as it is.
        machine: where to run; its tables are streamed whatever it says.
        known: costs measured before under the same conditions; they are not measured again.

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
        known=known,
    )
    kept = meter.kept
    _require_enough(len(kept), wish)
    before: list[Gone] = [] if reference is None else [{}]
    ones = sets_of_one(kept, fold=wish.fold)
    follow = most_evaluations(len(kept), wish) - len(ones)
    costs = meter.costs([*before, *ones], "each layer alone", follow)
    alone = costs[len(before) :]
    _require_possible(alone, wish)
    steps, found = search_sets(meter, wish, alone)
    return Choice(
        wish=wish,
        cost=better(list(found.values())),
        as_is=costs[0] if before else None,
        alone=tuple(alone),
        steps=tuple(steps),
        found=found,
        reference=None if reference is None else reference.identity,
        evaluations=meter.evaluations,
        elapsed_s=meter.elapsed_s,
        n_tokens=windows.n_tokens,
        n_windows=len(windows),
        window_length=windows.length,
        text_digest=windows.text_digest,
    )


def most_evaluations(kept: int, wish: DropWish) -> int:
    """Sets of layers that are evaluated at most, exchanges apart, where `kept` have a table.

    Under a bound it depends on what is found; this is if all layers but one could go.
    """
    most = wish.most(kept)
    ahead = sum(kept - chosen for chosen in range(1, most))
    start = min(2 * most, kept - 1)
    back = max(1, sum(range(most + 1, start + 1)))
    if wish.auto is None:
        back = sum(range(1, start + 1))  # the start itself, then all the way down
    alone = 2 * kept - 2 if wish.fold else kept
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
    said = f"{name}: {text!r} is not a bound, expected a number like {example}"
    try:
        gate = parse_gate(f"{metric}<={text}")
    except UsageError as error:
        raise UsageError(said) from error
    if gate.partner is not None:
        raise UsageError(said)
    return gate.limit


def _require_enough(kept: int, wish: DropWish) -> None:
    """UsageError unless a layer would be left."""
    if kept < 2:
        raise UsageError("auto: only one layer has a table, nothing can be left out")
    if wish.auto is not None and wish.auto >= kept:
        raise UsageError(
            f"auto: {wish.auto} of {kept} layers that have a table, expected 1 to {kept - 1}"
        )


def _require_possible(alone: list[SetCost], wish: DropWish) -> None:
    """GateError when not even one layer can go."""
    if any(wish.allows(cost) for cost in alone):
        return
    bound = wish.bound
    assert bound is not None
    by_kl = bound.metric == "kl_mean_nats"
    cheapest = min(alone, key=lambda c: (c.kl_nats if by_kl else c.ppl_increase).interval[1])
    kl, change = cheapest.kl_nats, cheapest.ppl_increase
    raise GateError(
        f"{bound.name}: no layer can go within {bound.said()}; the cheapest, layer "
        f"{cheapest.layers[0]}, costs KL {kl.value:.2g} +/- {kl.se:.1g} nats and "
        f"{100 * change.value:+.3f} +/- {100 * change.se:.3f} % of perplexity",
        hint="the upper end of the 95 % interval must hold: raise the bound, or give more text",
    )
