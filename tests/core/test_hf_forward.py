"""Memory and flex models in transformers' hands give the decoder's own logits and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _hf import HF_KINDS, both_forms, naive_greedy
from _pico import pico_checkpoint, pico_ids

from tolkit.errors import UsageError
from tolkit.model import load_checkpoint
from tolkit.model.padding import positions_of, visible_positions
from tolkit.tables import load_runnable

transformers = pytest.importorskip("transformers")

import tolkit.hf  # noqa: E402, F401  # registers the Auto classes

kinds = pytest.mark.parametrize("kind", HF_KINDS.values(), ids=HF_KINDS.keys())
forms = pytest.mark.parametrize("form", ["checkpoint", "bundle"])
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def load(path: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return both_forms(tmp_path_factory.mktemp("memory"))


def generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **kwargs)


@kinds
def test_logits_are_the_decoders(kind: dict[str, Any], tmp_path: Path) -> None:
    found = both_forms(tmp_path, **kind)
    ids = pico_ids()
    with torch.no_grad():
        expected = load_checkpoint(found["checkpoint"])(ids)
        assert torch.equal(load(found["checkpoint"])(ids).logits, expected)
        bundle = load_runnable(found["bundle"])
        from_rows = load(found["bundle"])(ids).logits
        assert torch.equal(from_rows, bundle.model(ids, rows=bundle.rows))
    torch.testing.assert_close(from_rows, expected, rtol=0, atol=1e-5)


@kinds
def test_cached_steps_equal_the_full_forward(kind: dict[str, Any], tmp_path: Path) -> None:
    model = load(pico_checkpoint(tmp_path / "ckpt", **kind))
    ids = pico_ids(3, 17)
    with torch.no_grad():
        cache, parts = None, []
        for piece in ids.split([6, 4, 1, 1, 5], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert cache.get_seq_length() == 17
        full = model(ids, use_cache=False)
    assert full.past_key_values is None
    torch.testing.assert_close(torch.cat(parts, dim=1), full.logits, rtol=0, atol=2e-5)


@forms
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_a_naive_loop(paths: dict[str, Path], form: str, use_cache: bool) -> None:
    model = load(paths[form])
    decoder = load_checkpoint(paths["checkpoint"])
    for prompt in ([5], [75, 72, 79, 79, 82], list(range(2, 22))):
        got = generate(
            model,
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=-1,
            use_cache=use_cache,
        )
        assert got[0].tolist() == naive_greedy(decoder, prompt, 12)


def test_generation_stops_at_the_end_token(paths: dict[str, Path]) -> None:
    decoder = load_checkpoint(paths["checkpoint"])
    free = naive_greedy(decoder, [75, 76], 12)[2:]
    end = free[4]
    got = generate(
        load(paths["checkpoint"]), torch.tensor([[75, 76]]), eos_token_id=end, max_new_tokens=12
    )
    assert got[0, 2:].tolist() == free[: free.index(end) + 1]


PROMPTS = [[75, 72, 79, 79, 82, 3, 40, 41], [75, 76], [9], [12, 13, 14, 15, 16]]


def padded(prompts: list[list[int]], side: str, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        gap, real = width - len(prompt), [1] * len(prompt)
        left = side == "left"
        rows.append([filler] * gap + prompt if left else prompt + [filler] * gap)
        masks.append([0] * gap + real if left else real + [0] * gap)
    return torch.tensor(rows), torch.tensor(masks)


@forms
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_single_runs(paths: dict[str, Path], form: str, side: str) -> None:
    model = load(paths[form])
    with torch.no_grad():
        ids, mask = padded(PROMPTS, side, 1)
        together = model(ids, attention_mask=mask).logits
        other_ids, _ = padded(PROMPTS, side, 90)
        other = model(other_ids, attention_mask=mask).logits
        for row, prompt in enumerate(PROMPTS):
            real = mask[row] == 1
            single = model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(together[row][real], single, rtol=0, atol=1e-5)
            assert torch.equal(together[row][real], other[row][real])
    assert bool(torch.isfinite(together).all())


@forms
def test_a_left_padded_batch_generates_what_single_runs_do(
    paths: dict[str, Path], form: str
) -> None:
    model = load(paths[form])
    ids, mask = padded(PROMPTS, "left", 1)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), **settings)
        assert together[row, ids.shape[1] :].tolist() == alone[0, len(prompt) :].tolist()


def test_beams_as_wide_as_the_vocabulary_find_the_best_pair(paths: dict[str, Path]) -> None:
    decoder = load_checkpoint(paths["checkpoint"])
    everything = torch.arange(96)
    prompt = torch.tensor([[75, 72, 79]])
    with torch.no_grad():
        first = decoder(prompt)[0, -1].log_softmax(-1)
        extended = torch.cat((prompt.expand(96, 3), everything[:, None]), dim=1)
        both = first[:, None] + decoder(extended)[:, -1].log_softmax(-1)
    best = divmod(int(both.argmax()), 96)
    got = generate(
        load(paths["bundle"]), prompt, max_new_tokens=2, num_beams=96, eos_token_id=-1,
        do_sample=False,
    )  # fmt: skip
    assert tuple(got[0, 3:].tolist()) == best
    greedy = naive_greedy(decoder, [75, 72, 79], 2)[3:]
    assert both[tuple(greedy)] <= both[best]


def test_beams_of_a_padded_batch_equal_single_runs(paths: dict[str, Path]) -> None:
    model = load(paths["checkpoint"])
    ids, mask = padded(PROMPTS, "left", 1)
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": -1}
    together = model.generate(ids, attention_mask=mask, pad_token_id=0, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, torch.tensor([prompt]), **settings)
        assert together[row, ids.shape[1] :].tolist() == alone[0, len(prompt) :].tolist()


def test_sampling_draws_from_the_decoders_distribution(paths: dict[str, Path]) -> None:
    decoder = load_checkpoint(paths["checkpoint"])
    prompt = torch.tensor([[75, 76]])
    torch.manual_seed(0)
    got = generate(
        load(paths["bundle"]), prompt.expand(4000, 2), max_new_tokens=1, do_sample=True, top_k=0,
        eos_token_id=-1,
    )  # fmt: skip
    shares = torch.bincount(got[:, 2], minlength=96) / 4000
    with torch.no_grad():
        expected = decoder(prompt)[0, -1].softmax(-1)
    error = (expected * (1 - expected) / 4000).sqrt()
    assert bool(((shares - expected).abs() <= 5 * error + 1e-3).all())


def test_the_loss_is_torchs_cross_entropy(paths: dict[str, Path]) -> None:
    model = load(paths["checkpoint"])
    decoder = load_checkpoint(paths["checkpoint"])
    ids = pico_ids()
    labels = ids.clone()
    labels[0, :5] = -100
    loss = model(ids, labels=labels).loss
    scored = decoder(ids)[:, :-1].reshape(-1, 96)
    expected = torch.nn.functional.cross_entropy(scored, labels[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    loss.backward()
    expected.backward()
    for name, parameter in decoder.named_parameters():
        gradient = model.get_parameter("decoder." + name).grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradients_of_a_padded_batch_are_those_of_single_runs(paths: dict[str, Path]) -> None:
    together, alone = load(paths["checkpoint"]), load(paths["checkpoint"])
    ids, mask = padded(PROMPTS, "left", 1)
    first = mask.cumsum(-1) == 1  # nothing but padding stands before a row's first token
    labels = ids.masked_fill((mask == 0) | first, -100)
    scored = sum(len(prompt) - 1 for prompt in PROMPTS)
    (together(ids, attention_mask=mask, labels=labels).loss * scored).backward()
    for prompt in PROMPTS:
        if len(prompt) > 1:
            single = torch.tensor([prompt])
            (alone(single, labels=single).loss * (len(prompt) - 1)).backward()
    for (name, ours), theirs in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_positions_given_by_the_caller(paths: dict[str, Path]) -> None:
    model = load(paths["checkpoint"])
    ids = pico_ids(2, 9)
    with torch.no_grad():
        plain = model(ids).logits
        for positions in (torch.arange(9)[None], torch.arange(9).expand(2, 9)):
            assert torch.equal(model(ids, position_ids=positions).logits, plain)
        shifted = model(ids, position_ids=torch.arange(9)[None] + 7).logits
        stretched = model(ids, position_ids=torch.arange(9)[None] * 3).logits
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-4)  # rotary: only distances count
    assert (stretched - plain).abs().max() > 0.01


def test_logits_to_keep(paths: dict[str, Path]) -> None:
    model = load(paths["checkpoint"])
    ids = pico_ids()
    with torch.no_grad():
        full = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
        index = torch.tensor([0, 5, 16])
        torch.testing.assert_close(model(ids, logits_to_keep=index).logits, full[:, index])


def test_a_tuple_when_asked_for(paths: dict[str, Path]) -> None:
    model = load(paths["checkpoint"])
    ids = pico_ids()
    with torch.no_grad():
        assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


@pytest.mark.parametrize(("inputs", "problem"), [
    ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds: .*needs token ids"),
    ({"output_hidden_states": True}, "output_hidden_states: not supported"),
    ({"output_attentions": True}, "output_attentions: not supported"),
    ({"attention_mask": torch.ones(1, 9)}, r"attention_mask: shape \[1, 9\], expected \[3, 17\]"),
    ({"attention_mask": torch.ones(3, 1, 17, 17)}, r"attention_mask: shape \[3, 1, 17, 17\]"),
    ({"past_key_values": ((1, 2),)}, "past_key_values: tuple is not supported"),
    ({"input_ids": None}, "input_ids: missing"),
])  # fmt: skip
def test_what_forward_refuses(paths: dict[str, Path], inputs: dict[str, Any], problem: str) -> None:
    model = load(paths["checkpoint"])
    with pytest.raises(UsageError, match=problem):
        model(**{"input_ids": pico_ids(), **inputs})


def test_a_cache_of_fixed_size_is_refused(paths: dict[str, Path]) -> None:
    # Older versions of transformers refuse before the model is asked.
    with pytest.raises((UsageError, ValueError), match=r"StaticCache is not|does not support"):
        generate(
            load(paths["checkpoint"]),
            torch.tensor([[5, 6]]),
            cache_implementation="static",
            max_new_tokens=2,
        )


def test_the_vocabulary_stays(paths: dict[str, Path]) -> None:
    model = load(paths["bundle"])
    with pytest.raises(UsageError, match="vocabulary: cannot be resized"):
        model.resize_token_embeddings(100)
    with pytest.raises(UsageError, match="embedding: cannot be replaced"):
        model.set_input_embeddings(model.get_input_embeddings())


@no_cuda
@pytest.mark.gpu
@forms
def test_on_a_gpu(paths: dict[str, Path], form: str) -> None:
    ids, mask = padded(PROMPTS, "left", 1)
    with torch.no_grad():
        here = load(paths[form])(ids, attention_mask=mask).logits
        model = load(paths[form], device_map="cuda:0")
        there = model(ids.cuda(), attention_mask=mask.cuda()).logits
    assert model.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-3)


def test_every_position_sees_itself_and_the_real_ones_before() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]])
    visible = visible_positions(mask, 3)
    assert visible.shape == (3, 1, 3, 5)
    for row in range(3):
        for step in range(3):
            at = step + 2
            seen = [j == at or (j < at and mask[row, j] == 1) for j in range(5)]
            assert visible[row, 0, step].tolist() == seen
    assert positions_of(mask, 3).tolist() == [[0, 1, 2], [2, 2, 2], [1, 1, 2]]
