"""Gates: grammar, verdicts, and that nothing doubtful ever passes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from _eval_results import METRICS, made, with_metric
from hypothesis import given
from hypothesis import strategies as st

from tolkit.errors import DataError, GateError, InputError, UsageError
from tolkit.evaluate import (
    GATE_METRICS,
    EvalResult,
    Gate,
    Metric,
    check_gates,
    load_gates,
    parse_gate,
    require_gates,
)


def status(result: EvalResult, text: str, allow_undecided: bool = False) -> tuple[str, bool]:
    (verdict,) = check_gates(result, [parse_gate(text)], allow_undecided)
    return verdict.status, verdict.ok


@pytest.mark.parametrize(
    ("text", "metric", "comparison", "limit"),
    [
        ("ppl_increase<=0.5%", "ppl_increase", "<=", 0.005),
        (" ppl_increase <= -0.5 % ", "ppl_increase", "<=", -0.005),
        ("top1_agreement>=.97", "top1_agreement", ">=", 0.97),
        ("top1_agreement > 97%", "top1_agreement", ">", 0.97),
        ("kl_mean<=0.01", "kl_mean_nats", "<=", 0.01),
        ("kl_median<1e-3", "kl_median_nats", "<", 0.001),
        ("kl_p99_nats<=2.5E-1", "kl_p99_nats", "<=", 0.25),
        ("ppl_token<=24.348", "ppl_token", "<=", 24.348),
        ("bits_per_byte<1.", "bits_per_byte", "<", 1.0),
        ("bits_per_value<=0.7", "bits_per_value", "<=", 0.7),
        ("bytes<=1.6GB", "bytes", "<=", 1.6e9),
        ("bytes<=1.5 GiB", "bytes", "<=", 1.5 * 1024**3),
        ("bytes<=10KB", "bytes", "<=", 10_000),
        ("bytes<=10KiB", "bytes", "<=", 10_240),
        ("bytes<=3MB", "bytes", "<=", 3_000_000),
        ("bytes<=3MiB", "bytes", "<=", 3 * 1024**2),
        ("bytes<=1TB", "bytes", "<=", 10**12),
        ("bytes<=512B", "bytes", "<=", 512),
        ("bytes<=512", "bytes", "<=", 512),
    ],
)
def test_the_grammar(text: str, metric: str, comparison: str, limit: float) -> None:
    gate = parse_gate(text)
    assert (gate.metric, gate.comparison, gate.text) == (metric, comparison, text.strip())
    assert gate.limit == pytest.approx(limit, rel=1e-15)


@pytest.mark.parametrize("metric", GATE_METRICS)
def test_every_metric_can_be_a_gate(metric: str) -> None:
    assert parse_gate(f"{metric}<=1").metric == metric
    result = (
        with_metric(metric, Metric(0.5, 0.01, 10))
        if metric in METRICS
        else made(table_bytes=1, bits_per_value=0.5)
    )
    assert status(result, f"{metric}<=1") == ("passed", True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ppl_increase",
        "ppl_increase<=",
        "<=0.5%",
        "ppl_increase=0.5%",
        "ppl_increase==0.5%",
        "ppl_increase=<0.5",
        "ppl_increase<=0.5%%",
        "ppl_increase<=0.5 percent",
        "ppl_increase<=nan",
        "ppl_increase<=inf",
        "ppl_increase<=-inf",
        "ppl_increase<=1e999",
        "ppl_increase<=0x10",
        "ppl_increase<=1_000",
        "ppl_increase<=1,000",
        "ppl_increase<=٣",
        "ppl_increase<=1GB",
        "kl_mean<=1%",
        "ppl_token<=5%",
        "bits_per_value<=1GB",
        "bytes<=50%",
        "bytes<=1gb",
        "bytes<=1iB",
        "bytes<=1Gi",
        "perplexity<=20",
        "KL_MEAN<=1",
        "ppl_increase<=1;bytes<=2",
        "ppl_increase<=0.5%\nx",
    ],
)
def test_what_is_no_gate(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate(text)
    assert caught.value.message.startswith("gate: ")
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    # ppl_increase is 0.4 % with the interval 0.3 % to 0.5 %.
    [
        ("ppl_increase<=0.5%", "passed"),
        ("ppl_increase<0.5%", "undecided"),
        ("ppl_increase<=0.499999%", "undecided"),
        ("ppl_increase<=0.4%", "undecided"),
        ("ppl_increase<=0.3%", "undecided"),
        ("ppl_increase<0.3%", "failed"),
        ("ppl_increase<=0.2%", "failed"),
        ("ppl_increase>=0.3%", "passed"),
        ("ppl_increase>0.3%", "undecided"),
        ("ppl_increase>0.5%", "failed"),
        ("ppl_increase>=0.5%", "undecided"),
        ("ppl_increase>=0.6%", "failed"),
        ("bytes<=1.5GB", "passed"),
        ("bytes<1.5GB", "failed"),
        ("bytes<=1499999999", "failed"),
        ("bits_per_value<=0.75", "passed"),
        ("bits_per_value<=0.7499", "failed"),
    ],
)
def test_the_interval_decides(text: str, expected: str) -> None:
    assert status(made(), text) == (expected, expected == "passed")
    assert status(made(), text, allow_undecided=True) == (expected, expected != "failed")


def test_nothing_is_rounded() -> None:
    edge = math.nextafter(0.005, 1)
    result = with_metric("ppl_increase", Metric(0.004, 0.0, 100, 0.003, edge))
    assert status(result, "ppl_increase<=0.5%") == ("undecided", False)
    result = with_metric("ppl_increase", Metric(0.004, 0.0, 100, 0.003, 0.5 / 100))
    assert status(result, "ppl_increase<=0.5%") == ("passed", True)


BROKEN = {
    "nan": Metric(math.nan, math.nan, 100, math.nan, math.nan),
    "nan value only": Metric(math.nan, 0.1, 100, 0.0, 0.1),
    "infinite": Metric(math.inf, math.nan, 100),
    "minus infinite": Metric(-math.inf, 0.0, 100),
    "no tokens": Metric(0.001, 0.0, 0, 0.0, 0.002),
}


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("text", ["ppl_increase<=100%", "ppl_increase>=-1", "ppl_increase<1e300"])
@pytest.mark.parametrize("metric", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_number_passes_no_gate(metric: Metric, text: str, allow: bool) -> None:
    assert status(with_metric("ppl_increase", metric), text, allow) == ("failed", False)


@pytest.mark.parametrize("allow", [False, True])
def test_what_was_not_measured_passes_no_gate(allow: bool) -> None:
    bare = made(metrics={}, table_bytes=None, bits_per_value=None)
    for metric in GATE_METRICS:
        for text in (f"{metric}<=1e300", f"{metric}>=-1e300"):
            assert status(bare, text, allow) == ("failed", False)
    (verdict,) = check_gates(bare, [parse_gate("kl_mean<=1")], allow)
    assert verdict.message == "kl_mean<=1: kl_mean_nats was not measured"


@pytest.mark.parametrize("allow", [False, True])
def test_a_result_with_problems_passes_no_gate(allow: bool) -> None:
    result = made(problems=("small.tol: NaN or infinite logits",))
    for text in ("ppl_increase<=100%", "bytes<=9GB", "bits_per_value<=32"):
        assert status(result, text, allow) == ("failed", False)


def test_without_an_error_the_right_side_is_undecided_and_the_wrong_side_fails() -> None:
    single = with_metric("ppl_increase", Metric(0.004, math.nan, 50, -math.inf, math.inf))
    assert status(single, "ppl_increase<=0.5%") == ("undecided", False)
    assert status(single, "ppl_increase<=0.5%", True) == ("undecided", True)
    assert status(single, "ppl_increase<=0.3%", True) == ("failed", False)


def test_a_quantile_without_an_upper_end_is_undecided() -> None:
    far = with_metric("kl_p99_nats", Metric(0.01, math.inf, 50, 0.005, math.inf))
    assert status(far, "kl_p99<=1") == ("undecided", False)
    assert status(far, "kl_p99<=0.001") == ("failed", False)


@given(
    value=st.floats(-1, 1),
    reach=st.floats(0, 1),
    limit=st.floats(-1, 1),
    comparison=st.sampled_from(["<=", "<", ">=", ">"]),
)
def test_a_pass_means_every_value_of_the_interval_is_allowed(
    value: float, reach: float, limit: float, comparison: str
) -> None:
    low, high = value - reach, value + reach
    result = with_metric("ppl_increase", Metric(value, reach / 2, 9, low, high))
    gate = Gate("ppl_increase", comparison, limit, "g")
    (verdict,) = check_gates(result, [gate])
    allowed = [
        {"<=": x <= limit, "<": x < limit, ">=": x >= limit, ">": x > limit}[comparison]
        for x in (low, value, high)
    ]
    assert verdict.ok == all(allowed)
    assert (verdict.status == "failed") == (not any(allowed))


def test_messages_name_gate_value_and_interval() -> None:
    gates = [parse_gate(text) for text in ("ppl_increase<=0.2%", "kl_mean<=0.01", "bytes<=1GB")]
    verdicts = check_gates(made(), gates)
    assert [verdict.message for verdict in verdicts] == [
        "ppl_increase<=0.2%: failed, ppl_increase is 0.4000%, 95 % interval 0.3000% to 0.5000%",
        "kl_mean<=0.01: passed, kl_mean_nats is 0.0012, 95 % interval 0.001 to 0.0014",
        "bytes<=1GB: failed, bytes is 1,500,000,000",
    ]


def test_require_gates_raises_with_every_missed_gate() -> None:
    gates = [parse_gate(text) for text in ("kl_mean<=0.01", "bytes<=1GB", "ppl_increase<=0.4%")]
    verdicts = check_gates(made(), gates)
    with pytest.raises(GateError, match=r"2 of 3 not met: bytes<=1GB.*; ppl_increase") as caught:
        require_gates(verdicts)
    assert caught.value.exit_code == 3
    assert "--allow-undecided" in caught.value.hint
    require_gates(verdicts[:1])
    require_gates([replace(verdicts[2], ok=True)])


def test_gates_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "gates.toml"
    file.write_text('gates = ["ppl_increase<=0.5%", "bytes<=1.6GB"]\n')
    expected = [parse_gate("ppl_increase<=0.5%"), parse_gate("bytes<=1.6GB")]
    assert load_gates(file) == expected
    file.write_text('[gates]\nppl_increase = "<=0.5%"\nbytes = ["<=1.6GB", ">1KB"]\n')
    assert load_gates(file) == [*expected, parse_gate("bytes>1KB")]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("gates = [", DataError, "not TOML"),
        ("", DataError, "holds no gates"),
        ("gates = []", DataError, "holds no gates"),
        ("[gates]", DataError, "holds no gates"),
        ("[gates]\nbytes = []", DataError, "holds no gates"),
        ("gates = 5", DataError, "neither a list nor a table"),
        ("gates = [5]", DataError, "expected text"),
        ("[gates]\nbytes = 5", DataError, "expected text"),
        ('gate = ["bytes<=1"]', DataError, "unknown key 'gate'"),
        ('gates = ["bytes<=1"]\nallow = true', DataError, "unknown key 'allow'"),
        ('gates = ["bytes=1"]', UsageError, "cannot read 'bytes=1'"),
        ('[gates]\nspeed = ">=1"', UsageError, "unknown metric 'speed'"),
    ],
)
def test_bad_gate_files_name_the_file(
    tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(text)
    with pytest.raises(error, match=message) as caught:
        load_gates(file)
    assert str(caught.value).startswith(str(file))


def test_a_missing_or_huge_or_binary_gate_file(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load_gates(tmp_path / "none.toml")
    huge = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * (2 << 20))
    with pytest.raises(InputError, match="larger than"):
        load_gates(huge)
    huge.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not TOML"):
        load_gates(huge)
