"""Cross-entropy with z-loss, against torch's own on whole logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from torch.utils._python_dispatch import TorchDispatchMode

from tolkit.train import loss as loss_module
from tolkit.train.loss import lm_loss


def naive(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, z_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden @ head.T
    z_loss = z_weight * torch.logsumexp(logits, -1).square().sum()
    return F.cross_entropy(logits, targets, reduction="sum"), z_loss


def inputs(positions: int, vocabulary: int = 37) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 8, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, 8, generator=generator, requires_grad=True)
    return hidden, head, torch.randint(0, vocabulary, (positions,), generator=generator)


@pytest.mark.parametrize("positions", [1, 6, 7, 8, 20])
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
def test_values_and_gradients_equal_whole_logits(
    positions: int, z_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_POSITIONS", 7)
    hidden, head, targets = inputs(positions)
    found = lm_loss(hidden, head, targets, z_weight=z_weight, scale=0.25)
    (3.0 * found.total).backward()
    cross_entropy, z_loss = naive(hidden, head, targets, z_weight)
    expected = torch.autograd.grad(3.0 * 0.25 * (cross_entropy + z_loss), (hidden, head))
    torch.testing.assert_close(found.cross_entropy, cross_entropy.detach())
    torch.testing.assert_close(found.z_loss, z_loss.detach())
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.grad, expected[1], rtol=1e-5, atol=1e-6)


def test_huge_logits_neither_overflow_nor_vanish() -> None:
    hidden, head, targets = inputs(9)
    found = lm_loss(100 * hidden, 100 * head, targets)
    expected, _ = naive(100 * hidden, 100 * head, targets, 0.0)
    torch.testing.assert_close(found.cross_entropy, expected.detach())
    found.total.backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_bfloat16_products_stay_near_float32() -> None:
    hidden, head, targets = inputs(50)
    lm_loss(hidden, head, targets, dtype=torch.bfloat16).total.backward()
    assert hidden.grad is not None and head.grad is not None
    wide = inputs(50)
    lm_loss(wide[0], wide[1], targets).total.backward()
    for narrow, exact in ((hidden.grad, wide[0].grad), (head.grad, wide[1].grad)):
        assert exact is not None and narrow.dtype == torch.float32
        assert (narrow - exact).norm() < 0.02 * exact.norm()


class Largest(TorchDispatchMode):
    """Remembers the most values any new tensor held."""

    values = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.values = max(self.values, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_one_chunk_only_are_alive(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_POSITIONS", 9)
    hidden, head, targets = inputs(40)
    with Largest() as largest:
        lm_loss(hidden, head, targets, dtype=dtype).total.backward()
    assert 9 * 37 <= largest.values < 10 * 37 < 40 * 37


def test_without_gradients_nothing_is_kept() -> None:
    hidden, head, targets = inputs(5)
    with torch.no_grad():
        found = lm_loss(hidden, head, targets)
    assert not found.total.requires_grad
