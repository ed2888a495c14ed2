"""Compressing to a measured bound, against bundles written and evaluated one by one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from _eval_fakes import documents_of
from _nano import memory_folder, tree_bytes
from _pico import pico_checkpoint

from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, compress
from tolkit.compress.search.bound import Bound
from tolkit.compress.search.drop_auto import Folded, fold_while_it_pays
from tolkit.compress.search.recipe import entry_of
from tolkit.compress.search.smallest import Found, smallest_bundle
from tolkit.compress.search.workshop import search_folder
from tolkit.errors import DataError, GateError, OutputExistsError, UsageError
from tolkit.evaluate import evaluate, windows_of
from tolkit.evaluate.judge import Judge
from tolkit.measured import Measured, Measurement, load_measured, save_measured
from tolkit.progress import Progress, SilentProgress
from tolkit.quality_log import QUALITY_FILE, parse_record, quality_lines
from tolkit.tables import Runnable, load_runnable
from tolkit_formats import open_bundle

SILENT = SilentProgress()
LOOSE, TIGHT = Bound(max_kl=0.1), Bound(max_kl=1e-5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "ckpt"
    return pico_checkpoint(path, num_hidden_layers=3, seed=4)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Runnable:
    return load_runnable(checkpoint)


@pytest.fixture(scope="module")
def judge(model: Runnable) -> Judge:
    return judge_of(model, 300, 250)


def judge_of(model: Runnable, *sizes: int) -> Judge:
    return Judge(model, windows_of(documents_of(*sizes), model.tokenizer, 32), device="cpu")


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty folder in memory: these tests write some dozen bundles each."""
    with memory_folder() as folder:
        yield folder


class CountingJudge(Judge):
    """Counts bundles that are evaluated; `fails_at` raises at that one."""

    measured: list[Path]
    fails_at: int | None

    @classmethod
    def of(cls, judge: Judge, fails_at: int | None = None) -> CountingJudge:
        made = cls(judge.reference, judge.windows, device=judge.device)
        object.__setattr__(made, "measured", [])
        object.__setattr__(made, "fails_at", fails_at)
        return made

    def records(self, paths: Sequence[Path], progress: Progress) -> list[dict[str, Any]]:
        if len(self.measured) == self.fails_at:
            raise KeyboardInterrupt
        self.measured.extend(paths)
        return super().records(paths, progress)


def search(checkpoint: Path, out: Path, judge: Judge, bound: Bound = LOOSE, **more: Any) -> Found:
    return smallest_bundle(
        checkpoint,
        out,
        lambda size: CompressSpec(budget_bytes=size),
        bound,
        judge,
        resources=more.pop("resources", Resources(1)),
        progress=SILENT,
        **more,
    )


def measured_at(checkpoint: Path, folder: Path, judge: Judge, budget: int) -> dict[str, Any]:
    """Metrics of the bundle `tol compress --budget` writes, without anything of the search."""
    out = folder / f"by-hand-{budget}.tol"
    spec = CompressSpec(budget_bytes=budget)
    compress(checkpoint, out, spec, resources=Resources(1), progress=SILENT)
    (result,) = evaluate(
        [load_runnable(out)], judge.reference, judge.windows, device="cpu", progress=SILENT
    )
    return dict(result.metrics)


@pytest.mark.parametrize("name", ["max_kl", "max_ppl_increase"])
def test_the_bound_holds_and_a_little_smaller_it_does_not(
    checkpoint: Path, judge: Judge, place: Path, name: str
) -> None:
    metric = {"max_kl": "kl_mean_nats", "max_ppl_increase": "ppl_increase"}[name]
    ends = [
        measured_at(checkpoint, place, judge, size)[metric].interval[1] for size in (4_000, 9_000)
    ]
    assert ends[0] > 1.1 * ends[1] > 0
    bound = Bound(**{name: (ends[0] * ends[1]) ** 0.5})
    shutil.rmtree(place)
    place.mkdir()
    found = search(checkpoint, place / "a.tol", judge, bound)
    assert sorted(p.name for p in place.iterdir()) == ["a.tol"]
    again = measured_at(checkpoint, place, judge, found.chosen.budget_bytes)[bound.metric]
    assert again.interval[1] <= bound.limit
    bundle = open_bundle(place / "a.tol")
    assert bundle.table_bytes == found.chosen.table_bytes == found.report.table_bytes
    assert found.report.path == place / "a.tol"
    chosen = found.chosen.budget_bytes
    failing = max(p.budget_bytes for p in found.points if not p.holds and p.budget_bytes < chosen)
    assert found.chosen.table_bytes <= failing * 1.02
    below = measured_at(checkpoint, place, judge, failing)[bound.metric]
    assert below.interval[1] > bound.limit


def test_every_point_says_what_an_evaluation_says(
    checkpoint: Path, judge: Judge, place: Path
) -> None:
    found = search(checkpoint, place / "a.tol", judge)
    point = found.points[len(found.points) // 2]
    metrics = measured_at(checkpoint, place, judge, point.budget_bytes)
    assert point.kl_nats.value == metrics["kl_mean_nats"].value
    assert point.kl_nats.se == metrics["kl_mean_nats"].se
    assert point.kl_nats.high == metrics["kl_mean_nats"].interval[1]
    assert point.ppl_token.value == metrics["ppl_token"].value
    assert point.holds == (point.kl_nats.high <= LOOSE.limit)


def test_a_bound_inside_the_interval_does_not_hold(
    checkpoint: Path, judge: Judge, place: Path
) -> None:
    (entry,) = known_at([6_000], checkpoint, judge, place)
    kl = entry.record.metrics["kl_mean_nats"]
    assert kl.value < kl.high
    bound = Bound(max_kl=(kl.value + kl.high) / 2)
    found = search(checkpoint, place / "a.tol", judge, bound, known=Measured((entry,)))
    assert not next(p for p in found.points if p.budget_bytes == 6_000).holds
    assert found.chosen.kl_nats.high <= bound.limit


def test_history_says_why_and_the_measurement_is_in_the_bundle(
    checkpoint: Path, judge: Judge, place: Path
) -> None:
    found = search(checkpoint, place / "a.tol", judge)
    bundle = open_bundle(place / "a.tol")
    options = bundle.manifest.history[-1].options
    assert options["max_kl"] == LOOSE.limit
    assert options["budget_bytes"] == found.chosen.budget_bytes
    assert options["text"] == judge.setting.text_digest[:16]
    assert options["window"] == 32
    ((_, line),) = quality_lines(place / "a.tol" / QUALITY_FILE)
    record = parse_record(line, "line")
    assert record is not None
    assert record.bundle == bundle.identity
    assert record.metrics["kl_mean_nats"].value == found.chosen.kl_nats.value


def test_a_bound_already_met_takes_the_floor(checkpoint: Path, judge: Judge, place: Path) -> None:
    found = search(checkpoint, place / "a.tol", judge, Bound(max_kl=50.0))
    smallest = found.chosen.budget_bytes
    assert found.chosen.table_bytes == smallest
    with pytest.raises(UsageError, match=f"{smallest:,} bytes"):
        measured_at(checkpoint, place, judge, smallest - 1)


def test_out_of_reach_is_a_gate_and_keeps_what_was_measured(
    checkpoint: Path, judge: Judge, place: Path
) -> None:
    out = place / "a.tol"
    with pytest.raises(GateError, match="no size up to 8 bits/value") as error:
        search(checkpoint, out, judge, TIGHT)
    assert "the best" in error.value.message
    assert not out.exists()
    kept = load_measured(search_folder(out) / "measured.json").bundles
    assert kept and not list(search_folder(out).glob("*.tol"))
    counting = CountingJudge.of(judge)
    found = search(checkpoint, out, counting, Bound(max_kl=0.5))
    reused = {point.budget_bytes for point in found.points if point.reused}
    assert reused >= {entry.budget_bytes for entry in kept}
    assert len(counting.measured) == found.evaluations <= len(found.points) - len(kept)
    assert sorted(p.name for p in place.iterdir()) == ["a.tol"]


def test_an_interrupted_search_continues(checkpoint: Path, judge: Judge, place: Path) -> None:
    whole = CountingJudge.of(judge)
    search(checkpoint, place / "whole.tol", whole)
    total = len(whole.measured)
    assert total >= 3
    out = place / "a.tol"
    first, second = CountingJudge.of(judge, fails_at=2), CountingJudge.of(judge)
    with pytest.raises(KeyboardInterrupt):
        search(checkpoint, out, first)
    assert not out.exists() and search_folder(out).is_dir()
    found = search(checkpoint, out, second)
    assert len(first.measured) == 2
    assert len(first.measured) + len(second.measured) == total
    assert found.evaluations == total - 2
    assert tree_bytes(out) == tree_bytes(place / "whole.tol")
    assert not search_folder(out).exists()


def test_restart_measures_all_again(checkpoint: Path, judge: Judge, place: Path) -> None:
    out = place / "a.tol"
    with pytest.raises(KeyboardInterrupt):
        search(checkpoint, out, CountingJudge.of(judge, fails_at=1))
    fresh = CountingJudge.of(judge)
    found = search(checkpoint, out, fresh, resources=Resources(1, restart=True))
    assert not found.points[0].reused
    assert len(fresh.measured) == found.evaluations


def test_measured_sizes_are_not_evaluated_again(
    checkpoint: Path, judge: Judge, model: Runnable, place: Path
) -> None:
    first = search(checkpoint, place / "a.tol", judge)
    entries = known_at([point.budget_bytes for point in first.points], checkpoint, judge, place)
    save_measured(place / "m.json", Measured(tuple(entries)))
    known = load_measured(place / "m.json")
    counting = CountingJudge.of(judge)
    found = search(checkpoint, place / "b.tol", counting, known=known)
    assert counting.measured == []
    assert all(point.reused for point in found.points)
    assert tree_bytes(place / "a.tol") == tree_bytes(place / "b.tol")
    # Of another text they say nothing, whatever the sizes.
    other = CountingJudge.of(judge_of(model, 240, 250))
    found = search(checkpoint, place / "c.tol", other, known=known)
    assert len(other.measured) == found.evaluations >= 3
    assert not found.points[0].reused


def known_at(
    sizes: Sequence[int], checkpoint: Path, judge: Judge, folder: Path
) -> list[Measurement]:
    """Entries as tol measure writes them, of plain bundles of these sizes."""
    entries = []
    for size in sizes:
        out = folder / f"size-{size}.tol"
        spec = CompressSpec(budget_bytes=size)
        compress(checkpoint, out, spec, resources=Resources(1), progress=SILENT)
        (record,) = judge.records([out], SILENT)
        entries.append(entry_of(out, record))
        shutil.rmtree(out)
    return entries


def test_a_measurement_that_is_not_this_bundles_does_not_decide(
    checkpoint: Path, judge: Judge, place: Path
) -> None:
    """Its recipe fits but the bundle, made again, is another one: it is measured after all."""
    honest = search(checkpoint, place / "a.tol", judge)
    worst = max(honest.points, key=lambda point: point.kl_nats.value)
    (entry,) = known_at([worst.budget_bytes], checkpoint, judge, place)
    lie = {**entry.quality, "metrics": {}, "intervals_95": {}}
    for name in ("metrics", "intervals_95"):
        lie[name] = {**entry.quality[name]}
    lie["metrics"]["kl_mean_nats"] = {"value": 1e-6, "se": 1e-9, "n": 10}
    lie["intervals_95"]["kl_mean_nats"] = [1e-6, 1e-6]
    false = Measurement.of("0" * 64, entry.recipe, entry.budget_bytes, lie)
    found = search(checkpoint, place / "b.tol", judge, known=Measured((false,)))
    assert found.chosen.kl_nats.high <= LOOSE.limit
    again = next(p for p in found.points if p.budget_bytes == worst.budget_bytes)
    assert again.kl_nats.value == worst.kl_nats.value


def test_one_window_and_an_existing_output_are_refused_first(
    checkpoint: Path, judge: Judge, model: Runnable, place: Path
) -> None:
    with pytest.raises(DataError, match="one window"):
        search(checkpoint, place / "a.tol", judge_of(model, 20))
    (place / "b.tol").mkdir()
    counting = CountingJudge.of(judge)
    with pytest.raises(OutputExistsError):
        search(checkpoint, place / "b.tol", counting)
    assert counting.measured == []
    assert [p.name for p in place.iterdir()] == ["b.tol"]


def test_threads_change_nothing(checkpoint: Path, judge: Judge, place: Path) -> None:
    for threads in (1, 2):
        out = place / f"{threads}.tol"
        search(checkpoint, out, judge, Bound(max_kl=0.2), resources=Resources(threads))
    assert tree_bytes(place / "1.tol") == tree_bytes(place / "2.tol")


def folded(checkpoint: Path, out: Path, model: Runnable, judge: Judge, budget: int) -> Folded:
    return fold_while_it_pays(
        checkpoint,
        out,
        lambda choice: CompressSpec(
            budget_bytes=budget,
            drop=() if choice is None else choice.layers,
            into=None if choice is None else choice.into,
            chosen_by={} if choice is None else choice.to_history(),
        ),
        model,
        judge,
        resources=Resources(1),
        progress=SILENT,
    )


@pytest.mark.parametrize("budget", [4_000, 8_000])
def test_layers_are_folded_while_that_pays(
    checkpoint: Path, judge: Judge, model: Runnable, place: Path, budget: int
) -> None:
    out = place / "a.tol"
    found = folded(checkpoint, out, model, judge, budget)
    kls = [trial.kl_nats.value for trial in found.trials]
    assert [len(trial.layers) for trial in found.trials] == list(range(len(kls)))
    best = kls.index(min(kls))
    assert best == len(kls) - 2 or best == len(kls) - 1 == 2
    assert kls[: best + 1] == sorted(kls[: best + 1], reverse=True)
    assert all(trial.table_bytes <= budget for trial in found.trials)
    (result,) = evaluate(
        [load_runnable(out)], judge.reference, judge.windows, device="cpu", progress=SILENT
    )
    assert result.metrics["kl_mean_nats"].value == min(kls)
    gone = [i for i, s in enumerate(open_bundle(out).manifest.layers) if s.status == "folded"]
    assert tuple(gone) == found.chosen.layers
    assert [p.name for p in place.iterdir()] == ["a.tol"]
