"""One optimiser step: gradients against the slow obvious way; learning rate; number formats."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from _pico import pico_ids, pico_model

from tolkit.errors import ResourceError, UsageError
from tolkit.model import Decoder
from tolkit.train import precision, step
from tolkit.train.optimizer import learning_rate, make_optimizer
from tolkit.train.step import accumulate_gradients, mean_loss


def naive_gradients(model: Decoder, windows: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Whole batch, whole logits, FFN of every position."""
    logits = model(windows[:, :-1])
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    z_loss = 0.01 * torch.logsumexp(logits, -1).square().mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(cross_entropy + z_loss, parameters)
    return float(cross_entropy.detach()), dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("arch", ["memory", "flex", "dense"])
@pytest.mark.parametrize("micro_batch", [1, 2, 6])
@pytest.mark.parametrize("tie", [True, False])
def test_gradients_equal_the_whole_batch(arch: str, micro_batch: int, tie: bool) -> None:
    model = pico_model(arch, tie_word_embeddings=tie)
    windows = pico_ids(6, 13)
    loss, expected = naive_gradients(model, windows)
    found = accumulate_gradients(
        model, windows, micro_batch=micro_batch, z_weight=0.01, dtype=torch.float32
    )
    assert found.cross_entropy == pytest.approx(loss, rel=1e-5)
    assert found.distinct_ids == len(windows[:, :-1].unique())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_rows_give_the_gradients_of_kept_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for kept_bytes in (1 << 30, 0):
        monkeypatch.setattr(step, "_KEPT_ACTIVATION_BYTES", kept_bytes)
        model = pico_model()
        accumulate_gradients(model, pico_ids(6, 13), micro_batch=2, z_weight=0.0, dtype=dtype)
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, kept in gradients[0].items():
        assert kept is not None and kept.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], kept)


@pytest.mark.parametrize("micro_batch", [2, 6])
def test_the_token_ffn_runs_once_a_step(micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = Decoder.memory_ffn

    def watched(model: Decoder, layer: int, embedded: torch.Tensor) -> torch.Tensor:
        rows.append(len(embedded))
        return real(model, layer, embedded)

    monkeypatch.setattr(Decoder, "memory_ffn", watched)
    windows = pico_ids(6, 13)
    accumulate_gradients(
        pico_model(), windows, micro_batch=micro_batch, z_weight=0.0, dtype=torch.float32
    )
    assert rows == [len(windows[:, :-1].unique())] * 2


def test_bfloat16_products_keep_float32_weights_and_gradients() -> None:
    model, exact = pico_model(), pico_model()
    windows = pico_ids(6, 13)
    accumulate_gradients(model, windows, micro_batch=2, z_weight=0.0, dtype=torch.bfloat16)
    accumulate_gradients(exact, windows, micro_batch=2, z_weight=0.0, dtype=torch.float32)
    for (name, narrow), wide in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert narrow.grad is not None and wide.grad is not None
        assert narrow.dtype == narrow.grad.dtype == torch.float32
        difference = (narrow.grad - wide.grad).norm() / wide.grad.norm()
        assert 0 < difference < 0.1, name


def test_mean_loss_is_a_mean_a_window() -> None:
    model, windows = pico_model(), pico_ids(4, 9)
    logits = model(windows[:, :-1])
    expected = F.cross_entropy(
        logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    ).view(4, 8)
    found, kl = mean_loss(model, windows, dtype=torch.float32)
    torch.testing.assert_close(found, expected.mean(1).detach())
    assert kl is None


def test_norm_scales_do_not_decay() -> None:
    model = pico_model()
    optimizer = make_optimizer(model, weight_decay=0.1)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name else 0.1)


def test_the_learning_rate_rises_straight_and_falls_as_a_cosine() -> None:
    rates = [
        learning_rate(s, steps=12, peak=2.0, warmup_steps=4, final_ratio=0.1) for s in range(12)
    ]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[-1] == pytest.approx(0.2)
    middle = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 3 / 7)))
    assert rates[7] == pytest.approx(middle)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(0, steps=1, peak=2.0, warmup_steps=0, final_ratio=0.1) == 2.0


@pytest.mark.parametrize(("gain", "expected"), [(1.4, torch.float32), (1.6, torch.bfloat16)])
def test_auto_takes_bfloat16_where_the_probe_finds_it_faster(
    gain: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: gain, torch.bfloat16: 1.0}
    monkeypatch.setattr(precision, "_product_s", lambda dtype, width: seconds[dtype])
    assert precision.choose_dtype("auto", torch.device("cpu"), 64) == expected
    assert precision.choose_dtype("float32", torch.device("cpu"), 64) == torch.float32


def test_unknown_formats_and_devices() -> None:
    with pytest.raises(UsageError, match="dtype: expected auto, float32 or bfloat16, got 'int8'"):
        precision.choose_dtype("int8", torch.device("cpu"), 64)
    with pytest.raises(UsageError, match="device: expected auto, cpu or cuda"):
        precision.choose_device("toaster")
    if not torch.cuda.is_available():
        assert precision.choose_device("auto") == torch.device("cpu")
        with pytest.raises(ResourceError, match="no CUDA device"):
            precision.choose_device("cuda")
