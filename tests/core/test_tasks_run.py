"""Scores of items and pages against loops with every logit kept in float64, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _eval_fakes import FakeRunnable, NoisyRows, pico_tokenizer
from _pico import pico_checkpoint, pico_model
from _task_rows import ROWS, write_rows

from tolkit.build import build
from tolkit.compress import CompressSpec, compress
from tolkit.errors import MismatchError, ResourceError, UsageError
from tolkit.evaluate.tasks import (
    TASKS,
    Item,
    Outcome,
    Page,
    TaskData,
    TaskResult,
    change_metrics,
    evaluate_tasks,
    find_tasks,
    load_task,
)
from tolkit.evaluate.tasks.outcomes import outcomes_of
from tolkit.evaluate.tasks.requests import requests_of
from tolkit.model import Decoder
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[TaskData]:
    folder = tmp_path_factory.mktemp("tasks")
    write_rows(folder)
    return find_tasks(list(TASKS), folder)


@pytest.fixture(scope="module")
def pair() -> tuple[FakeRunnable, FakeRunnable]:
    model, tokenizer = pico_model(max_position_embeddings=256), pico_tokenizer()
    noisy = FakeRunnable(model, NoisyRows(model, 0.3), tokenizer, "bundle", "1" * 64)
    return FakeRunnable(model, None, tokenizer), noisy


def run(candidates: list[Any], reference: Any, tasks: list[TaskData], **options: Any) -> list[Any]:
    settings = {"device": "cpu", "progress": SilentProgress(), **options}
    return evaluate_tasks(candidates, reference, tasks, **settings)


def log_likelihood(runnable: FakeRunnable, context: str, continuation: str) -> tuple[float, bool]:
    """One text under one model, token by token; characters are tokens here."""
    moved = len(context) - len(context.rstrip())
    start = len(context) - moved
    ids = runnable.tokenizer.encode(context + continuation)
    if start == 0:
        ids, start = [0, *ids], 1
    with torch.no_grad():
        logits = runnable.model(torch.tensor([ids[:-1]]), rows=runnable.rows)[0].double()
    total, greedy = 0.0, True
    for position in range(start - 1, len(ids) - 1):
        logs = torch.log_softmax(logits[position], -1)
        total += float(logs[ids[position + 1]])
        greedy = greedy and int(logs.argmax()) == ids[position + 1]
    return total, greedy


def naive(runnable: FakeRunnable, item: Item) -> Outcome:
    scores, greedy = zip(*(log_likelihood(runnable, *pair) for pair in item.pairs), strict=True)
    if item.gold is None:
        return Outcome(scores, greedy=greedy[0])
    best = max(range(len(scores)), key=lambda i: (scores[i], -i))
    lengths = [length or 1e-300 for length in item.lengths]
    by_length = max(range(len(scores)), key=lambda i: (scores[i] / lengths[i], -i))
    return Outcome(scores, item.gold, best, by_length)


def test_scores_equal_a_loop(
    pair: tuple[FakeRunnable, FakeRunnable], tasks: list[TaskData]
) -> None:
    (found,) = run([pair[1]], pair[0], tasks, batch_tokens=500)
    for task, result in zip(tasks, found, strict=True):
        if task.name == "wikitext":
            continue
        for runnable, outcomes in zip(
            pair, (result.reference_outcomes, result.outcomes), strict=True
        ):
            for item, outcome in zip(task.items, outcomes, strict=True):
                assert isinstance(item, Item)
                expected = naive(runnable, item)
                scores = expected.log_likelihoods
                assert outcome.log_likelihoods == pytest.approx(scores, rel=1e-5)
                assert replace(outcome, log_likelihoods=scores) == expected


def test_results_say_what_they_are(
    pair: tuple[FakeRunnable, FakeRunnable], tasks: list[TaskData]
) -> None:
    found = run([pair[1], pair[0]], pair[0], tasks, labels=["small", "same"])
    assert [[r.task for r in of_one] for of_one in found] == [list(TASKS)] * 2
    for task, noisy, same in zip(tasks, *found, strict=True):
        metrics = TASKS[task.name].metrics
        changes = [f"{name}_change" for name in metrics]
        agreement = ["choice_agreement"] if "acc" in metrics else []
        assert list(noisy.metrics) == [*metrics, *changes, *agreement]
        assert list(noisy.reference_metrics) == list(metrics)
        assert noisy.reference_metrics == {name: same.metrics[name] for name in metrics}
        assert (noisy.label, noisy.identity) == ("small", "1" * 64)
        assert noisy.reference_identity == "0" * 64
        assert (noisy.digest, noisy.version, noisy.n) == (
            task.digest,
            task.version,
            len(task.items),
        )
        assert noisy.conditions.device == "cpu" and noisy.conditions.dtype == "float32"
        assert noisy.conditions.window_length == 256 and noisy.conditions.prefix_id == 0
        assert noisy.conditions.truncated == 0 and noisy.conditions.n_tokens > 0
        assert noisy.problems == same.problems == ()
        assert noisy.outcomes != noisy.reference_outcomes == same.outcomes
        for name in changes:
            assert same.metrics[name].value == same.metrics[name].se == 0.0
            assert noisy.metrics[name].value == pytest.approx(
                noisy.metrics[name[:-7]].value - same.metrics[name[:-7]].value
            )
        for name in agreement:
            assert same.metrics[name].value == 1.0


def test_without_a_reference(
    pair: tuple[FakeRunnable, FakeRunnable], tasks: list[TaskData]
) -> None:
    ((beside,), (alone,)) = (
        run([pair[1]], pair[0], tasks[:2]),
        run([pair[1]], None, tasks[:2]),
    )
    for with_reference, without in zip(beside, alone, strict=True):
        assert list(without.metrics) == list(TASKS[without.task].metrics)
        assert without.reference_metrics == {} and without.reference_outcomes == ()
        assert without.reference_identity is None
        for name, metric in without.metrics.items():
            assert metric.value == pytest.approx(with_reference.metrics[name].value, rel=1e-5)


def test_tasks_together_equal_tasks_alone(
    pair: tuple[FakeRunnable, FakeRunnable], tasks: list[TaskData]
) -> None:
    (together,) = run([pair[1]], None, tasks)
    for task, result in zip(tasks, together, strict=True):
        ((alone,),) = run([pair[1]], None, [task], batch_tokens=1)
        for ours, other in zip(result.outcomes, alone.outcomes, strict=True):
            assert ours.log_likelihoods == pytest.approx(other.log_likelihoods, rel=1e-5)
        assert result.conditions == alone.conditions


def test_choices_of_equal_text_are_equally_likely_and_the_first_is_taken(
    pair: tuple[FakeRunnable, FakeRunnable], tmp_path: Path
) -> None:
    texts = ["same", "b", "same", "c", "same"]
    row = {"question": "Q", "choices": {"text": texts, "label": list("ABCDE")}, "answerKey": "E"}
    file = write_rows(tmp_path, {"arc_easy": [row]})["arc_easy"]
    ((result,),) = run([pair[0]], None, [load_task("arc_easy", file)], batch_tokens=7)
    (outcome,) = result.outcomes
    assert outcome.log_likelihoods[0] == outcome.log_likelihoods[2] == outcome.log_likelihoods[4]
    assert outcome.choice not in (2, 4) and outcome.choice_norm not in (2, 4)


def test_outcomes_of_words_and_pages() -> None:
    """A word counts when all its tokens do; a page sums its windows, sizes by what is scored."""
    items = [Item("f", (("a", "bcd"),)), Item("g", (("a", "bc"),)), Page("p", "stuvwxyz", 4, 8)]
    requests = requests_of(items, pico_tokenizer(), 3, None)
    assert [w.scored for w in requests.windows] == [3, 2, 3, 3, 1]
    nll_W, greedy_W = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 2.0, 3.0, 3.0, 1.0])
    partly, wholly, page = outcomes_of(items, requests, nll_W, greedy_W)
    assert partly == Outcome((-1.0,), greedy=False)
    assert wholly == Outcome((-2.0,), greedy=True)
    assert page == Outcome((-12.0,), n_words=3.5, n_bytes=7.0)


def test_a_stored_baseline_gives_the_same_changes(
    pair: tuple[FakeRunnable, FakeRunnable], tasks: list[TaskData]
) -> None:
    (found,) = run([pair[1]], pair[0], tasks)
    for result in found:
        text = json.dumps([o.to_json() for o in result.reference_outcomes], allow_nan=False)
        stored = [Outcome.from_json(fields) for fields in json.loads(text)]
        assert tuple(stored) == result.reference_outcomes
        changes = change_metrics(TASKS[result.task].metrics, result.outcomes, stored)
        assert changes.items() <= result.metrics.items()
    right = Outcome((-1.0, -2.0), gold=0, choice=0, choice_norm=0)
    with pytest.raises(MismatchError, match="baseline: expected 2 items, got 1"):
        change_metrics(("acc", "acc_norm"), [right] * 2, [right])


def test_a_bundle_beside_its_checkpoint(tmp_path: Path, tasks: list[TaskData]) -> None:
    checkpoint = pico_checkpoint(tmp_path / "c", max_position_embeddings=256)
    build(checkpoint, tmp_path / "full.tol", dtype="f32", progress=SilentProgress())
    compress(checkpoint, tmp_path / "2.tol", CompressSpec(rank="2"), progress=SilentProgress())
    full, small = load_runnable(tmp_path / "full.tol"), load_runnable(tmp_path / "2.tol")
    exact, lossy = run([full, small], load_runnable(checkpoint), tasks)
    for of_full, of_small in zip(exact, lossy, strict=True):
        assert of_full.problems == of_small.problems == ()
        for name in TASKS[of_full.task].metrics:
            value = of_full.metrics[name].value
            assert of_full.reference_metrics[name].value == pytest.approx(value, rel=1e-4)
        if "choice_agreement" in of_full.metrics:
            assert of_full.metrics["choice_agreement"].value == 1.0
        assert of_small.outcomes != of_small.reference_outcomes
    assert any(r.metrics["choice_agreement"].value < 1 for r in lossy[:-1])


# Models that say nothing, and what does not belong together.


def broken_model(fill: float) -> FakeRunnable:
    model = pico_model(tie_word_embeddings=False, max_position_embeddings=256)
    assert model.lm_head is not None
    with torch.no_grad():
        model.lm_head.weight.fill_(fill)
    return FakeRunnable(model, None, pico_tokenizer())


def test_nan_logits_are_a_problem(
    pair: tuple[FakeRunnable, FakeRunnable], tasks: list[TaskData]
) -> None:
    (found,) = run([broken_model(math.nan)], pair[0], tasks, labels=["bad"])
    for task, result in zip(tasks, found, strict=True):
        where = task.items[0].where
        assert result.problems == (f"bad: NaN or infinite logits, first in {where}",)
        assert all(math.isnan(metric.value) for metric in result.metrics.values())
        assert all(math.isfinite(metric.value) for metric in result.reference_metrics.values())
    (found,) = run([pair[0]], broken_model(math.nan), tasks)
    assert all("reference: NaN" in result.problems[0] for result in found)


def test_a_model_that_says_nothing_is_a_problem(tasks: list[TaskData]) -> None:
    (found,) = run([broken_model(0.0)], None, tasks, labels=["flat"])
    for result in found:
        assert result.problems == (
            "flat: all logits are equal at every position; the model says nothing",
        )


def test_equally_likely_choices_are_a_problem(
    pair: tuple[FakeRunnable, FakeRunnable], tmp_path: Path
) -> None:
    rows = [{**row, "sol2": row["sol1"]} for row in ROWS["piqa"]]
    task = load_task("piqa", write_rows(tmp_path, {"piqa": rows})["piqa"])
    ((result,),) = run([pair[0]], None, [task])
    assert result.problems == ("checkpoint: the choices of every item of piqa are equally likely",)


def test_what_cannot_be_run(pair: tuple[FakeRunnable, FakeRunnable], tasks: list[TaskData]) -> None:
    with pytest.raises(UsageError, match="candidates: none given"):
        run([], pair[0], tasks)
    with pytest.raises(UsageError, match="tasks: none given"):
        run([pair[0]], None, [])
    with pytest.raises(UsageError, match="window: 257 tokens, checkpoint reads at most 256"):
        run([pair[0]], None, tasks, window=257)
    with pytest.raises(UsageError, match="window: 0 tokens"):
        run([pair[0]], None, tasks, window=0)
    with pytest.raises(UsageError, match="prefix_id: expected a token id below 96, got 96"):
        run([pair[0]], None, tasks, prefix_id=96)
    with pytest.raises(ResourceError, match="device: cuda:99 is not here"):
        run([pair[0]], None, tasks, device="cuda:99")
    other = FakeRunnable(pico_model(vocab_size=90), None, pico_tokenizer())
    with pytest.raises(MismatchError, match="vocabulary of another size"):
        run([other], pair[0], tasks)
    with pytest.raises(MismatchError, match=r"gives token id 9., the models' vocabulary has 90"):
        run([other], None, tasks)


def test_the_shortest_model_sets_the_window(
    pair: tuple[FakeRunnable, FakeRunnable], tasks: list[TaskData]
) -> None:
    short = FakeRunnable(pico_model(max_position_embeddings=64), None, pico_tokenizer())
    (found,) = run([short], pair[0], tasks)
    assert {result.conditions.window_length for result in found} == {64}
    assert {result.task for result in found if result.conditions.truncated} >= {"hellaswag"}
    ((narrow,),) = run([pair[0]], None, tasks[1:2], window=40, prefix_id=7)
    assert narrow.conditions.truncated == 3 and narrow.conditions.prefix_id == 7


def test_models_are_left_as_they_are(
    pair: tuple[FakeRunnable, FakeRunnable], tasks: list[TaskData]
) -> None:
    before = {name: value.clone() for name, value in pair[0].model.state_dict().items()}
    ((result, *_),) = run([pair[0]], None, tasks, dtype="bfloat16")
    assert isinstance(result, TaskResult) and result.conditions.dtype == "bfloat16"
    model: Decoder = pair[0].model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
