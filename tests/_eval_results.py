"""Ready-made evaluation results for tests of gates, reports and records."""

from __future__ import annotations

from typing import Any

from tolkit.evaluate import Conditions, EvalResult, Metric

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
