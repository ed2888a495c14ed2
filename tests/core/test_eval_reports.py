"""JSON, Markdown, JUnit and the record beside a bundle."""

from __future__ import annotations

import json
import math
import os
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from _eval_fakes import documents_of, pico_pair
from _eval_results import METRICS, made, with_metric

from tolkit.evaluate import (
    METRIC_NAMES,
    Metric,
    append_quality,
    append_step_summary,
    check_gates,
    evaluate,
    parse_gate,
    quality_record,
    to_json,
    to_junit,
    to_markdown,
    windows_of,
)
from tolkit.progress import SilentProgress

GATES = [parse_gate(text) for text in ("ppl_increase<=0.5%", "kl_mean<=0.001", "bytes<1.5GB")]
NAN = Metric(math.nan, math.nan, 10, math.nan, math.nan)


def strict(data: object) -> dict:
    """Through text and back, refusing NaN."""
    return json.loads(json.dumps(data, allow_nan=False))


def test_json_names_and_shapes() -> None:
    result = made()
    data = strict(to_json(result, check_gates(result, GATES)))
    assert (data["schema"], data["schema_version"]) == ("tolkit.eval", "1.0")
    assert data["ok"] is False
    assert list(data["metrics"]) == list(METRIC_NAMES)
    for name, metric in METRICS.items():
        assert data["metrics"][name] == {"value": metric.value, "se": metric.se, "n": metric.n}
        assert data["intervals_95"][name] == [metric.low, metric.high]
    assert [gate["status"] for gate in data["gates"]] == ["passed", "undecided", "failed"]
    assert data["gates"][0]["limit"] == 0.005
    assert data["conditions"]["windows"] == {"length": 256, "packed": False, "prefix_id": 1}
    assert data["bytes"] == 1_500_000_000
    assert strict(to_json(result))["ok"] is True


def test_json_of_a_broken_result_is_still_json() -> None:
    result = made(metrics=dict.fromkeys(METRICS, NAN), problems=("small.tol: NaN logits",))
    data = strict(to_json(result, check_gates(result, GATES)))
    assert data["ok"] is False
    assert data["metrics"]["kl_mean_nats"] == {"value": None, "se": None, "n": 10}
    assert data["problems"] == ["small.tol: NaN logits"]
    assert not any(gate["ok"] for gate in data["gates"])
    assert strict(to_json(result))["ok"] is False


def test_json_numbers_are_not_rounded() -> None:
    value = 0.1234567890123456
    data = strict(to_json(with_metric("kl_mean_nats", Metric(value, value / 7, 5))))
    assert data["metrics"]["kl_mean_nats"] == {"value": value, "se": value / 7, "n": 5}


def test_markdown_has_gates_metrics_and_conditions() -> None:
    result = made(noise_floor=Metric(6e-5, 1e-6, 99))
    text = to_markdown(result, check_gates(result, GATES))
    assert text.startswith("## small.tol: 1 of 3 gates met\n")
    assert "| `ppl_increase<=0.5%` | passed | passed, ppl_increase is 0.4000%" in text
    assert "| `kl_mean<=0.001` | **undecided** |" in text
    assert "| `bytes<1.5GB` | **failed** |" in text
    assert "| ppl_token | 103.5 | 3.6 | 103.1 | 10,000 |" in text
    assert "| bytes | 1,500,000,000 | | | |" in text
    assert "10,000 tokens in 40 windows of 256 (per document), text `aaaaaaaaaaaa`, " in text
    assert "cpu, float32; model `cccccccccccc`, reference `dddddddddddd`." in text
    assert "Noise floor of float32: mean KL 6e-05 nats +- 1e-06." in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
            assert line.count("|") in (4, 6)


def test_markdown_of_hostile_names_stays_a_table() -> None:
    result = made(label="a|b\n<script>", problems=("x|y\n# z",))
    text = to_markdown(result)
    assert text.splitlines()[0] == "## a\\|b &lt;script>"
    assert "- **problem:** x\\|y # z" in text


def test_the_step_summary_is_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert append_step_summary("nothing") is False
    file = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(file))
    assert append_step_summary("one\n") and append_step_summary("two\n")
    assert file.read_text() == "one\n\ntwo\n\n"
    progress = SilentProgress()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    assert append_step_summary("three", progress) is False
    assert "no step summary added" in progress.warnings[0]


def test_junit_has_a_case_a_gate() -> None:
    result = made()
    text = to_junit(result, check_gates(result, GATES))
    root = ET.fromstring(text)
    suite = root.find("testsuite")
    assert (root.tag, root.get("tests"), root.get("failures")) == ("testsuites", "3", "2")
    assert (suite.get("name"), suite.get("tests")) == ("tol eval small.tol", "3")
    assert [case.get("name") for case in suite.iter("testcase")] == [g.text for g in GATES]
    failures = {
        case.get("name"): failure
        for case in suite.iter("testcase")
        if (failure := case.find("failure")) is not None
    }
    assert failures["kl_mean<=0.001"].get("type") == "undecided"
    assert failures["bytes<1.5GB"].get("type") == "failed"
    assert "1,500,000,000" in failures["bytes<1.5GB"].get("message")
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert float(properties["kl_mean_nats.value"]) == METRICS["kl_mean_nats"].value


def test_junit_of_a_broken_result_is_valid_xml_and_never_green() -> None:
    result = made(
        label="we\x00ird \x1b[31m & <b>\ud800",
        metrics=dict.fromkeys(METRICS, NAN),
        problems=("bad \x07 & <worse>",),
    )
    for verdicts in ([], check_gates(result, GATES)):
        root = ET.fromstring(to_junit(result, verdicts))
        assert int(root.get("failures")) == max(1, len(verdicts))
        values = {p.get("name"): p.get("value") for p in root.iter("property")}
        assert values["ppl_token.value"] == "nan"
        assert "\\u0000" in root.find("testsuite").get("name")


def test_the_record_binds_what_the_numbers_depend_on() -> None:
    result = made()
    record = strict(quality_record(result, check_gates(result, GATES)))
    assert record["schema"] == "tolkit.quality/1"
    assert (record["bundle"], record["reference"]) == (result.identity, "d" * 64)
    assert record["text_digest"] == "a" * 64
    assert record["tokenizer_digest"] == "b" * 64
    assert record["windows"]["length"] == 256
    assert (record["device"], record["dtype"]) == ("cpu", "float32")
    assert record["versions"]["torch"] == "2.13.0"
    assert record["n"]["tokens"] == 10_000
    assert list(record["metrics"]) == list(METRIC_NAMES)


def test_records_are_appended_and_an_unfinished_line_is_closed(tmp_path: Path) -> None:
    record = quality_record(made())
    assert append_quality(tmp_path, record, SilentProgress())
    file = tmp_path / "quality.jsonl"
    with file.open("ab") as torn:
        torn.write(b'{"schema": "tolkit.qual')
    assert append_quality(tmp_path, record, SilentProgress())
    lines = file.read_bytes().split(b"\n")
    assert json.loads(lines[0]) == json.loads(lines[2]) == strict(record)
    assert lines[1] == b'{"schema": "tolkit.qual'
    assert lines[3] == b""


def test_simultaneous_records_do_not_mix(tmp_path: Path) -> None:
    records = [{**quality_record(made()), "bundle": str(i) * 64} for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda record: append_quality(tmp_path, record), records))
    lines = (tmp_path / "quality.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["bundle"] for line in lines) == [r["bundle"] for r in records]


def test_what_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    progress = SilentProgress()
    assert append_quality(tmp_path / "none.tol", quality_record(made()), progress) is False
    bundle = tmp_path / "a.tol"
    bundle.mkdir()
    outside = tmp_path / "outside"
    outside.write_text("keep\n")
    (bundle / "quality.jsonl").symlink_to(outside)
    assert append_quality(bundle, quality_record(made()), progress) is False
    assert outside.read_text() == "keep\n"
    assert len(progress.warnings) == 2
    assert all("no record added" in warning for warning in progress.warnings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_bundle_warns(tmp_path: Path) -> None:
    progress = SilentProgress()
    tmp_path.chmod(0o555)
    try:
        assert append_quality(tmp_path, quality_record(made()), progress) is False
    finally:
        tmp_path.chmod(0o755)
    assert "the bundle is read-only" in progress.warnings[0]


def test_a_read_only_file_system_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tolkit.evaluate.quality.os.open", refuse)
    progress = SilentProgress()
    assert append_quality(tmp_path, quality_record(made()), progress) is False
    assert "the bundle is read-only" in progress.warnings[0]


def test_reports_of_a_real_evaluation() -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(120, 30), reference.tokenizer, 16)
    options = {"device": "cpu", "progress": SilentProgress(), "labels": ["noisy.tol"]}
    sized = replace(candidate, table_bytes=1000, bits_per_value=4.5)
    first, second = (evaluate([sized], reference, windows, **options)[0] for _ in range(2))
    assert quality_record(first) == quality_record(second)  # no clock in the record
    verdicts = check_gates(first, [parse_gate("kl_mean<=10"), parse_gate("bytes<=1KB")])
    assert all(verdict.ok for verdict in verdicts)
    assert strict(to_json(first, verdicts))["conditions"]["n"]["windows"] == len(windows)
    assert ET.fromstring(to_junit(first, verdicts)).get("failures") == "0"
    assert "2 of 2 gates met" in to_markdown(first, verdicts)
