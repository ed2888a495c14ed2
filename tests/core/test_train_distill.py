"""Loss of learning from another model, against torch's own on whole logits; frozen rows."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from _pico import pico_ids, pico_model

from tolkit.model import FfnRows
from tolkit.train import loss as loss_module
from tolkit.train.distill import Teacher, distill_loss
from tolkit.train.frozen import FrozenRows
from tolkit.train.step import accumulate_gradients, mean_loss


def inputs(positions: int, vocabulary: int = 37) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 8, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, 8, generator=generator, requires_grad=True)
    teacher = torch.randn(positions, 5, generator=generator)
    teacher_head = torch.randn(vocabulary, 5, generator=generator)
    targets = torch.randint(0, vocabulary, (positions,), generator=generator)
    return hidden, head, teacher, teacher_head, targets


def naive(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL, cross-entropy and the sum of squared logsumexps over whole logits."""
    logits = hidden @ head.T
    wanted = F.log_softmax(teacher @ teacher_head.T, -1)
    kl = F.kl_div(F.log_softmax(logits, -1), wanted, log_target=True, reduction="sum")
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    return kl, cross_entropy, torch.logsumexp(logits, -1).square().sum()


@pytest.mark.parametrize("positions", [1, 6, 7, 8, 20])
@pytest.mark.parametrize(("weight", "z_weight"), [(1.0, 0.0), (0.3, 0.2)])
def test_values_and_gradients_equal_whole_logits(
    positions: int, weight: float, z_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_POSITIONS", 7)
    given = inputs(positions)
    found = distill_loss(*given, weight=weight, z_weight=z_weight, scale=0.25)
    (3.0 * found.total).backward()
    kl, cross_entropy, squares = naive(*given)
    total = weight * kl + (1 - weight) * cross_entropy + z_weight * squares
    expected = torch.autograd.grad(3.0 * 0.25 * total, given[:2])
    assert found.kl is not None
    torch.testing.assert_close(found.kl, kl.detach())
    torch.testing.assert_close(found.cross_entropy, cross_entropy.detach())
    torch.testing.assert_close(found.z_loss, z_weight * squares.detach())
    for leaf, gradient in zip(given, expected, strict=False):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-5)


def test_huge_logits_neither_overflow_nor_vanish() -> None:
    hidden, head, teacher, teacher_head, targets = inputs(9)
    given = (100 * hidden, 100 * head, 100 * teacher, 100 * teacher_head, targets)
    found = distill_loss(*given)
    assert found.kl is not None
    torch.testing.assert_close(found.kl, naive(*given)[0].detach())
    found.total.backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_a_model_has_nothing_to_learn_from_itself() -> None:
    model = pico_model()
    windows = pico_ids(4, 13)
    teacher = Teacher(pico_model().requires_grad_(False), None, 1.0, "itself")
    found = accumulate_gradients(
        model, windows, micro_batch=2, z_weight=0.0, dtype=torch.float32, teacher=teacher
    )
    assert found.kl == pytest.approx(0.0, abs=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() < 1e-6, name


@pytest.mark.parametrize("arch", ["memory", "flex", "dense"])
def test_a_step_learns_from_the_whole_batch(arch: str) -> None:
    model, other = pico_model(arch), pico_model(arch, seed=5).requires_grad_(False)
    windows = pico_ids(4, 13)
    log_p = F.log_softmax(model(windows[:, :-1]).flatten(0, 1), -1)
    log_q = F.log_softmax(other(windows[:, :-1]).flatten(0, 1), -1)
    kl = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(kl, parameters), strict=True))
    rows = FrozenRows(FfnRows(other), other.config, torch.device("cpu"))
    teacher = Teacher(other, None if arch == "dense" else rows, 1.0, "other")
    found = accumulate_gradients(
        model, windows, micro_batch=2, z_weight=0.0, dtype=torch.float32, teacher=teacher
    )
    assert found.kl == pytest.approx(float(kl.detach()), rel=1e-5)
    _, measured = mean_loss(model, windows, dtype=torch.float32, teacher=teacher)
    assert measured is not None and len(measured) == 4
    each = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).view(4, 12)
    torch.testing.assert_close(measured, each.mean(1).detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=5e-4, atol=5e-6)


def test_kept_rows_are_the_ffn_s_and_do_not_depend_on_what_was_asked_before() -> None:
    model = pico_model(vocab_size=700).requires_grad_(False)
    cpu = torch.device("cpu")
    ids = torch.tensor([3, 200, 255, 256, 699])
    wanted = FfnRows(model).fetch(ids)
    kept, again = (FrozenRows(FfnRows(model), model.config, cpu) for _ in range(2))
    again.fetch(torch.arange(0, 700, 9))
    asked = FrozenRows(FfnRows(model), model.config, cpu, cache_bytes=0)
    for layer in range(2):
        plane, other, fresh = (rows.fetch(ids)[layer] for rows in (kept, again, asked))
        assert plane is not None and other is not None and torch.equal(plane, other)
        torch.testing.assert_close(plane, wanted[layer])
        assert fresh is not None and torch.equal(fresh, wanted[layer])
