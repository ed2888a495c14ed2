"""Choosing tokens: transformers' own warpers as judges, laws of the draw, refusals."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from tolkit.errors import NonFiniteError, UsageError
from tolkit.runtime.sampling import GenerateSpec, Sampler, filtered, penalised

V = 300


def scores(rows: int = 20, width: int = V, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def theirs(spec: GenerateSpec, scores_BV: torch.Tensor) -> torch.Tensor:
    """The same through transformers' classes, in the order its generate applies them."""
    process = pytest.importorskip("transformers.generation.logits_process")
    warpers = [process.TemperatureLogitsWarper(spec.heat)]
    if spec.top_k:
        warpers.append(process.TopKLogitsWarper(spec.top_k))
    if spec.top_p is not None and spec.top_p < 1:
        warpers.append(process.TopPLogitsWarper(spec.top_p))
    if spec.min_p:
        warpers.append(process.MinPLogitsWarper(spec.min_p))
    ids = torch.zeros(len(scores_BV), 1, dtype=torch.int64)
    for warper in warpers:
        scores_BV = warper(ids, scores_BV)
    return scores_BV


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 10_000},
        {"top_p": 0.01},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"top_p": 1.0},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.99},
    ],
    ids=str,
)
def test_filters_equal_transformers(fields: dict[str, Any]) -> None:
    spec = GenerateSpec(**fields)
    given_BV = scores()
    before = given_BV.clone()
    ours_BV = filtered(given_BV, spec)
    assert torch.equal(given_BV, before)
    assert torch.equal(ours_BV, theirs(spec, given_BV))


def test_ties_at_the_border_of_top_k_stay() -> None:
    spec = GenerateSpec(top_k=2)
    given_BV = torch.tensor([[1.0, 3.0, 1.0, 0.0]])
    kept = torch.isfinite(filtered(given_BV, spec))
    assert kept.tolist() == [[True, True, True, False]]
    assert torch.equal(filtered(given_BV, spec), theirs(spec, given_BV))


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_the_token_that_reaches_top_p_exactly_is_the_last(top_p: float) -> None:
    spec = GenerateSpec(top_p=top_p)
    even_BV = torch.zeros(1, 4)
    kept = int(torch.isfinite(filtered(even_BV, spec)).sum())
    assert kept == 4 * top_p
    assert kept == int(torch.isfinite(theirs(spec, even_BV)).sum())


def test_top_p_looks_past_its_first_candidates() -> None:
    flat_BV = scores(4, 5000) / 100  # nearly uniform: the mass lies in thousands of tokens
    peaked_BV = scores(4, 5000) * 10
    for given_BV in (flat_BV, peaked_BV, torch.cat((flat_BV, peaked_BV))):
        spec = GenerateSpec(top_p=0.9)
        kept = torch.isfinite(filtered(given_BV, spec)).sum(-1)
        want = torch.isfinite(theirs(spec, given_BV)).sum(-1)
        # The sums run in another order, so the last token of thousands may fall either way.
        assert (kept - want).abs().max() <= 1
    assert int(torch.isfinite(filtered(flat_BV, spec)).sum(-1).min()) > 1024


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_penalty_equals_transformers(penalty: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    given_BV = scores(3)
    seen = torch.tensor([[1, 2, 2, 299], [5, 5, 5, 5], [0, 1, 2, 3]])
    want = process.RepetitionPenaltyLogitsProcessor(penalty)(seen, given_BV.clone())
    assert torch.equal(penalised(given_BV, list(seen), penalty), want)


def test_greedy_is_the_likeliest_after_the_penalty() -> None:
    given_BV = torch.tensor([[1.0, 4.0, 3.0]])
    seen = [torch.tensor([1])]
    assert Sampler(GenerateSpec(), [0]).choose(given_BV, [0], seen) == [1]
    spec = GenerateSpec(repetition_penalty=2.0)
    assert Sampler(spec, [0]).choose(given_BV, [0], seen) == [2]


def test_draws_follow_the_probabilities() -> None:
    spec = GenerateSpec(temperature=1.0, seed=3)
    given_V = torch.tensor([0.0, 1.0, 2.0, -math.inf, 0.5])
    rows = 64
    sampler = Sampler(spec, range(rows))
    given_BV = given_V.expand(rows, -1)
    drawn = Counter[int]()
    for _ in range(100):
        drawn.update(sampler.choose(given_BV, range(rows), []))
    total = sum(drawn.values())
    for token, probability in enumerate(given_V.softmax(-1).tolist()):
        spread = math.sqrt(probability * (1 - probability) / total)
        assert abs(drawn[token] / total - probability) <= 4 * spread, token
    assert drawn[3] == 0


def test_a_row_draws_the_same_in_any_company() -> None:
    spec = GenerateSpec(temperature=1.5, seed=7)
    given_BV = scores(4)
    together = Sampler(spec, [0, 1, 2, 3])
    first = together.choose(given_BV, [0, 1, 2, 3], [])
    second = together.choose(given_BV[[1, 3]], [1, 3], [])
    alone = Sampler(spec, [3])
    assert alone.choose(given_BV[[3]], [0], []) == [first[3]]
    assert alone.choose(given_BV[[3]], [0], []) == [second[1]]
    many = [Sampler(replace_seed(seed), [0]).choose(given_BV[[0]], [0], []) for seed in range(40)]
    assert len({tuple(ids) for ids in many}) > 5


def replace_seed(seed: int) -> GenerateSpec:
    return GenerateSpec(temperature=1.5, seed=seed)


def test_the_heat_that_applies() -> None:
    assert GenerateSpec().heat == 0
    assert GenerateSpec(seed=4, repetition_penalty=1.1).heat == 0
    assert GenerateSpec(top_k=5).heat == 1
    assert GenerateSpec(top_p=0.9).heat == 1
    assert GenerateSpec(min_p=0.1).heat == 1
    assert GenerateSpec(top_p=0.9, temperature=0.0).heat == 0
    assert GenerateSpec(temperature=0.3).heat == 0.3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    given_BV = scores(2)
    given_BV[1, 7] = bad
    sampler = Sampler(GenerateSpec(temperature=temperature), [0, 1])
    with pytest.raises(NonFiniteError, match="not finite"):
        sampler.choose(given_BV, [0, 1], [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("batch", 0),
        ("context", 1),
    ],
)
def test_values_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{field}: expected .* got"):
        GenerateSpec(**{field: value})


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(UsageError, match="stop: "):
        GenerateSpec(stop=("",))
