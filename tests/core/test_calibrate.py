"""The local Fisher metric against finite differences, and what decides it.

B rows, T positions, N scored positions, D hidden, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _eval_fakes import text_of
from _pico import pico_checkpoint
from torch import Tensor

from tolkit.calibrate import CalibrationSpec, Measured, calibrate, measure, sampling
from tolkit.calibrate.probes import reader_gradients
from tolkit.calibrate.sampling import sampled_gradient
from tolkit.calibrate.select import spread_windows
from tolkit.data import Document
from tolkit.errors import CheckpointError, DataError, NonFiniteError, UsageError
from tolkit.evaluate.runnable import Placed
from tolkit.evaluate.windows import windows_of
from tolkit.model import Decoder
from tolkit.model.layers import rope_tables
from tolkit.progress import SilentProgress
from tolkit.tables import Runnable, load_runnable

KINDS: dict[str, dict[str, Any]] = {
    "memory": {},
    "memory, untied": {"tie_word_embeddings": False},
    "flex": {"architecture": "flex"},
    "flex, untied, FFN-C reads the stream": {
        "architecture": "flex",
        "tie_word_embeddings": False,
        "context_mlp_input": "residual",
    },
    "flex, linear FFN-C": {"architecture": "flex", "context_mlp_type": "linear"},
}
# A short text, one whose last window has context, and the short one again.
DOCUMENTS = [
    Document(name, text_of(size, seed=size)) for name, size in zip("abc", (5, 11, 5), strict=True)
]
WINDOW = 8


@pytest.fixture(scope="module", params=KINDS, ids=list(KINDS))
def runnable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runnable:
    path = tmp_path_factory.mktemp("model") / "ckpt"
    return load_runnable(pico_checkpoint(path, num_hidden_layers=3, **KINDS[request.param]))


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Runnable:
    return load_runnable(pico_checkpoint(tmp_path_factory.mktemp("memory") / "ckpt"))


def run(model: Runnable, documents: Sequence[Document] = DOCUMENTS, **spec: Any) -> Measured:
    chosen = CalibrationSpec(**{"window": WINDOW, "tokens": 1000, "device": "cpu", **spec})
    return calibrate(model, documents, chosen, SilentProgress())


def head_of(model: Decoder) -> Tensor:
    return model.embedding if model.lm_head is None else model.lm_head.weight


def norm(states: Tensor, module: Any) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight


def shifted_hidden(model: Decoder, ids_T: Tensor, layer: int, shift_BTD: Tensor) -> Tensor:
    """Final hidden states [B, T, D] when the one reader behind table `layer` reads a shift."""
    start_BTD = model.embedding[ids_T].expand_as(shift_BTD)
    stream_BTD = start_BTD
    rope = rope_tables(model.config, 0, len(ids_T), dtype=shift_BTD.dtype, device=ids_T.device)
    for index in range(model.num_layers):
        block = model.block(index)
        error = shift_BTD if index == layer + 1 else 0.0
        after = stream_BTD + block.self_attn(norm(stream_BTD + error, block.input_layernorm), rope)
        result = after + block.memory_mlp(norm(start_BTD, block.memory_layernorm))
        if block.mlp is not None:
            source = stream_BTD if model.config.context_mlp_input == "residual" else after
            result = result + block.mlp(norm(source + error, block.post_attention_layernorm))
        stream_BTD = result
    last = stream_BTD + (shift_BTD if layer == model.num_layers - 1 else 0.0)
    return norm(last, model.model.norm)


def differences(
    model: Decoder, ids_T: Tensor, labels: Sequence[int], layer: int, position: int
) -> Tensor:
    """d log p(labels of the last positions) / d shift at one position, by central differences."""
    width, step = model.config.hidden_size, 1e-5
    shift_BTD = torch.zeros(2 * width, len(ids_T), width, dtype=torch.float64)
    shift_BTD[:width, position] = step * torch.eye(width, dtype=torch.float64)
    shift_BTD[width:, position] = -step * torch.eye(width, dtype=torch.float64)
    log_p = (shifted_hidden(model, ids_T, layer, shift_BTD) @ head_of(model).T).log_softmax(-1)
    total_B: Any = 0.0
    for place, label in zip(range(len(ids_T) - len(labels), len(ids_T)), labels, strict=True):
        total_B = total_B + log_p[:, place, label]
    return (total_B[:width] - total_B[width:]) / (2 * step)


def drawn_labels(model: Decoder, ids_T: Tensor, uniforms: Sequence[float]) -> list[int]:
    """The first token whose cumulated probability exceeds the number, position by position."""
    shift = torch.zeros(1, len(ids_T), model.config.hidden_size, dtype=torch.float64)
    probabilities = (shifted_hidden(model, ids_T, -2, shift) @ head_of(model).T).softmax(-1)[0]
    labels = []
    for p_V, uniform in zip(probabilities[-len(uniforms) :].tolist(), uniforms, strict=True):
        total, token = 0.0, -1
        while total <= uniform:
            token += 1
            total += p_V[token]
        labels.append(token)
    return labels


@torch.no_grad()
def oracle(runnable: Runnable, seed: int) -> list[Tensor]:
    """G of every layer, window by window and position by position, in float64."""
    model = copy.deepcopy(runnable.model).double()
    windows = windows_of(DOCUMENTS, runnable.tokenizer, WINDOW)
    uniforms = np.random.default_rng(seed).random(windows.n_tokens).tolist()
    width = model.config.hidden_size
    sums = [torch.zeros(width, width, dtype=torch.float64) for _ in range(model.num_layers)]
    for window in windows:
        ids_T = torch.from_numpy(window.ids[:-1].astype(np.int64))
        own, uniforms = uniforms[: window.scored], uniforms[window.scored :]
        labels = drawn_labels(model, ids_T, own)
        for position in range(len(ids_T) - window.scored, len(ids_T)):
            for layer, sum_DD in enumerate(sums):
                g_D = differences(model, ids_T, labels, layer, position)
                sum_DD += torch.outer(g_D, g_D)
    return [sum_DD / windows.n_tokens for sum_DD in sums]


def test_gradients_are_those_of_the_one_reader(runnable: Runnable) -> None:
    model = copy.deepcopy(runnable.model).double()
    ids_T = torch.tensor([5, 9, 5, 30, 7])
    placed = Placed(runnable, torch.device("cpu"), torch.float64)
    uniforms = [0.2, 0.7, 0.999]
    found = reader_gradients(
        placed, ids_T[None], torch.tensor([2, 3, 4]), torch.tensor(uniforms, dtype=torch.float64)
    )
    with torch.no_grad():
        labels = drawn_labels(model, ids_T, uniforms)
        for layer, gradient_ND in enumerate(found):
            for row, position in enumerate((2, 3, 4)):
                expected_D = differences(model, ids_T, labels, layer, position)
                torch.testing.assert_close(gradient_ND[row], expected_D, rtol=1e-6, atol=1e-7)


def test_the_metric_is_the_mean_outer_product(runnable: Runnable) -> None:
    measured = run(runnable, seed=3)
    assert measured.tokens == sum(len(document.text) for document in DOCUMENTS)
    for layer, expected_DD in enumerate(oracle(runnable, seed=3)):
        metric_DD = measured.metric_DD(layer)
        assert torch.equal(metric_DD, metric_DD.T)
        worst = float((metric_DD - expected_DD).abs().max() / expected_DD.abs().max())
        assert worst < 2e-4, layer
        assert measured.mean_diagonal(layer) == pytest.approx(float(expected_DD.trace()) / 32, 1e-3)
        assert float(torch.linalg.eigvalsh(metric_DD).min()) > -1e-6 * float(metric_DD.trace())


def test_the_model_is_left_as_it_was(memory: Runnable) -> None:
    before = {name: weight.clone() for name, weight in memory.model.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in memory.model.parameters()]
    run(memory)
    assert [parameter.requires_grad for parameter in memory.model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in memory.model.parameters())
    assert not any(module._forward_pre_hooks for module in memory.model.modules())
    assert all(torch.equal(before[name], w) for name, w in memory.model.state_dict().items())


def test_labels_follow_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(7, 4, generator=generator)
    hidden_D = torch.randn(4, generator=generator)
    uniforms_N = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    gradient_ND, labels_N = sampled_gradient(hidden_D.expand(10_000, 4), head_VD, uniforms_N)
    p_V = (head_VD @ hidden_D).softmax(-1)
    counts_V = torch.bincount(labels_N, minlength=7)
    assert float((counts_V - 10_000 * p_V).abs().max()) <= 1.01
    expected_ND = head_VD[labels_N] - p_V @ head_VD
    torch.testing.assert_close(gradient_ND, expected_ND, rtol=1e-5, atol=1e-6)


def test_a_token_without_probability_is_never_drawn() -> None:
    head_VD = torch.tensor([[-1e4], [0.0], [-1e4], [0.0], [-1e4]])
    uniforms_N = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    _, labels_N = sampled_gradient(torch.ones(3, 1), head_VD, uniforms_N)
    assert labels_N.tolist() == [1, 3, 3]


def test_labels_do_not_depend_on_the_block_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_ND, head_VD = torch.randn(23, 8), torch.randn(50, 8)
    uniforms_N = torch.rand(23, dtype=torch.float64)
    whole = sampled_gradient(hidden_ND, head_VD, uniforms_N)
    monkeypatch.setattr(sampling, "_LOGITS", 3 * 50)
    parts = sampled_gradient(hidden_ND, head_VD, uniforms_N)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])


def test_a_model_that_is_certain_needs_no_care(memory: Runnable) -> None:
    model = copy.deepcopy(memory.model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1e4)
    certain = run(replace(memory, model=model))
    assert certain.metric_DD(1).abs().max() < 1e-12
    assert certain.effective_rank(1) == 0 or certain.mean_diagonal(1) < 1e-12
    assert run(memory).mean_diagonal(1) > 1e-3


def test_a_bfloat16_pass_is_near(memory: Runnable) -> None:
    documents = [Document("long", text_of(300))]
    exact, rounded = run(memory, documents), run(memory, documents, dtype="bfloat16")
    for layer in range(2):
        ratio = rounded.mean_diagonal(layer) / exact.mean_diagonal(layer)
        assert 0.8 < ratio < 1.25
        assert ratio != 1


def test_the_seed_decides_and_batches_do_not(
    memory: Runnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, again, other = run(memory), run(memory), run(memory, seed=1)
    assert torch.equal(one.metric_DD(0), again.metric_DD(0))
    assert not torch.allclose(one.metric_DD(0), other.metric_DD(0), rtol=1e-2)
    monkeypatch.setattr(measure, "_BATCH_TOKENS", {"cpu": 1})
    torch.testing.assert_close(run(memory).metric_DD(0), one.metric_DD(0), rtol=1e-4, atol=1e-6)


def test_a_text_of_one_token_gives_one_direction(memory: Runnable) -> None:
    measured = run(memory, [Document("a", "x")])
    assert measured.tokens == 1
    for layer in range(2):
        assert measured.effective_rank(layer) == pytest.approx(1, abs=1e-5)


def test_fewer_tokens_than_a_window_shorten_the_window(memory: Runnable) -> None:
    measured = run(memory, tokens=3)
    assert (measured.tokens, measured.window, measured.n_windows) == (3, 3, 1)


def test_windows_come_from_all_of_the_text() -> None:
    chosen = spread_windows(np.full(100, 10, np.int32), 109)
    assert chosen.tolist() == list(range(5, 100, 10))
    assert spread_windows(np.full(100, 10, np.int32), 1000).tolist() == list(range(100))
    assert spread_windows(np.array([1], np.int32), 1).tolist() == [0]


@pytest.mark.parametrize("tokens", [64, 65, 500, 3000, 30_000])
def test_windows_of_any_length_fill_the_budget_and_never_exceed_it(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    scored_W = rng.integers(1, 65, 1000).astype(np.int32)
    chosen = spread_windows(scored_W, tokens)
    taken = int(scored_W[chosen].sum())
    assert len(set(chosen.tolist())) == len(chosen)
    assert max(0, 0.99 * tokens - 64) < taken <= tokens


def test_what_cannot_be_measured_is_refused(memory: Runnable, tmp_path: Path) -> None:
    dense = load_runnable(pico_checkpoint(tmp_path / "dense", "dense"))
    with pytest.raises(CheckpointError, match="dense checkpoint"):
        run(dense)
    with pytest.raises(UsageError, match=r"^dtype: .*float16"):
        run(memory, dtype="float16")
    with pytest.raises(UsageError, match=r"^tokens: "):
        run(memory, tokens=0)
    with pytest.raises(UsageError, match=r"^seed: "):
        run(memory, seed=-1)
    with pytest.raises(UsageError, match=r"^window: 65 tokens"):
        run(memory, window=65)
    with pytest.raises(UsageError, match=r"^window: "):
        run(memory, window=0)
    with pytest.raises(DataError, match="nothing to score"):
        run(memory, [Document("empty", "")])


def test_several_processes_are_refused(memory: Runnable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        run(memory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_gradients_that_are_no_numbers_are_refused(memory: Runnable, value: float) -> None:
    model = copy.deepcopy(memory.model)
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    with pytest.raises(NonFiniteError, match="NaN or infinite gradient behind table 0, first in a"):
        run(replace(memory, model=model))


def test_nan_weights_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(NonFiniteError):
        run(load_runnable(path))
