"""The tiled softmax against one that stores every logit in float64 and loops."""

from __future__ import annotations

import math

import pytest
import torch

from tolkit.evaluate.scoring import Tile, score_positions


def oracle(hidden_ND: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, V] in float64 from float32 logits."""
    return torch.log_softmax((hidden_ND @ head_VD.t()).double(), dim=-1)


def drawn(n: int, v: int, d: int, models: int, spread: float) -> tuple[list, list, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * v + d)
    base = torch.randn(n, d, generator=generator) * 3
    hidden = [base + spread * i * torch.randn(n, d, generator=generator) for i in range(models)]
    head = torch.randn(v, d, generator=generator) / math.sqrt(d)
    targets = torch.randint(0, v, (n,), generator=generator)
    return hidden, [head] * models, targets


@pytest.mark.parametrize(
    ("n", "v", "tile"),
    [
        (1, 2, Tile(4, 4)),
        (5, 7, Tile(2, 3)),
        (9, 64, Tile(4, 16)),
        (33, 200, Tile(8, 33)),
        (33, 200, Tile(1000, 1000)),
        (70, 300, Tile()),
    ],
)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1, 2.0])
def test_scores_equal_the_oracle(n: int, v: int, tile: Tile, spread: float) -> None:
    hidden, heads, targets = drawn(n, v, 16, 3, spread)
    found = score_positions(hidden, heads, targets, with_reference=True, tile=tile)
    truth = [oracle(h, w) for h, w in zip(hidden, heads, strict=True)]
    for model, scores in enumerate(found):
        expected = -truth[model].gather(1, targets[:, None])[:, 0]
        assert torch.allclose(scores.nll, expected, atol=2e-6, rtol=0)
        if model == 0:
            assert scores.kl is None and scores.agrees is None
            continue
        assert scores.kl is not None and scores.agrees is not None
        kl = torch.zeros(n, dtype=torch.float64)
        for i in range(n):
            for token in range(v):
                log_p, log_q = truth[0][i, token], truth[model][i, token]
                kl[i] += log_p.exp() * (log_p - log_q)
        assert torch.allclose(scores.kl, kl, atol=2e-6, rtol=1e-5)
        assert torch.equal(scores.agrees, truth[0].argmax(-1) == truth[model].argmax(-1))
        if spread == 0.0:
            assert torch.equal(scores.kl, torch.zeros(n, dtype=torch.float64))


def test_models_without_a_reference_are_scored_alone() -> None:
    hidden, heads, targets = drawn(20, 50, 8, 2, 0.5)
    found = score_positions(hidden, heads, targets, with_reference=False, tile=Tile(8, 16))
    for model, scores in enumerate(found):
        expected = -oracle(hidden[model], heads[model]).gather(1, targets[:, None])[:, 0]
        assert torch.allclose(scores.nll, expected, atol=2e-6, rtol=0)
        assert scores.kl is None


def test_large_and_shifted_logits_keep_their_precision() -> None:
    """A constant added to all logits changes nothing; peaks of 80 do not overflow."""
    hidden, heads, targets = drawn(16, 120, 8, 2, 0.01)
    hidden = [torch.cat([20 * h, torch.ones(16, 1)], dim=1) for h in hidden]
    heads = [
        torch.cat([w, torch.full((120, 1), c)], 1) for w, c in zip(heads, (0, 500), strict=True)
    ]
    found = score_positions(hidden, heads, targets, with_reference=True, tile=Tile(16, 50))
    truth = [oracle(h, w) for h, w in zip(hidden, heads, strict=True)]
    kl = (truth[0].exp() * (truth[0] - truth[1])).sum(-1)
    assert found[1].kl is not None
    assert torch.allclose(found[1].kl, kl, atol=1e-3, rtol=0)
    assert torch.isfinite(found[1].kl).all()


def test_the_top_token_may_lie_in_any_tile() -> None:
    """Reference and candidate peak in every pair of tiles; only equal peaks agree."""
    v, width = 12, 3
    pairs = [(a, b) for a in range(v) for b in range(v)]
    hidden = [torch.zeros(len(pairs), v) for _ in range(2)]
    for row, pair in enumerate(pairs):
        for model in (0, 1):
            hidden[model][row, pair[model]] = 5.0
    eye = torch.eye(v)
    targets = torch.zeros(len(pairs), dtype=torch.int64)
    found = score_positions(hidden, [eye, eye], targets, with_reference=True, tile=Tile(7, width))
    assert found[1].agrees is not None
    assert found[1].agrees.tolist() == [a == b for a, b in pairs]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [0, 5, 11])
@pytest.mark.parametrize("model", [0, 1])
def test_a_bad_logit_makes_its_position_nan_and_no_other(
    bad: float, token: int, model: int
) -> None:
    hidden, heads, targets = drawn(6, 12, 4, 2, 0.1)
    heads = [heads[0].clone(), heads[1].clone()]
    hidden = [torch.cat([h, torch.zeros(6, 1)], 1) for h in hidden]
    heads = [torch.cat([w, torch.zeros(12, 1)], 1) for w in heads]
    hidden[model][2, 4] = 1.0
    # A huge weight that only position 2 multiplies by something; its logit overflows.
    heads[model][token, 4] = math.copysign(3.4e38, bad) if math.isinf(bad) else 0.0
    hidden[model][2, 4] = 4.0 if math.isinf(bad) else math.nan
    found = score_positions(hidden, heads, targets, with_reference=True, tile=Tile(4, 5))
    finite = torch.isfinite(found[model].nll)
    assert finite.tolist() == [True, True, False, True, True, True]
    assert found[1].kl is not None
    assert torch.isfinite(found[1].kl).tolist() == finite.tolist()
    assert torch.isnan(found[1].kl[2])


def test_equal_logits_are_called_flat() -> None:
    hidden = [torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 1.0]])]
    head = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.5]])
    targets = torch.tensor([0, 1, 2])
    (scores,) = score_positions(hidden, [head], targets, with_reference=False, tile=Tile(2, 2))
    assert scores.flat.tolist() == [False, True, False]
    assert scores.nll[1] == pytest.approx(math.log(3))


def test_half_precision_logits_are_scored_in_float32() -> None:
    hidden, heads, targets = drawn(30, 90, 16, 2, 0.2)
    rounded = [t.bfloat16() for t in hidden], [t.bfloat16() for t in heads]
    found = score_positions(*rounded, targets, with_reference=True, tile=Tile(8, 40))
    truth = [torch.log_softmax((h @ w.t()).double(), -1) for h, w in zip(*rounded, strict=True)]
    kl = (truth[0].exp() * (truth[0] - truth[1])).sum(-1)
    assert found[1].kl is not None
    assert torch.allclose(found[1].kl, kl, atol=1e-2, rtol=1e-2)
    assert found[1].nll.dtype == torch.float64
