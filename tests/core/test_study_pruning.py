"""Pruning methods against slow and obvious versions, and a whole model pruned."""

from __future__ import annotations

import math

import pytest
import torch
from _pico import pico_ids, pico_model

from tolkit.errors import NonFiniteError, UsageError
from tolkit.model import count_parameters
from tolkit.progress import SilentProgress
from tolkit.study.prune import block_values, projections, prune, sparsity_for
from tolkit.study.pruning_methods import METHODS, Pruner, magnitude, sparse_gpt, wanda

DENSE = pico_model("dense")


def layer(outputs: int, inputs: int, rows: int = 400, seed: int = 0) -> tuple:
    """A weight, correlated input rows with columns of unlike size, and their X^T X."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mix = torch.randn(inputs, inputs, generator=generator) / math.sqrt(inputs)
    size = torch.rand(inputs, generator=generator) * 3 + 0.05
    states = (torch.randn(rows, inputs, generator=generator) @ mix) * size
    return weight, states, (states.double().T @ states.double())


def error(weight: torch.Tensor, pruned: torch.Tensor, states: torch.Tensor) -> float:
    return float(((states @ (weight - pruned).T) ** 2).sum())


def wanda_by_loops(weight: torch.Tensor, states: torch.Tensor, per_row: int) -> torch.Tensor:
    result = weight.clone()
    for output in range(weight.shape[0]):
        scores = []
        for i in range(weight.shape[1]):
            norm = math.sqrt(sum(float(x) ** 2 for x in states[:, i]))
            scores.append((abs(float(weight[output, i])) * norm, i))
        for _, i in sorted(scores)[:per_row]:
            result[output, i] = 0.0
    return result


def sparse_gpt_by_inverses(
    weight: torch.Tensor, hessian: torch.Tensor, gone: torch.Tensor
) -> torch.Tensor:
    """Column by column, the inverse of the trailing Hessian worked out anew each time."""
    size = hessian.shape[0]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    result = weight.double().clone()
    for i in range(size):
        inverse = torch.linalg.inv(damped[i:, i:])
        for output in range(weight.shape[0]):
            if gone[output, i]:
                loss = result[output, i] / inverse[0, 0]
                result[output, i:] -= loss * inverse[0]
                result[output, i] = 0.0
    return result


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.13, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(12, 20), (7, 300), (5, 1)])
def test_exactly_the_asked_share_goes(
    method: Pruner, sparsity: float, shape: tuple[int, int]
) -> None:
    weight, _, hessian = layer(*shape)
    before = weight.clone()
    pruned = method(weight, hessian, sparsity)
    assert int((pruned == 0).sum()) == round(sparsity * weight.numel())
    assert torch.equal(weight, before)
    assert pruned.dtype == weight.dtype
    if sparsity == 0.0:
        assert torch.equal(pruned, weight)


def test_magnitude_takes_the_smallest() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0], [0.5, -4.0, 1.0]])
    pruned = magnitude(weight, None, 0.5)
    assert pruned.tolist() == [[3.0, 0.0, 2.0], [0.0, -4.0, 0.0]]


def test_wanda_equals_loops_over_outputs_and_inputs() -> None:
    weight, states, hessian = layer(6, 10, rows=50)
    assert torch.equal(wanda(weight, hessian, 0.3), wanda_by_loops(weight, states, 3))
    assert torch.equal(wanda(weight, hessian, 0.8), wanda_by_loops(weight, states, 8))


def test_wanda_shares_out_what_does_not_divide() -> None:
    weight, _, hessian = layer(8, 5)
    zeros = (wanda(weight, hessian, 0.5) == 0).sum(dim=1)
    assert sorted(set(zeros.tolist())) == [2, 3]
    assert int(zeros.sum()) == 20


def test_sparse_gpt_makes_up_for_losses_as_the_naive_one() -> None:
    weight, _, hessian = layer(6, 24)
    pruned = sparse_gpt(weight, hessian, 0.5)
    expected = sparse_gpt_by_inverses(weight, hessian, pruned == 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-5, atol=1e-6)


def test_sparse_gpt_over_several_blocks_of_columns() -> None:
    weight, _, hessian = layer(4, 300, rows=900)
    pruned = sparse_gpt(weight, hessian, 0.4)
    expected = sparse_gpt_by_inverses(weight, hessian, pruned == 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_the_better_method_has_the_lower_output_error(sparsity: float) -> None:
    weight, states, hessian = layer(32, 48)
    errors = {
        name: error(weight, m(weight, hessian, sparsity), states) for name, m in METHODS.items()
    }
    assert 0 < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    weight, states, _ = layer(8, 16)
    states[:, [2, 5, 7, 11]] = 0.0
    pruned = sparse_gpt(weight, states.double().T @ states.double(), 0.25)
    assert bool((pruned[:, [2, 5, 7, 11]] == 0).all())
    assert error(weight, pruned, states) == pytest.approx(0.0, abs=1e-6)


def test_fewer_calibration_rows_than_inputs() -> None:
    weight, states, hessian = layer(8, 40, rows=10)
    pruned = sparse_gpt(weight, hessian, 0.5)
    assert bool(torch.isfinite(pruned).all())
    assert error(weight, pruned, states) < error(weight, magnitude(weight, None, 0.5), states)


# Whole models.


def inputs_of(model: object, index: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each projection of a layer reads, by multiplying its weight with the identity's trick:
    recorded where F.linear is called."""
    found: dict[str, torch.Tensor] = {}
    block = model.block(index)  # type: ignore[attr-defined]
    by_weight = {id(linear.weight): name for name, linear in projections(block).items()}
    original = torch.nn.functional.linear

    def recording(states: torch.Tensor, weight: torch.Tensor, bias: object = None) -> torch.Tensor:
        if id(weight) in by_weight:
            found[by_weight[id(weight)]] = states.detach().flatten(0, -2)
        return original(states, weight)

    torch.nn.functional.linear = recording
    try:
        with torch.no_grad():
            model(ids)  # type: ignore[operator]
    finally:
        torch.nn.functional.linear = original
    return found


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_pruned_by_what_pruned_layers_give(method: str) -> None:
    """Layer 0 from the dense model's inputs; layer 1 from inputs with layer 0 already pruned."""
    ids = pico_ids(6, 24)
    pruned = prune(DENSE, method, 0.4, ids, SilentProgress(), batch=4)
    half = pico_model("dense")
    for index in range(2):
        seen = inputs_of(half, index, ids)
        assert len(seen) == 7
        for name, linear in projections(half.block(index)).items():
            states = seen[name].double()
            expected = METHODS[method](linear.weight.detach(), states.T @ states, 0.4)
            found = projections(pruned.block(index))[name].weight
            assert torch.equal(found == 0, expected == 0)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
            seen[name] = expected
        with torch.no_grad():
            for name, linear in projections(half.block(index)).items():
                linear.weight.copy_(seen[name])


@pytest.mark.parametrize("method", METHODS)
def test_zero_sparsity_changes_no_logit(method: str) -> None:
    ids = pico_ids(3, 20)
    pruned = prune(DENSE, method, 0.0, ids, SilentProgress())
    with torch.no_grad():
        assert torch.equal(pruned(ids), DENSE(ids))


def test_the_original_and_everything_but_projections_stay() -> None:
    before = {name: weight.clone() for name, weight in DENSE.state_dict().items()}
    pruned = prune(DENSE, "wanda", 0.5, pico_ids(3, 20), SilentProgress())
    for name, weight in pruned.state_dict().items():
        assert torch.equal(DENSE.state_dict()[name], before[name])
        assert torch.equal(weight, before[name]) == ("_proj" not in name), name


def test_magnitude_needs_no_text() -> None:
    none = torch.empty(0, 1, dtype=torch.int64)
    pruned = prune(DENSE, "magnitude", 0.5, none, SilentProgress())
    with_text = prune(DENSE, "magnitude", 0.5, pico_ids(), SilentProgress())
    assert torch.equal(
        pruned.block(0).mlp.down_proj.weight, with_text.block(0).mlp.down_proj.weight
    )  # type: ignore[union-attr]


def test_as_many_block_parameters_remain_as_the_target_has_active() -> None:
    config = DENSE.config
    total = count_parameters(config).total
    target = count_parameters(pico_model("memory").config).active
    sparsity = sparsity_for(DENSE, total, target)
    pruned = prune(
        DENSE, "magnitude", sparsity, torch.empty(0, 1, dtype=torch.int64), SilentProgress()
    )
    remaining = total - block_values(DENSE)
    remaining += sum(
        int((linear.weight != 0).sum())
        for index in range(2)
        for linear in projections(pruned.block(index)).values()
    )
    assert abs(remaining - target) <= 7 * 2  # a matrix is rounded to whole weights


def test_targets_that_no_pruning_reaches() -> None:
    total = count_parameters(DENSE.config).total
    for target in (total, total + 1, total - block_values(DENSE)):
        with pytest.raises(UsageError, match=r"against: has .* active block parameters"):
            sparsity_for(DENSE, total, target)


def test_only_dense_models_are_pruned() -> None:
    with pytest.raises(UsageError, match="only dense models are pruned"):
        prune(pico_model("memory"), "wanda", 0.5, pico_ids(), SilentProgress())


def test_activations_that_are_no_numbers_are_named() -> None:
    broken = pico_model("dense")
    with torch.no_grad():
        broken.block(1).self_attn.v_proj.weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="calibration: layer 1's mixed input is NaN"):
        prune(broken, "sparsegpt", 0.5, pico_ids(), SilentProgress())
