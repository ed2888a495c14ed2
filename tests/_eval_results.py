"""Ready-made evaluation results for tests of gates, reports and records."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from tolkit.evaluate import Conditions, EvalResult, Metric, WindowSums, quality_record
from tolkit.evaluate.estimates import ratio_estimate
from tolkit.evaluate.metrics import Tally, TextSizes, perplexity_metrics
from tolkit.evaluate.result import metric_of
from tolkit.quality_log import QualityRecord, parse_record

CONDITIONS = Conditions(
    text_digest="a" * 64,
    tokenizer_digest="b" * 64,
    window_length=256,
    packed=False,
    prefix_id=1,
    n_documents=3,
    n_windows=40,
    n_tokens=10_000,
    n_bytes=45_000,
    n_words=8_000,
    device="cpu",
    dtype="float32",
    versions={"tolkit": "0.1.0", "torch": "2.13.0", "numpy": "2.0.0", "python": "3.12.0"},
)

METRICS = {
    "ppl_token": Metric(103.5, 3.6, 10_000, 96.4, 111.1),
    "ppl_word": Metric(909.7, 65.7, 8_000, 787.0, 1051.0),
    "ppl_byte": Metric(3.39, 0.04, 45_000, 3.31, 3.48),
    "bits_per_byte": Metric(1.76, 0.02, 45_000, 1.73, 1.80),
    "ppl_increase": Metric(0.004, 0.0005, 10_000, 0.003, 0.005),
    "kl_mean_nats": Metric(0.0012, 0.0001, 10_000, 0.001, 0.0014),
    "kl_median_nats": Metric(0.0009, 0.0001, 10_000, 0.0008, 0.001),
    "kl_p99_nats": Metric(0.0043, 0.0004, 10_000, 0.0040, 0.0047),
    "top1_agreement": Metric(0.97, 0.002, 10_000, 0.966, 0.974),
}


def made(**changes: Any) -> EvalResult:
    """A healthy result; `changes` replace fields."""
    fields: dict[str, Any] = {
        "label": "small.tol",
        "identity": "c" * 64,
        "kind": "bundle",
        "reference_identity": "d" * 64,
        "metrics": METRICS,
        "reference_metrics": {"ppl_token": Metric(103.1, 3.5, 10_000)},
        "conditions": CONDITIONS,
        "table_bytes": 1_500_000_000,
        "bits_per_value": 0.75,
        "timings_s": {"forward": 1.25, "scoring_of_all": 0.5},
    }
    return EvalResult(**{**fields, **changes})


def with_metric(name: str, metric: Metric) -> EvalResult:
    return made(metrics={**METRICS, name: metric})


def windowed(
    windows: int, *, seed: int, worse: float = 0.0, divergence: float = 0.001
) -> EvalResult:
    """A result with window sums, whose metrics follow from them.

    Results of equal `windows` are of one text: window sizes and difficulty are the same, `seed`
    draws how the model did. worse: nats a token above the text's own difficulty.
    """
    text = np.random.default_rng(windows + 1)
    tokens_W = text.integers(100, 257, windows).astype(float)
    hard_W = text.normal(4.0, 0.5, windows)
    model = np.random.default_rng([windows, seed])
    nll_W = tokens_W * (hard_W + worse + model.normal(0, 0.01, windows))
    sums = WindowSums(
        tokens_W=tokens_W,
        words_W=tokens_W * 0.8,
        bytes_W=tokens_W * 4.5,
        nll_W=nll_W,
        reference_nll_W=tokens_W * hard_W,
        kl_W=tokens_W * divergence * model.uniform(0.5, 1.5, windows),
        agreeing_W=np.floor(tokens_W * model.uniform(0.95, 1.0, windows)),
    )
    size = int(tokens_W.sum())
    tallies = [Tally(windows), Tally(windows)]
    tallies[0].nll_W, tallies[1].nll_W = nll_W, sums.reference_nll_W
    sizes = TextSizes(sums.tokens_W, sums.words_W, sums.bytes_W)
    increase = ratio_estimate(nll_W - sums.reference_nll_W, tokens_W).exponential(minus=1.0)
    metrics = {
        **METRICS,
        **perplexity_metrics(tallies[0], sizes),
        "ppl_increase": metric_of(increase, size),
        "kl_mean_nats": metric_of(ratio_estimate(sums.kl_W, tokens_W), size),
        "top1_agreement": metric_of(ratio_estimate(sums.agreeing_W, tokens_W), size),
    }
    return made(
        metrics=metrics,
        reference_metrics=perplexity_metrics(tallies[1], sizes),
        windows=sums,
        conditions=replace(CONDITIONS, n_windows=windows, n_tokens=size),
    )


def recorded(result: EvalResult) -> QualityRecord:
    """What a later run reads of a result's record."""
    record = parse_record(json.dumps(quality_record(result)).encode(), "quality.jsonl:1")
    assert record is not None
    return record
