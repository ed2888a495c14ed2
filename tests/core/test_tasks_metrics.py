"""Metrics of tasks and their changes, by hand and from weights of single items."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from tolkit.evaluate.tasks import Outcome, change_metrics, task_metrics

ACC = ("acc", "acc_norm")
PAGE = ("ppl_word", "ppl_byte", "bits_per_byte")


def test_metrics_by_hand() -> None:
    outcomes = [
        Outcome((-1.0, -2.0), gold=0, choice=0, choice_norm=1),
        Outcome((-1.0, -2.0), gold=1, choice=0, choice_norm=1),
        Outcome((-3.0, -2.0), gold=1, choice=1, choice_norm=1),
        Outcome((-3.0, -2.0), gold=1, choice=1, choice_norm=0),
    ]
    found = task_metrics(ACC, outcomes)
    assert found["acc"].value == 0.75 and found["acc_norm"].value == 0.5
    assert found["acc"].se == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert found["acc_norm"].se == pytest.approx(np.std([0, 1, 1, 0], ddof=1) / 2)
    assert found["acc"].n == 4
    for end in found["acc"].interval:  # Wilson's: where 0.75 would just be 1.96 errors away
        assert abs(end - 0.75) == pytest.approx(1.95996 * math.sqrt(end * (1 - end) / 4), rel=1e-5)

    words = [Outcome((-1.0,), greedy=True), Outcome((-3.0,), greedy=False)]
    found = task_metrics(("perplexity", "acc"), words)
    assert found["perplexity"].value == pytest.approx(math.exp(2))
    assert found["perplexity"].se == pytest.approx(math.exp(2) * 1.0)
    assert found["acc"].value == 0.5

    pages = [Outcome((-10.0,), n_words=2, n_bytes=10), Outcome((-30.0,), n_words=6, n_bytes=40)]
    found = task_metrics(PAGE, pages)
    assert found["ppl_word"].value == pytest.approx(math.exp(40 / 8))
    assert found["ppl_byte"].value == pytest.approx(math.exp(40 / 50))
    assert found["bits_per_byte"].value == pytest.approx(40 / 50 / math.log(2))
    assert (found["ppl_word"].n, found["ppl_byte"].n) == (8, 50)


def drawn(seed: int, count: int = 40) -> dict[tuple[str, ...], list[Outcome]]:
    rng = np.random.default_rng(seed)
    sizes = np.random.default_rng(99).integers(5, 60, count)
    return {
        ACC: [
            Outcome((-1.0, -2.0), int(g), int(c), int(d))
            for g, c, d in np.c_[np.arange(count) % 2, rng.integers(0, 2, (count, 2))]
        ],
        ("perplexity", "acc"): [
            Outcome((-float(x),), greedy=bool(x < 2)) for x in rng.gamma(3.0, 1.0, count)
        ],
        PAGE: [
            Outcome((-float(x * s),), n_words=float(s), n_bytes=float(5 * s))
            for x, s in zip(rng.gamma(3.0, 1.0, count), sizes, strict=True)
        ],
    }


def weighted(name: str, outcomes: list[Outcome], weights: np.ndarray) -> float:
    """A metric where item i counts `weights[i]` times, written out."""
    nll = weights @ [-o.log_likelihoods[0] for o in outcomes]
    if name in ("acc", "acc_norm"):
        field = {"acc": "choice", "acc_norm": "choice_norm"}[name]
        right = [
            float(o.greedy) if o.gold is None else float(getattr(o, field) == o.gold)
            for o in outcomes
        ]
        return float(weights @ right / weights.sum())
    below = {
        "perplexity": weights.sum(),
        "ppl_word": weights @ [o.n_words for o in outcomes],
        "ppl_byte": weights @ [o.n_bytes for o in outcomes],
        "bits_per_byte": weights @ [o.n_bytes for o in outcomes],
    }[name]
    return nll / below / math.log(2) if name == "bits_per_byte" else math.exp(nll / below)


@pytest.mark.parametrize("names", [ACC, ("perplexity", "acc"), PAGE], ids="-".join)
def test_changes_and_their_errors_by_weights(names: tuple[str, ...]) -> None:
    """The error of any statistic from how it moves when one item counts a little more."""
    ours, theirs = drawn(1)[names], drawn(2)[names]
    found = change_metrics(names, ours, theirs)
    count, step = len(ours), 1e-5
    for name in names:

        def change(weights: np.ndarray, name: str = name) -> float:
            return weighted(name, ours, weights) - weighted(name, theirs, weights)

        pulls = [
            (change(np.eye(count)[i] * step + 1) - change(1 - np.eye(count)[i] * step)) / 2 / step
            for i in range(count)
        ]
        se = math.sqrt(count / (count - 1) * sum(pull**2 for pull in pulls))
        metric = found[f"{name}_change"]
        assert metric.value == pytest.approx(change(np.ones(count)))
        assert metric.se == pytest.approx(se, rel=1e-5)
        own = task_metrics((name,), ours)[name]
        assert own.value == pytest.approx(weighted(name, ours, np.ones(count)))


def test_agreement() -> None:
    ours, theirs = drawn(1), drawn(2)
    choices = change_metrics(ACC, ours[ACC], theirs[ACC])["choice_agreement"]
    same = [a.choice == b.choice for a, b in zip(ours[ACC], theirs[ACC], strict=True)]
    assert choices.value == pytest.approx(np.mean(same))
    assert choices.se == pytest.approx(np.std(same, ddof=1) / math.sqrt(len(same)))
    assert "choice_agreement" not in change_metrics(PAGE, ours[PAGE], theirs[PAGE])


def test_one_item_has_no_error() -> None:
    metric = task_metrics(("acc",), drawn(1)[ACC][:1])["acc"]
    assert math.isnan(metric.se) and metric.interval == (-math.inf, math.inf)
    change = change_metrics(("acc",), drawn(1)[ACC][:1], drawn(2)[ACC][:1])["acc_change"]
    assert math.isfinite(change.value) and math.isnan(change.se)
    assert change.interval == (-math.inf, math.inf)


def test_one_outcome_that_is_no_number_spoils_every_metric() -> None:
    for names, outcomes in drawn(1).items():
        broken = [*outcomes[:-1], replace(outcomes[-1], log_likelihoods=(math.nan,))]
        stored = Outcome.from_json(json.loads(json.dumps(broken[-1].to_json())))
        assert not stored.is_finite
        metrics = task_metrics(names, broken)
        metrics |= change_metrics(names, broken, outcomes)
        metrics |= change_metrics(names, outcomes, [*outcomes[:-1], stored])
        for name, metric in metrics.items():
            assert math.isnan(metric.value) and math.isnan(metric.se), name
