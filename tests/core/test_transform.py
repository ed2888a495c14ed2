"""Moments, metric, transform and prediction against numpy on whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tolkit.compress.fill.allocate import widths_at
from tolkit.compress.fill.transform import Metric, Moments, fit_transform, quantise_rows
from tolkit.compress.fill.walk import Rows
from tolkit.compress.fill.walk_bands import BandsWalk
from tolkit.compress.spec import BandsWish
from tolkit.errors import NonFiniteError
from tolkit.parallel import BlockPool, block_pool

ROWS, WIDTH = 300, 9
POOL = BlockPool(1)


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets with uneven variances and a mean, unit rows, and positive weights."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((WIDTH, WIDTH)) * np.geomspace(3, 0.01, WIDTH)[:, None]
    targets = rng.standard_normal((ROWS, WIDTH)) @ mixing + rng.standard_normal(WIDTH)
    return targets, rng.standard_normal((ROWS, WIDTH)), rng.uniform(0.1, 4, ROWS)


def gram(parts: list[np.ndarray], weights: np.ndarray) -> torch.Tensor:
    joint = np.concatenate([np.ones((ROWS, 1)), *parts], axis=1)
    return torch.from_numpy((joint * weights[:, None]).T @ joint)


def sums(targets: np.ndarray, unit: np.ndarray, weights: np.ndarray) -> Moments:
    cross = torch.from_numpy((unit * weights[:, None]).T @ targets)
    return Moments.of_sums(gram([targets], weights), gram([unit], weights), cross)


def weighted(targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share = weights / weights.sum()
    mean = share @ targets
    return mean, ((targets - mean) * share[:, None]).T @ (targets - mean)


def test_moments_are_the_weighted_ones() -> None:
    targets, unit, weights = draw()
    alone = Moments.of_sums(gram([targets], weights))
    mean, cov = weighted(targets, weights)
    assert np.allclose(alone.mean_t, mean) and np.allclose(alone.cov_tt, cov)
    assert alone.cov_uu is None and alone.cov_ut is None
    both = sums(targets, unit, weights)
    joint_mean, joint = weighted(np.concatenate([targets, unit], axis=1), weights)
    assert both.mean_u is not None and np.allclose(both.mean_u, joint_mean[WIDTH:])
    assert np.allclose(both.cov_tt, joint[:WIDTH, :WIDTH])
    assert both.cov_ut is not None and np.allclose(both.cov_ut, joint[WIDTH:, :WIDTH])
    assert both.cov_uu is not None and np.allclose(both.cov_uu, joint[WIDTH:, WIDTH:])


def test_sums_that_overflowed_are_named() -> None:
    broken = gram([draw()[0]], np.ones(ROWS))
    broken[2, 3] = np.inf
    with pytest.raises(NonFiniteError, match="covariance"):
        Moments.of_sums(broken)


def test_without_a_metric_it_is_weighted_pca() -> None:
    targets, _, weights = draw()
    moments = Moments.of_sums(gram([targets], weights))
    fitted = fit_transform(moments, Metric(None, WIDTH), 0, POOL)
    values, vectors = np.linalg.eigh(weighted(targets, weights)[1])
    assert np.allclose(fitted.variances_R, values[::-1])
    overlap = np.abs(fitted.synthesis_RD.numpy() @ vectors[:, ::-1])
    assert np.allclose(overlap, np.eye(WIDTH), atol=1e-6)
    assert np.allclose(fitted.importance_R, 1)
    assert np.allclose(fitted.analysis_DR, fitted.synthesis_RD.T)
    assert np.allclose(fitted.mean_D, moments.mean_t, rtol=1e-3)


@pytest.mark.parametrize("with_metric", [False, True])
def test_all_coefficients_give_the_row_back(with_metric: bool) -> None:
    targets, _, weights = draw()
    metric = Metric(draw_metric(), WIDTH) if with_metric else Metric(None, WIDTH, 3.0)
    fitted = fit_transform(Moments.of_sums(gram([targets], weights)), metric, 0, POOL)
    centred = torch.from_numpy(targets) - fitted.mean_D
    coeffs = centred @ fitted.analysis_DR
    assert torch.allclose(coeffs @ fitted.synthesis_RD, centred, rtol=0, atol=1e-9)
    assert torch.allclose(fitted.synthesis_RD.norm(dim=1), torch.ones(WIDTH).double())
    # Uncorrelated, with the variances that are said; ordered by what they are worth.
    share = torch.from_numpy(weights / weights.sum())
    exact = torch.from_numpy(targets) - share @ torch.from_numpy(targets)
    turned = exact @ fitted.analysis_DR
    cov = turned.T @ (turned * share[:, None])
    assert torch.allclose(cov, torch.diag(fitted.variances_R), rtol=0, atol=1e-8)
    worth = fitted.variances_R * fitted.importance_R
    assert bool((worth[:-1] >= worth[1:] * (1 - 1e-9)).all())


def draw_metric() -> torch.Tensor:
    root = torch.from_numpy(np.random.default_rng(7).standard_normal((WIDTH, WIDTH)))
    return root @ root.T


def test_importance_is_what_an_error_costs_in_the_metric() -> None:
    targets, _, weights = draw()
    metric = Metric(draw_metric(), WIDTH)
    floor = 0.01 * draw_metric().diagonal().mean() * torch.eye(WIDTH)
    fitted = fit_transform(Moments.of_sums(gram([targets], weights)), metric, 0, POOL)
    for r in range(WIDTH):
        error_D = fitted.synthesis_RD[r]
        cost = float(error_D @ (draw_metric() + floor) @ error_D)
        assert cost == pytest.approx(float(fitted.importance_R[r]), rel=1e-6)


@pytest.mark.parametrize("diagonal", [[0.0] * WIDTH, [1.0] + [0.0] * (WIDTH - 1)])
def test_a_metric_with_zeros_survives(diagonal: list[float]) -> None:
    metric = Metric(torch.diag(torch.tensor(diagonal)), WIDTH)
    moments = Moments.of_sums(gram([draw()[0]], np.ones(ROWS)))
    fitted = fit_transform(moments, metric, 0, POOL)
    for part in (fitted.analysis_DR, fitted.synthesis_RD, fitted.importance_R, fitted.variances_R):
        assert bool(torch.isfinite(part).all())
    assert bool((fitted.importance_R > 0).all())


def test_a_table_of_zeros_or_constants_survives() -> None:
    for value in (0.0, 4.0):
        targets = np.full((ROWS, WIDTH), value)
        moments = Moments.of_sums(gram([targets], np.ones(ROWS)))
        fitted = fit_transform(moments, Metric(None, WIDTH), 0, POOL)
        assert np.allclose(fitted.mean_D, value) and float(fitted.variances_R.max()) < 1e-12
        assert bool(torch.isfinite(fitted.synthesis_RD).all())


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_prediction_takes_the_linear_part_away(bits: int) -> None:
    targets, unit, weights = draw()
    weights_DD = np.random.default_rng(1).standard_normal((WIDTH, WIDTH))
    linear = unit @ weights_DD.T + 0.05 * targets
    moments = sums(linear, unit, weights)
    plain = fit_transform(moments, Metric(None, WIDTH), 0, POOL)
    fitted = fit_transform(moments, Metric(None, WIDTH), bits, POOL)
    assert plain.predictor is None and fitted.predictor is not None
    # What is said to be left is left: rounded weights, and the mean that goes with them.
    left = linear - unit @ fitted.predictor.values_RD.numpy().T
    mean, cov = weighted(left, weights)
    assert np.allclose(fitted.mean_D, mean, atol=2e-3 * np.abs(mean).max())
    assert float(fitted.variances_R.sum()) == pytest.approx(float(np.trace(cov)), rel=1e-6)
    share = float(fitted.variances_R.sum() / plain.variances_R.sum())
    assert share < {2: 0.5, 3: 0.1, 8: 0.01}[bits]


def test_nothing_is_predicted_where_nothing_is_linear() -> None:
    targets, _, _ = draw()
    zeros = np.zeros((ROWS, WIDTH))
    moments = sums(targets, zeros, np.ones(ROWS))
    assert fit_transform(moments, Metric(None, WIDTH), 3, POOL).predictor is None


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_rounded_to_the_nearest_code(bits: int) -> None:
    rows = torch.from_numpy(draw()[0][:5]) * 1e-6
    rows[2] = 0
    quantised = quantise_rows(rows, bits)
    largest = 2 ** (bits - 1) - 1
    assert int(quantised.codes_RD.abs().max()) <= largest
    halves = quantised.scales_R.half().double()
    assert bool((halves == quantised.scales_R).all()) and not quantised.values_RD[2].any()
    step = quantised.scales_R[:, None] * 2.0**quantised.exponent
    assert bool(((quantised.values_RD - rows).abs() <= 0.51 * step + 1e-300).all())


def test_a_walk_hands_on_what_a_layer_loses() -> None:
    """The second layer is fitted to its table plus table minus decoded of the first."""
    rng = np.random.default_rng(3)
    tables = torch.from_numpy(rng.standard_normal((2, ROWS, WIDTH))).float()
    kept: dict[str, np.ndarray] = {}
    rows = Rows(
        ranges=((0, 100), (100, ROWS)),
        tier_rows=(100, 200),
        shares_V=torch.ones(ROWS).double(),
        weights_V=torch.ones(ROWS).double(),
        unit=None,
        scratch=lambda name: kept.setdefault(name, np.empty((ROWS, WIDTH), np.float32)),
        keep=lambda name, shape: np.empty(shape, np.float32),
    )
    with block_pool(1) as pool:
        walk = BandsWalk(rows, BandsWish("klt", 0), pool, price=0.1, feedback=True)
        fits = [
            walk.fit(lambda a, b, t=t: tables[t, a:b], WIDTH, Metric(None, WIDTH), None)
            for t in range(2)
        ]
    fit = fits[0]
    assert fit.basis is not None
    widths_TR = widths_at(fit.need.worth_TR, 0.1)
    decoded = np.zeros((ROWS, WIDTH))
    for n in range(ROWS):
        tier = int(n >= 100)
        row = tables[0, n].double() - fit.mean_D
        decoded[n] = fit.mean_D
        for r, coeff in enumerate((row @ fit.analysis_DR.double()).tolist()):
            bits = int(widths_TR[tier, r])
            scale = fit.variances_TR[tier, r] ** 0.5
            if bits:
                value = min(fit.codebook(bits), key=lambda v: abs(v - coeff / scale))
                decoded[n] += value * scale * fit.basis.values_RD[r].numpy()
    target = tables[1].numpy() + tables[0].numpy() - decoded
    mean, cov = weighted(target, np.ones(ROWS))
    assert np.allclose(fits[1].mean_D, mean, atol=2e-3)
    total = float((np.array([100, 200]) / ROWS) @ fits[1].variances_TR.sum(axis=1))
    assert total == pytest.approx(float(np.trace(cov)), rel=0.02)
    assert 0.02 < np.square(tables[0].numpy() - decoded).mean() < 0.5
