"""What leaving out sets of layers costs: each set is evaluated, several in one pass over the text.

L layers. A set's cost is never put together from its members' costs: with folding a pair of
neighbours costs more, and two pairs less, than their layers alone would say.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from tolkit.errors import DataError, NonFiniteError
from tolkit.evaluate.adjust import MemoRows, layers_with_tables, require_tables, without_layers
from tolkit.evaluate.forward import ForwardPass, Machine
from tolkit.evaluate.metrics import TextSizes, comparison_metrics
from tolkit.evaluate.partners import check_partners
from tolkit.evaluate.result import Metric
from tolkit.evaluate.windows import Windows
from tolkit.model import FfnRows
from tolkit.progress import Progress, Task
from tolkit.tables import Runnable

__all__ = ["Gone", "Meter", "SetCost", "Side", "receivers"]

Side = Literal["previous", "next"]
Gone = Mapping[int, Side]

_Key = tuple[tuple[int, int | None], ...]
_AT_ONCE = 8  # sets that share a pass: the reference then costs an eighth of it, at most


@dataclass(frozen=True)
class SetCost:
    """What leaving out some layers together costs against the reference.

    Attributes:
        into: layer left out -> the layer its table is added to, None where it is dropped; in
            layer order, empty for the model as it is.
        kl_nats: mean KL(reference || without them) of a token.
        ppl_increase: ratio of token perplexities minus 1, paired window by window.
    """

    into: Mapping[int, int | None]
    kl_nats: Metric
    ppl_increase: Metric

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers left out: original indices, ascending."""
        return tuple(self.into)

    @property
    def sides(self) -> dict[int, Side]:
        """To which side each table goes."""
        return {
            layer: "previous" if to is not None and to < layer else "next"
            for layer, to in self.into.items()
        }


def receivers(kept: Sequence[int], gone: Gone) -> dict[int, int]:
    """Where the tables of `gone` layers are added: the nearest kept layer on the side asked for.

    Without a layer on that side it is the other one. Tables of neighbours never cross: of those
    between two kept layers the first go to the previous, the last to the next, as many as asked.

    Args:
        kept: layers that have a table, ascending, those in `gone` included; one of them stays.
    """
    into: dict[int, int] = {}
    left = [layer for layer in kept if layer not in gone]
    for before, after in pairwise([None, *left, None]):
        low = -1 if before is None else before
        run = [k for k in kept if k > low and (after is None or k < after)]
        back = sum(gone[layer] == "previous" for layer in run)
        for place, layer in enumerate(run):
            first, second = (before, after) if place < back else (after, before)
            to = second if first is None else first
            assert to is not None
            into[layer] = to
    return into


class Meter:
    """Evaluates sets of layers of one model, each set once.

    Args:
        runnable: the model; it is not changed.
        reference: what costs compare with; None compares with the model as it is.
        fold: add a table that goes to a kept one (False: drop it).
        known: sets that need not be evaluated: of this model, reference, text and `fold`.

    Attributes:
        kept: layers that have a table.
        evaluations: sets evaluated so far.
        elapsed_s: seconds spent on them.

    Raises:
        UsageError: a dense model, or windows too long for it.
        DataError: text of fewer than two windows, which leaves the error unknown.
        MismatchError: another tokenizer or vocabulary.
    """

    def __init__(
        self,
        runnable: Runnable,
        reference: Runnable | None,
        windows: Windows,
        *,
        fold: bool,
        machine: Machine,
        progress: Progress,
        known: Sequence[SetCost] = (),
    ) -> None:
        require_tables(runnable)
        check_partners([runnable], reference, windows, [str(runnable.path)])
        if len(windows) < 2:
            raise DataError(
                "text: one window, expected at least 2: its error cannot be known",
                hint="give more --data, or a smaller --window",
            )
        # Resident rows would be held once for every set that shares a pass.
        self.machine = copy.copy(machine)
        self.machine.tables = "streamed"
        self.windows = windows
        self.fold = fold
        self.evaluations = 0
        self.elapsed_s = 0.0
        here = _placed_once(runnable, self.machine)
        rows = FfnRows(here.model) if here.rows is None else here.rows
        # Worked out once a batch for the model and all of its variants.
        self._runnable = dataclasses.replace(here, rows=MemoRows(rows))
        self._reference = self._runnable
        if reference is not None:
            self._reference = _placed_once(reference, self.machine)
        self._progress = progress
        self._sizes = TextSizes.of(windows)
        self._known: dict[_Key, SetCost] = {tuple(cost.into.items()): cost for cost in known}
        self.kept = tuple(layers_with_tables(self._runnable))

    def costs(self, sets: Sequence[Gone], label: str, then: int = 0) -> list[SetCost]:
        """The cost of each set, in order; those known already are not evaluated again.

        Args:
            sets: of layers left out, each with the side its table goes to.
            label: what the sets are, for the progress.
            then: evaluations that may follow, to say how long they will take.

        Raises:
            NonFiniteError: NaN or infinite logits.      ResourceError: out of memory.
        """
        keys = [self._resolved(gone) for gone in sets]
        waiting = [key for key in dict.fromkeys(keys) if key not in self._known]
        if waiting:
            total = self.windows.n_tokens * len(waiting)
            label = f"{label}, {len(waiting)} set{'s' if len(waiting) > 1 else ''}"
            with self._progress.task(label, total, "token") as task:
                for part in _parts(waiting):
                    self._evaluate(part, task)
                if then:
                    left_s = then * self.elapsed_s / max(1, self.evaluations)
                    task.note(f"up to {then} sets follow, about {left_s:.0f} s")
        return [self._known[key] for key in keys]

    def _resolved(self, gone: Gone) -> _Key:
        """Each layer with its receiver: two sets that leave the same sums are one."""
        if self.fold:
            return tuple(sorted(receivers(self.kept, gone).items()))
        return tuple((layer, None) for layer in sorted(gone))

    def _evaluate(self, sets: Sequence[_Key], task: Task) -> None:
        """One pass over the text for all of `sets`."""
        variants = [without_layers(self._runnable, dict(into)) for into in sets]
        started_s = time.perf_counter()
        with self.machine.running():
            models = [self.machine.place(r) for r in (self._reference, *variants)]
            run = ForwardPass(models, self.windows, self.machine, with_reference=True)
            run.run(range(len(self.windows)), self._progress, _Times(task, len(sets)))
        self.elapsed_s += time.perf_counter() - started_s
        self.evaluations += len(sets)
        reference, *tallies = run.tallies
        for key, tally in zip(sets, tallies, strict=True):
            found = comparison_metrics(tally, reference, self._sizes)
            cost = SetCost(dict(key), found["kl_mean_nats"], found["ppl_increase"])
            if not math.isfinite(cost.kl_nats.value):
                without = f" without layers {', '.join(map(str, cost.layers))}" if key else ""
                raise NonFiniteError(
                    f"{self._runnable.path}: NaN or infinite logits{without}",
                    hint=f"run: tol verify {self._runnable.path}",
                )
            self._known[key] = cost


class _Times:
    """A task that counts every token once for each set that reads it."""

    def __init__(self, task: Task, sets: int) -> None:
        self._task, self._sets = task, sets

    def advance(self, amount: float) -> None:
        self._task.advance(amount * self._sets)

    def note(self, text: str) -> None:
        self._task.note(text)


def _placed_once(runnable: Runnable, machine: Machine) -> Runnable:
    """The model where and as it runs, so that no pass and no variant copies it again."""
    model = runnable.model
    if all(p.device == machine.device and p.dtype == machine.dtype for p in model.parameters()):
        return runnable
    model = copy.deepcopy(model).to(device=machine.device, dtype=machine.dtype)
    return dataclasses.replace(runnable, model=model)


def _parts(sets: Sequence[_Key]) -> list[Sequence[_Key]]:
    """As few passes as `_AT_ONCE` allows, of about equal size."""
    passes = -(-len(sets) // _AT_ONCE)
    edges = [len(sets) * i // passes for i in range(passes + 1)]
    return [sets[a:b] for a, b in pairwise(edges)]
