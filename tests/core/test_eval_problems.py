"""Evaluations that go wrong: bad numbers, partners that do not match, memory that runs out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from _eval_fakes import FakeRunnable, NoisyRows, documents_of, pico_pair
from _eval_fakes import run_evaluation as run
from _pico import pico_model

from tolkit.data import Document
from tolkit.errors import DataError, MismatchError, ResourceError, UsageError
from tolkit.evaluate import evaluate, windows_of
from tolkit.model import Decoder
from tolkit.progress import SilentProgress


def poisoned(runnable: FakeRunnable, token: int, value: float) -> FakeRunnable:
    """The runnable with one table value of `token` replaced."""

    class Rows(NoisyRows):
        def fetch(self, ids_n: torch.Tensor) -> list[torch.Tensor | None]:
            planes = super().fetch(ids_n)
            assert planes[0] is not None
            planes[0] = planes[0].clone()
            planes[0][ids_n == token, 0] = value
            return planes

    return replace(runnable, rows=Rows(runnable.model, 0.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_are_told_with_the_candidate_and_spoil_only_it(bad: float) -> None:
    reference, candidate = pico_pair()
    tokenizer = reference.tokenizer
    documents = [Document("clean", "ab" * 20), Document("spoiled", "ab" * 10 + "z" + "ab" * 10)]
    windows = windows_of(documents, tokenizer, 16)
    broken = poisoned(candidate, tokenizer.encode("z")[0], bad)
    results = run([candidate, broken], reference, windows, labels=["good.tol", "bad.tol"])
    assert results[0].problems == ()
    assert math.isfinite(results[0].metrics["kl_mean_nats"].value)
    (problem,) = results[1].problems
    assert problem.startswith("bad.tol: NaN or infinite logits, first in window 4 (spoiled)")
    for name, metric in results[1].metrics.items():
        assert math.isnan(metric.value), name
    # The same in the reference spoils what is compared, and says that it was the reference.
    (blamed,) = run([candidate], broken, windows)
    assert blamed.problems[0].startswith("reference: NaN or infinite logits")
    assert math.isnan(blamed.metrics["ppl_increase"].value)
    assert math.isfinite(blamed.metrics["ppl_token"].value)


def test_a_model_that_says_nothing_is_a_problem() -> None:
    reference, _ = pico_pair()
    silent = pico_model(tie_word_embeddings=False)
    with torch.no_grad():
        silent.lm_head.weight.zero_()
    mute = FakeRunnable(silent, None, reference.tokenizer)
    windows = windows_of(documents_of(100), reference.tokenizer, 16)
    (result,) = run([mute], None, windows)
    assert "says nothing" in result.problems[0]
    assert result.metrics["ppl_token"].value == pytest.approx(96)
    (equal,) = run([mute], mute, windows)
    assert len(equal.problems) == 2  # a perfect agreement of two silent models proves nothing


def test_partners_that_do_not_match_are_refused() -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(40), reference.tokenizer, 16)

    class Renamed:
        def __init__(self, inner: object) -> None:
            self.vocab_size, self.digest = inner.vocab_size, "f" * 64
            self.bos_id, self.eos_id = inner.bos_id, inner.eos_id
            self.encode_batch, self.decode = inner.encode_batch, inner.decode

    other = replace(candidate, tokenizer=Renamed(candidate.tokenizer))
    with pytest.raises(MismatchError, match=r"b\.tol: its tokenizer is not that of reference"):
        run([other], reference, windows, labels=["b.tol"])
    with pytest.raises(MismatchError, match="text: cut with another tokenizer"):
        run([candidate], reference, replace(windows, tokenizer_digest="0" * 64))
    larger = replace(candidate, model=pico_model(vocab_size=97))
    with pytest.raises(MismatchError, match="expected 96, got 97"):
        run([larger], reference, windows)
    small = FakeRunnable(pico_model(vocab_size=40), None, reference.tokenizer)
    with pytest.raises(MismatchError, match="holds token id"):
        run([small], None, windows)


def test_bad_calls_are_refused() -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(40), reference.tokenizer, 16)
    with pytest.raises(DataError, match="no windows"):
        none = np.empty(0, np.int64)
        run([candidate], reference, replace(windows, begin_W=none, end_W=none))
    with pytest.raises(UsageError, match="none given"):
        run([], reference, windows)
    with pytest.raises(UsageError, match="reads at most 64"):
        run([candidate], None, windows_of(documents_of(90), reference.tokenizer, 65))
    with pytest.raises(UsageError, match="batch_tokens"):
        run([candidate], None, windows, batch_tokens=0)
    with pytest.raises(UsageError, match="float32, bfloat16 or float16"):
        run([candidate], None, windows, dtype="int8")
    with pytest.raises(UsageError, match="auto, cpu or cuda"):
        run([candidate], None, windows, device="teapot")
    with pytest.raises(ResourceError, match="cuda:63"):
        run([candidate], None, windows, device="cuda:63")


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


class HungryRows(NoisyRows):
    """Out of memory when asked for more than `room` distinct tokens at once."""

    def __init__(self, model: Decoder, error: Exception, room: int) -> None:
        super().__init__(model, 0.05)
        self.error, self.room = error, room

    def fetch(self, ids_n: torch.Tensor) -> list[torch.Tensor | None]:
        if len(ids_n) > self.room:
            raise self.error
        return super().fetch(ids_n)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_batch_and_says_so(error: Exception) -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(40, 70, 33, 90), reference.tokenizer, 16)
    warnings: list[str] = []

    class Listening(SilentProgress):
        def warn(self, message: str) -> None:
            warnings.append(message)

    hungry = replace(candidate, rows=HungryRows(candidate.model, error, room=14))
    (found,) = evaluate(
        [hungry], reference, windows, batch_tokens=256, progress=Listening(), device="cpu"
    )
    (expected,) = run([candidate], reference, windows)
    for name, metric in expected.metrics.items():
        assert found.metrics[name].value == pytest.approx(metric.value, rel=1e-5, abs=1e-7), name
    assert found.metrics["ppl_token"].n == windows.n_tokens
    assert warnings[0] == ("batch_tokens: out of memory with 256 tokens at once, going on with 128")


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_memory_too_small_for_one_window_is_an_error(error: Exception) -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(40), reference.tokenizer, 16)
    hungry = replace(candidate, rows=HungryRows(candidate.model, error, room=0))
    with pytest.raises(ResourceError, match="out of memory") as caught:
        run([hungry], reference, windows, batch_tokens=64)
    assert "--window" in (caught.value.hint or "")
