"""How many layers to fold before a bundle is filled to a size: as many as measurably pay.

A folded layer leaves its bytes to the others and loses what only it could say; which weighs more
differs from size to size, so each number of layers is written to the same size and evaluated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tolkit.bundling import BundleReport, Resources
from tolkit.compress import CompressSpec
from tolkit.compress.search.choose import Choice, DropWish, SetCost, choose_layers
from tolkit.compress.search.workshop import Candidate, workshop
from tolkit.evaluate.adjust import layers_with_tables
from tolkit.evaluate.forward import Machine
from tolkit.evaluate.judge import Judge
from tolkit.measured import Measured
from tolkit.progress import Progress, TqdmProgress
from tolkit.quality_log import RecordedMetric
from tolkit.tables import Runnable

__all__ = ["Folded", "SpecWith", "Trial", "choose_for", "fold_while_it_pays"]

SpecWith = Callable[[Choice | None], CompressSpec]
"""The compression with the layers of a choice folded; none for None."""


@dataclass(frozen=True)
class Trial:
    """One number of folded layers, written and measured.

    layers: folded, ascending.     into: where to, in the same order.
    """

    layers: tuple[int, ...]
    into: tuple[int, ...]
    table_bytes: int
    bits_per_value: float
    kl_nats: RecordedMetric
    ppl_increase: RecordedMetric
    ppl_token: RecordedMetric
    reused: bool


@dataclass(frozen=True)
class Folded:
    """What was tried.

    Attributes:
        trials: by falling number of kept layers; the last one did not pay any more, where there
            was one to try.
        chosen: the published one.
        choices: of layers, one for each trial after the first.
    """

    trials: tuple[Trial, ...]
    chosen: Trial
    choices: tuple[Choice, ...]
    report: BundleReport
    elapsed_s: float


def choose_for(
    model: Runnable,
    judge: Judge,
    count: int,
    *,
    known: Sequence[SetCost] = (),
    progress: Progress,
) -> Choice:
    """The `count` layers of `model` whose folding costs least, found forward by measurement.

    Raises:
        what `choose_layers` raises.
    """
    other = judge.reference is not None and judge.reference.identity != model.identity
    return choose_layers(
        model,
        judge.windows,
        DropWish(auto=count, search="forward"),
        reference=judge.reference if other else None,
        machine=Machine(judge.device, judge.dtype, judge.batch_tokens),
        progress=progress,
        known=known,
    )


def fold_while_it_pays(
    source_path: str | Path,
    out: str | Path,
    spec_with: SpecWith,
    model: Runnable,
    judge: Judge,
    *,
    known: Measured | None = None,
    costs: Sequence[SetCost] = (),
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> Folded:
    """Write the bundle with 0, 1, 2, .. folded layers, for as long as the measured KL falls.

    Cost: a compression and an evaluation a number of layers, and the choice of layers.

    Args:
        spec_with: the compression, to one size.
        model: the source, ready to run; layers are chosen on it.
        judge: text, two windows or more, and the reference; both choose and judge.
        costs: what sets of layers cost, measured before.

    Raises:
        OutputExistsError, MismatchError, DataError, NonFiniteError, ResourceError.
    """
    started_s = time.perf_counter()
    source_path, out = Path(source_path), Path(out)
    resources, progress = resources or Resources(), progress or TqdmProgress()
    kept = len(layers_with_tables(model))
    trials: list[Trial] = []
    choices: list[Choice] = []
    with workshop(source_path, out, judge, known or Measured(), resources, progress) as shop:
        best: Candidate | None = None
        chosen: Trial | None = None
        for count in range(kept):
            choice = None
            if count:
                choice = choose_for(model, judge, count, known=costs, progress=progress)
                choices.append(choice)
                costs = [*costs, *choice.measured]
            label = f"{count} folded"
            made = shop.make(f"drop-{count}", spec_with(choice), label)
            trials.append(_trial(made, choice))
            if chosen is not None and trials[-1].kl_nats.value >= chosen.kl_nats.value:
                break
            if best is not None:
                shop.discard(best)
            best, chosen = made, trials[-1]
        assert best is not None and chosen is not None
        report = shop.publish(best, out)
    elapsed_s = time.perf_counter() - started_s
    return Folded(tuple(trials), chosen, tuple(choices), report, elapsed_s)


def _trial(made: Candidate, choice: Choice | None) -> Trial:
    metrics = made.measured.record.metrics
    into = {} if choice is None or choice.into is None else choice.into
    return Trial(
        () if choice is None else choice.layers,
        tuple(into.values()),
        made.report.table_bytes,
        made.report.bits_per_value,
        metrics["kl_mean_nats"],
        metrics["ppl_increase"],
        metrics["ppl_token"],
        not made.fresh,
    )
