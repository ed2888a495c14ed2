"""Hand-written backward passes against autograd on the plain formulas."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from _pico import pico_ids, pico_model

from tolkit.model import training_ops


def heads(batch: int, count: int, length: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, T, C] in the layout of a projection, [B, T, H, C]."""
    generator = torch.Generator().manual_seed(length)
    made = torch.randn(batch, length, count, width, generator=generator).to(dtype)
    return made.transpose(1, 2).detach().requires_grad_()


def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotation_and_its_gradient(dtype: torch.dtype) -> None:
    x = heads(2, 3, 7, 8, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = torch.randn(2, 7, 8).to(wide)
    cos, sin = (torch.cat((t[:, :4], t[:, :4]), -1) for t in (cos, sin))
    found, expected = training_ops.rotate(x, cos, sin), plain_rotate(x.to(wide), cos, sin)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, upstream), torch.autograd.grad(expected, x, upstream)
    )


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (1, 1)])
def test_the_norm_and_its_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: training_ops.rms_norm(*a, 1e-5), (x, weight))
    single, scale = x.detach().float(), weight.detach().float()
    expected = F.rms_norm(single, scale.shape, scale, 1e-5)
    assert torch.equal(training_ops.rms_norm(single, scale, 1e-5), expected)


@pytest.mark.parametrize(("batch", "count", "length"), [(1, 1, 1), (2, 3, 7), (5, 2, 16)])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_attention_stays_within_bfloat16_of_exact(
    batch: int, count: int, length: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_ops, "_BLOCK_SCORES", block)
    inputs = [heads(batch, count, length, 8, torch.float32) for _ in range(3)]
    inputs[1] = (inputs[1] * 0.7).detach().requires_grad_()
    found = training_ops.attend(*inputs)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=length > 1)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    assert found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, inputs, upstream.bfloat16())
    exact = torch.autograd.grad(expected, inputs, upstream)
    for narrow, wide in zip(gradients, exact, strict=True):
        assert narrow.dtype == wide.dtype
        assert (narrow - wide).norm() <= 0.02 * wide.norm() + 1e-2 * (length == 1)


def test_attention_does_not_look_ahead() -> None:
    inputs = [heads(1, 2, 9, 8, torch.float32).detach() for _ in range(3)]
    before = training_ops.attend(*inputs)
    for tensor in inputs:
        tensor[:, :, 5:] += 3.0
    after = training_ops.attend(*inputs)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


@pytest.mark.parametrize("arch", ["memory", "flex", "dense"])
def test_a_model_under_autocast_stays_near_float32(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = training_ops.attend

    def watched(*inputs: torch.Tensor) -> torch.Tensor:
        calls.append(inputs[0].shape[2])
        return real(*inputs)

    monkeypatch.setattr(training_ops, "attend", watched)
    model, ids = pico_model(arch), pico_ids()
    exact = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = model(ids)
    assert calls == [ids.shape[1]] * 2
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()
    monkeypatch.setattr(training_ops, "LONGEST_ATTENTION", 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        longer = model(ids)
    assert len(calls) == 2
    assert (longer - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("count", [1, 63, 64, 65])
def test_padding_changes_neither_rows_nor_gradients(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico_model()
    ids = torch.arange(count)
    results = []
    for multiple in (1, 64):
        monkeypatch.setattr(training_ops, "_ROW_MULTIPLE", multiple)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plane = model.ffn_plane(0, ids)
        assert plane.shape == (count, 32)
        plane.float().square().sum().backward()
        results.append(
            [plane.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        )
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=2e-2, atol=1e-3)
    assert len(results[0]) == 1 + 5


def test_padded_rows_share_few_shapes() -> None:
    counts = {len(training_ops.pad_rows(torch.ones(n, 4))) for n in range(1, 200)}
    assert counts == {64, 128, 192, 256}
    assert (training_ops.pad_rows(torch.ones(65, 4))[65:] == 0).all()
