"""Once per distinct token, yet the gradients of the plain path: float64, all parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from _pico import pico_ids, pico_model
from torch import Tensor

from tolkit.errors import UsageError
from tolkit.model import Decoder, DistinctTokens, SharedRows
from tolkit.model.layers import rope_tables

ARCHITECTURES = ["memory", "flex"]
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])]
)


def plain_logits(model: Decoder, ids: Tensor) -> Tensor:
    """The decoder with an FFN call at every position and torch's own embedding gradient."""
    start = F.embedding(ids, model.embedding)
    rope = rope_tables(model.config, 0, ids.shape[1], dtype=start.dtype, device=start.device)
    stream = start
    for layer in range(model.num_layers):
        row = model.memory_ffn(layer, start) if model.config.has_tables else None
        stream = model.block(layer)(stream, rope, row, None)
    return model.logits(model.model.norm(stream))


def gradients(model: Decoder) -> dict[str, Tensor]:
    taken = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        taken[name] = parameter.grad
        parameter.grad = None
    return taken


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dense"])
@pytest.mark.parametrize("tied", [True, False])
@devices
def test_distinct_tokens_change_no_gradient(architecture: str, tied: bool, device: str) -> None:
    model = pico_model(architecture, dtype=torch.float64, tie_word_embeddings=tied).to(device)
    ids = pico_ids(4, 23).to(device)
    assert ids.unique().numel() < ids.numel() / 2
    loss_of(plain_logits(model, ids), ids).backward()
    expected = gradients(model)
    loss_of(model(ids), ids).backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recompute", [False, True])
@devices
def test_shared_rows_change_no_gradient(architecture: str, recompute: bool, device: str) -> None:
    model = pico_model(architecture, dtype=torch.float64).to(device)
    micro_batches = [pico_ids(2, 11, seed=seed).to(device) for seed in range(3)]
    for ids in micro_batches:
        loss_of(plain_logits(model, ids), ids).backward()
    expected = gradients(model)
    shared = SharedRows(model, torch.stack(micro_batches), recompute=recompute)
    for ids in micro_batches:
        loss_of(model(ids, rows=shared), ids).backward()
    assert model.block(0).memory_mlp.up_proj.weight.grad is None  # type: ignore[union-attr]
    shared.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-13)


def test_shared_rows_run_the_ffn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_model()
    calls: list[int] = []
    original = model.memory_ffn

    def counted(layer: int, embedded_nD: Tensor) -> Tensor:
        calls.append(embedded_nD.shape[0])
        return original(layer, embedded_nD)

    monkeypatch.setattr(model, "memory_ffn", counted)
    ids = pico_ids(6, 11)
    shared = SharedRows(model, ids)
    for micro_batch in ids.split(2):
        loss_of(model(micro_batch, rows=shared), micro_batch).backward()
    shared.backward()
    assert calls == [ids.unique().numel()] * 2


def test_shared_rows_serve_one_step_only() -> None:
    model = pico_model()
    ids = pico_ids()
    shared = SharedRows(model, ids)
    loss_of(model(ids, rows=shared), ids).backward()
    shared.backward()
    before = gradients(model)
    assert before
    shared.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(AssertionError, match="backward ended"):
        model(ids, rows=shared)


def test_shared_rows_refuse_an_unknown_token() -> None:
    model = pico_model()
    shared = SharedRows(model, torch.tensor([[3, 9, 3]]))
    for unknown in (4, 95):
        with pytest.raises(UsageError, match=f"token {unknown} is not among"):
            model(torch.tensor([[3, unknown]]), rows=shared)


def test_bf16_rows_collect_gradients_in_float32() -> None:
    """256 + 1 is 256 in bf16: many small micro-batches must not vanish."""
    model = pico_model(dtype=torch.bfloat16)
    shared = SharedRows(model, torch.tensor([5]))
    place = torch.tensor([0])
    for value in (256.0, 1.0, 1.0):
        shared.add_gradient(0, place, torch.full((1, 32), value, dtype=torch.bfloat16))
    total = shared._gradients[0]
    assert total is not None
    assert total.dtype == torch.float32
    assert torch.equal(total, torch.full((1, 32), 258.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_seen_often_keeps_its_whole_gradient(dtype: torch.dtype) -> None:
    """2,000 ones summed in bf16 one by one stop at 256."""
    rows = torch.zeros(1, 33, dtype=dtype, requires_grad=True)
    spread = DistinctTokens(torch.zeros(1, 2000, dtype=torch.int64)).gather(rows)
    spread.backward(torch.ones_like(spread))
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.full_like(rows, 2000))


@devices
def test_backward_gives_the_same_bits_every_time(device: str) -> None:
    model = pico_model().to(device)
    ids = pico_ids(8, 31).to(device)

    def run() -> dict[str, Tensor]:
        loss_of(model(ids), ids).backward()
        return gradients(model)

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)
