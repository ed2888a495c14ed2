"""Running a compression: choosing layers and size by measurement where that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tolkit_cli._measuring import MeasuringOptions, judge_for, known_from, require_unused
from tolkit_cli._output import Output

if TYPE_CHECKING:
    from tolkit.bundling import BundleReport, Resources
    from tolkit.compress import CompressSpec
    from tolkit.compress.search.bound import Bound
    from tolkit.compress.search.choose import Choice
    from tolkit.evaluate.judge import Judge
    from tolkit.tables import Runnable

__all__ = ["CompressAsk", "run_compress"]


@dataclass(frozen=True)
class CompressAsk:
    """The command line but for what every bundle of it has in common.

    auto: how many layers to choose; 0 as many as pay, None chooses none.
    """

    source: Path
    path: Path
    measuring: MeasuringOptions
    resources: Resources
    dry_run: bool
    bound: Bound | None
    auto: int | None


def run_compress(
    out: Output,
    ask: CompressAsk,
    spec_at: Callable[[int | None, Choice | None], CompressSpec],
    budget_bytes: int | None,
) -> BundleReport | None:
    """Write the bundle; None where only its plan was asked for, which is then shown."""
    from tolkit.compress import compress as compress_tables
    from tolkit.compress.outlook import outlook
    from tolkit.compress.search.smallest import smallest_bundle
    from tolkit_cli._plan_report import show_plan
    from tolkit_cli._search_report import show_found

    choice = None
    progress = out.progress()
    if ask.bound is None and ask.auto is None:
        require_unused(ask.measuring)
    else:
        model, judge = _judge(out, ask)
        if ask.auto == 0:
            return _fold(out, ask, model, judge, lambda choice: spec_at(budget_bytes, choice))
        if ask.auto is not None:
            choice = _choice(out, ask, model, judge)
    if ask.bound is None:
        spec = spec_at(budget_bytes, choice)
        if ask.dry_run and spec.codec == "bands":
            plan = outlook(ask.source, spec, resources=ask.resources, progress=progress)
            show_plan(out, [plan])
            return None
        return compress_tables(
            ask.source,
            ask.path,
            spec,
            resources=ask.resources,
            dry=ask.dry_run,
            progress=progress,
        )
    with out.timing("search"):
        found = smallest_bundle(
            ask.source,
            ask.path,
            lambda size: spec_at(size, choice),
            ask.bound,
            judge,
            known=known_from(ask.measuring),
            resources=ask.resources,
            progress=progress,
        )
    show_found(out, found)
    return found.report


def _judge(out: Output, ask: CompressAsk) -> tuple[Runnable, Judge]:
    from tolkit_cli._search_report import show_text
    from tolkit_formats.writer import require_absent

    if not ask.dry_run:
        require_absent(ask.path, force=ask.resources.force)
    model, judge = judge_for(out, ask.source, ask.measuring)
    if not ask.auto:
        show_text(out, judge)
    return model, judge


def _choice(out: Output, ask: CompressAsk, model: Runnable, judge: Judge) -> Choice:
    """The layers that measuring chooses, after showing what it found."""
    from tolkit.compress.search.choose_known import known_costs
    from tolkit.compress.search.drop_auto import choose_for
    from tolkit_cli._choice_report import show_choice

    assert ask.auto is not None
    costs = known_costs(known_from(ask.measuring), model, judge)
    with out.timing("choose"):
        choice = choose_for(model, judge, ask.auto, known=costs, progress=out.progress())
    show_choice(out, choice)
    return choice


def _fold(
    out: Output,
    ask: CompressAsk,
    model: Runnable,
    judge: Judge,
    spec_with: Callable[[Choice | None], CompressSpec],
) -> BundleReport:
    """As many layers folded as pay at the size that is asked for."""
    from tolkit.compress.search.choose_known import known_costs
    from tolkit.compress.search.drop_auto import fold_while_it_pays
    from tolkit.errors import UsageError
    from tolkit_cli._search_report import show_folded

    if ask.bound is not None or ask.dry_run or spec_with(None).codec != "bands":
        raise UsageError(
            "--drop: auto compares bundles of one size and writes them",
            hint="give --bits-per-value or --budget without --dry-run, or --drop auto:N",
        )
    known = known_from(ask.measuring)
    with out.timing("search"):
        found = fold_while_it_pays(
            ask.source,
            ask.path,
            spec_with,
            model,
            judge,
            known=known,
            costs=known_costs(known, model, judge),
            resources=ask.resources,
            progress=out.progress(),
        )
    show_folded(out, found)
    return found.report
