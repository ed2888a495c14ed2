"""A whole evaluation against one that stores all logits in float64 and loops over tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from _eval_fakes import FakeRunnable, NoisyRows, documents_of, pico_pair, pico_tokenizer
from _eval_fakes import run_evaluation as run
from _pico import pico_model

from tolkit.errors import UsageError
from tolkit.evaluate import METRIC_NAMES, Window, Windows, windows_of
from tolkit.evaluate.batching import batches, padded
from tolkit.progress import SilentProgress


def naive(candidate: FakeRunnable, reference: FakeRunnable, windows: Windows) -> dict[str, tuple]:
    """name -> (value, se), one window at a time, every logit kept."""
    rows: list[dict[str, float]] = []
    all_kl: list[float] = []
    for window in windows:
        ids = torch.from_numpy(window.ids.astype(np.int64))
        logs = []
        for runnable in (reference, candidate):
            with torch.no_grad():
                logits = runnable.model(ids[None, :-1], rows=runnable.rows)[0].double()
            logs.append(torch.log_softmax(logits, -1))
        row = dict.fromkeys(("tokens", "ref", "cand", "kl", "agree"), 0.0)
        for position in range(len(ids) - 1 - window.scored, len(ids) - 1):
            target = int(ids[position + 1])
            log_p, log_q = logs[0][position], logs[1][position]
            kl = float((log_p.exp() * (log_p - log_q)).sum())
            all_kl.append(kl)
            row["tokens"] += 1
            row["ref"] -= float(log_p[target])
            row["cand"] -= float(log_q[target])
            row["kl"] += kl
            row["agree"] += float(log_p.argmax() == log_q.argmax())
        rows.append({**row, "bytes": window.n_bytes, "words": window.n_words})

    def ratio(above: str, below: str, minus: str | None = None) -> tuple[float, float]:
        y = [r[above] - (r[minus] if minus else 0.0) for r in rows]
        x = [r[below] for r in rows]
        value = sum(y) / sum(x)
        squares = sum((b - value * a) ** 2 for a, b in zip(x, y, strict=True))
        return value, math.sqrt(len(rows) / (len(rows) - 1) * squares) / sum(x)

    def grown(pair: tuple[float, float], minus: float = 0.0) -> tuple[float, float]:
        return math.exp(pair[0]) - minus, math.exp(pair[0]) * pair[1]

    by_byte = ratio("cand", "bytes")
    return {
        "ppl_token": grown(ratio("cand", "tokens")),
        "ppl_word": grown(ratio("cand", "words")),
        "ppl_byte": grown(by_byte),
        "bits_per_byte": (by_byte[0] / math.log(2), by_byte[1] / math.log(2)),
        "ppl_increase": grown(ratio("cand", "tokens", "ref"), 1.0),
        "kl_mean_nats": ratio("kl", "tokens"),
        "kl_median_nats": (float(np.quantile(all_kl, 0.5, method="inverted_cdf")), math.nan),
        "kl_p99_nats": (float(np.quantile(all_kl, 0.99, method="inverted_cdf")), math.nan),
        "top1_agreement": ratio("agree", "tokens"),
        "reference_ppl": grown(ratio("ref", "tokens")),
    }


@pytest.mark.parametrize("architecture", ["memory", "flex"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_every_metric_equals_the_naive_version(architecture: str, tied: bool, packed: bool) -> None:
    reference, candidate = pico_pair(
        0.1, architecture=architecture, tie_word_embeddings=tied, seed=3
    )
    windows = windows_of(documents_of(150, 3, 90, 17), reference.tokenizer, 16, packed=packed)
    (result,) = run([candidate], reference, windows, batch_tokens=50)
    expected = naive(candidate, reference, windows)
    assert tuple(result.metrics) == METRIC_NAMES
    for name in METRIC_NAMES:
        metric, (value, se) = result.metrics[name], expected[name]
        # A quantile is one token's KL, where float32 logits leave some 1e-7.
        slack = 1e-6 if math.isnan(se) else 1e-7
        assert metric.value == pytest.approx(value, rel=2e-5, abs=slack), name
        if not math.isnan(se):
            assert metric.se == pytest.approx(se, rel=1e-4, abs=1e-7), name
        assert metric.interval[0] <= metric.value <= metric.interval[1]
    reference_ppl = result.reference_metrics["ppl_token"]
    assert reference_ppl.value == pytest.approx(expected["reference_ppl"][0], rel=1e-5)
    assert result.metrics["ppl_token"].n == windows.n_tokens == result.conditions.n_tokens
    assert result.metrics["ppl_byte"].n == windows.n_bytes
    assert result.problems == ()


def test_a_candidate_equal_to_its_reference_lost_exactly_nothing() -> None:
    reference, _ = pico_pair()
    windows = windows_of(documents_of(300), reference.tokenizer, 16)
    (result,) = run([reference], reference, windows)
    for name in ("ppl_increase", "kl_mean_nats", "kl_median_nats", "kl_p99_nats"):
        assert result.metrics[name].value == 0.0, name
    assert result.metrics["top1_agreement"].value == 1.0
    assert result.metrics["top1_agreement"].se == 0.0


def test_candidates_together_give_what_each_gives_alone_and_the_reference_runs_once() -> None:
    reference, first = pico_pair(0.02)
    reference.rows = NoisyRows(reference.model, 0.0)
    second = replace(first, rows=NoisyRows(first.model, 0.3), identity="2" * 64)
    dropped = replace(first, rows=NoisyRows(first.model, 0.0, dropped=(1,)))
    windows = windows_of(documents_of(120, 40), reference.tokenizer, 12)
    together = run([first, second, dropped], reference, windows, batch_tokens=48)
    calls = reference.rows.calls
    assert calls == len(batches(windows.lengths_W, range(len(windows)), 48)) > 2
    for result, candidate in zip(together, [first, second, dropped], strict=True):
        (alone,) = run([candidate], reference, windows, batch_tokens=48)
        assert alone.metrics == result.metrics
        assert alone.identity == result.identity
    assert together[0].metrics["kl_mean_nats"].value < together[1].metrics["kl_mean_nats"].value


def test_the_batch_size_does_not_matter_and_a_repeat_is_equal_to_the_last_digit() -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(200, 31, 5), reference.tokenizer, 16)
    runs = [run([candidate], reference, windows, batch_tokens=n)[0] for n in (1, 64, 64, 9999)]
    assert runs[1].metrics == runs[2].metrics
    for name in METRIC_NAMES:
        values = [result.metrics[name].value for result in runs]
        assert values == pytest.approx([values[0]] * 4, rel=1e-4), name


def test_without_a_reference_there_are_perplexities_only() -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(100), reference.tokenizer, 16)
    (alone,) = run([candidate], None, windows)
    (compared,) = run([candidate], reference, windows)
    assert list(alone.metrics) == ["ppl_token", "ppl_word", "ppl_byte", "bits_per_byte"]
    assert alone.reference_identity is None
    assert alone.reference_metrics == {}
    for name in alone.metrics:
        assert alone.metrics[name] == compared.metrics[name]


def test_a_dense_checkpoint_is_evaluated_too() -> None:
    dense = FakeRunnable(pico_model("dense"), None, pico_tokenizer())
    windows = windows_of(documents_of(100), dense.tokenizer, 16)
    (result,) = run([dense], dense, windows)
    assert result.metrics["kl_mean_nats"].value == 0.0
    assert 1 < result.metrics["ppl_token"].value < 1e4


def test_batches_hold_every_window_once_longest_first_within_the_limit() -> None:
    windows = windows_of(documents_of(100, 3, 50, 7, 1), pico_tokenizer(), 16)
    for limit in (1, 16, 40, 10_000):
        made = batches(windows.lengths_W, range(len(windows)), limit)
        assert sorted(i for batch in made for i in batch) == list(range(len(windows)))
        lengths = [len(windows[i].ids) - 1 for batch in made for i in batch]
        assert lengths == sorted(lengths, reverse=True)
        for batch in made:
            longest = max(len(windows[i].ids) - 1 for i in batch)
            assert len(batch) == 1 or longest * len(batch) <= limit


def test_other_number_formats_report_their_noise_floor() -> None:
    reference, candidate = pico_pair(0.0)
    windows = windows_of(documents_of(300, 100), reference.tokenizer, 16)
    parameters = [p.clone() for p in reference.model.parameters()]
    (result,) = run([candidate], reference, windows, dtype="bfloat16")
    assert result.noise_floor is not None
    assert 1e-8 < result.noise_floor.value < 1e-1
    assert result.noise_floor.se > 0
    assert result.conditions.dtype == "bfloat16"
    assert all(
        torch.equal(a, b) for a, b in zip(parameters, reference.model.parameters(), strict=True)
    )
    assert reference.model.embedding.dtype == torch.float32
    (exact,) = run([candidate], reference, windows)
    assert exact.noise_floor is None
    assert exact.metrics["ppl_token"].value != result.metrics["ppl_token"].value


def test_the_noise_floor_is_the_naive_divergence_between_formats() -> None:
    reference, candidate = pico_pair(0.0)
    windows = windows_of(documents_of(150), reference.tokenizer, 16)
    (result,) = run([candidate], reference, windows, dtype="bf16")
    rounded = pico_model().to(torch.bfloat16)
    total, count = 0.0, 0
    for window in windows:
        ids = torch.from_numpy(window.ids.astype(np.int64))[None, :-1]
        with torch.no_grad():
            log_p = torch.log_softmax(reference.model(ids)[0].double(), -1)[-window.scored :]
            log_q = torch.log_softmax(rounded(ids)[0].double(), -1)[-window.scored :]
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += window.scored
    assert result.noise_floor.value == pytest.approx(total / count, rel=0.05)


def test_float32_products_are_restored_to_the_callers_setting() -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(40), reference.tokenizer, 16)
    torch.set_float32_matmul_precision("high")
    try:
        run([candidate], reference, windows)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_progress_counts_scored_tokens() -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(100, 9), reference.tokenizer, 16)

    class Counting(SilentProgress):
        done = 0.0
        total = 0.0

        def task(self, label: str, total: float, unit: str):
            self.total = total
            inner = super().task(label, total, unit)
            outer = self

            class Entered:
                def __enter__(self):
                    inner.__enter__()
                    return self

                def __exit__(self, *exc: object) -> None:
                    inner.__exit__(None, None, None)

                def advance(self, amount: float) -> None:
                    outer.done += amount

            return Entered()

    counting = Counting()
    run([candidate], reference, windows, progress=counting, batch_tokens=20)
    assert counting.done == counting.total == windows.n_tokens


def test_a_result_knows_the_size_of_its_tables() -> None:
    reference, candidate = pico_pair()
    sized = replace(candidate, table_bytes=1234, bits_per_value=4.5)
    windows = windows_of(documents_of(40), reference.tokenizer, 16)
    found = run([candidate, sized], reference, windows)
    assert (found[0].table_bytes, found[0].bits_per_value) == (None, None)
    assert (found[1].table_bytes, found[1].bits_per_value) == (1234, 4.5)
    assert found[0].metrics == found[1].metrics


def test_resident_tables_give_what_streamed_ones_give() -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(40, 70, 33), reference.tokenizer, 16)
    thin = replace(candidate, rows=NoisyRows(candidate.model, 0.05, dropped=[0]))
    for one in (candidate, thin):
        (streamed,) = run([one], reference, windows, tables="streamed", batch_tokens=32)
        one.rows.calls = 0
        (resident,) = run([one], reference, windows, tables="resident", batch_tokens=32)
        assert one.rows.calls == 1  # the whole vocabulary at once, nothing later
        for name, metric in streamed.metrics.items():
            found = resident.metrics[name].value
            assert found == pytest.approx(metric.value, rel=1e-5, abs=1e-6), name
    with pytest.raises(UsageError, match="tables"):
        run([candidate], reference, windows, tables="attic")


def test_throughput_is_that_of_the_whole_pass() -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(40), reference.tokenizer, 16)
    (result,) = run([candidate], reference, windows)
    assert result.tokens_per_s == windows.n_tokens / result.timings_s["pass"]
    parts = ("forward", "reference_forward", "scoring_of_all")
    assert sum(result.timings_s[part] for part in parts) <= result.timings_s["pass"]


def test_windows_that_read_the_same_share_a_row() -> None:
    def window(*ids: int, scored: int = 1) -> Window:
        return Window(np.array(ids, np.int32), scored, 0.0, 0.0, 0)

    windows = [window(5, 6, 7, 8), window(5, 6, 7, 9), window(4, 6, 7, scored=2), window(5, 6, 7)]
    batch = padded(windows, [10, 11, 12, 13])
    assert batch.inputs_RT.tolist() == [[5, 6, 7], [4, 6, 6], [5, 6, 6]]
    assert batch.targets_N.tolist() == [8, 9, 6, 7, 7]
    assert batch.place_N.tolist() == [2, 2, 3, 4, 7]
    assert batch.window_N.tolist() == [10, 11, 12, 12, 13]
