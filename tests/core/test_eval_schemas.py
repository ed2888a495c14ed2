"""Reports and records keep to the schemas that are shipped; JUnit to what its readers know."""

from __future__ import annotations

import importlib.resources
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _eval_fakes import documents_of, pico_pair
from _eval_results import METRICS, made, recorded, windowed

from tolkit.evaluate import (
    EvalResult,
    Metric,
    TaskItems,
    append_quality,
    check_gates,
    evaluate,
    load_baseline,
    parse_gate,
    quality_record,
    to_json,
    to_junit,
    to_markdown,
    windows_of,
)
from tolkit.evaluate.gates import GateVerdict
from tolkit.evaluate.reports import SCHEMA_VERSION
from tolkit.progress import SilentProgress
from tolkit.quality_log import QUALITY_SCHEMA, QualityRecord, parse_record

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

NAN = Metric(math.nan, math.nan, 10, math.nan, math.nan)
GATES = [
    parse_gate(text)
    for text in (
        "ppl_increase<=0.5%",
        "ppl_token<=baseline+0.5%",
        "ppl_token<=reference+5%",
        "kl_p99<=baseline+1%",
        "bytes<=baseline+5%",
        "top1_agreement>=baseline-1%",
        "piqa.acc>=baseline",
    )
]


def validator(name: str) -> Any:
    file = importlib.resources.files("tolkit.evaluate") / "schemas" / f"{name}.json"
    schema = json.loads(file.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


EVAL, QUALITY = validator("eval-1"), validator("quality-1")


def through_text(value: object) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


def with_task() -> EvalResult:
    metrics = {**METRICS, "piqa.acc": Metric(0.5, 0.1, 4)}
    return made(metrics=metrics, tasks={"piqa": TaskItems("d" * 64, {"acc": "0110"})})


def broken_windows() -> EvalResult:
    result = windowed(7, seed=1)
    assert result.windows is not None
    sums = replace(result.windows, nll_W=result.windows.nll_W * math.nan)
    return replace(result, windows=sums, problems=("NaN logits, first in window 0",))


RESULTS: dict[str, EvalResult] = {
    "healthy": made(noise_floor=Metric(6e-5, 1e-6, 99)),
    "without reference": made(reference_identity=None, reference_metrics={}),
    "a checkpoint": made(kind="checkpoint", table_bytes=None, bits_per_value=None),
    "broken": made(metrics=dict.fromkeys(METRICS, NAN), problems=("NaN logits",)),
    "with windows": windowed(7, seed=1),
    "broken, with windows": broken_windows(),
    "one window": windowed(1, seed=1),
    "too many windows": windowed(20_001, seed=1),
    "with a task": with_task(),
}


def judged(result: EvalResult, folder: Path) -> tuple[list[GateVerdict], QualityRecord | None]:
    if result.problems:
        return check_gates(result, [parse_gate("ppl_increase<=1%")]), None
    append_quality(folder, quality_record(result), SilentProgress())
    return check_gates(result, GATES, baseline=load_baseline(folder)), recorded(result)


@pytest.mark.parametrize("name", RESULTS)
def test_reports_and_records_keep_to_the_schemas(name: str, tmp_path: Path) -> None:
    result = RESULTS[name]
    verdicts, baseline = judged(result, tmp_path)
    for given, before in (((), None), (verdicts, baseline)):
        EVAL.validate(through_text(to_json(result, given, before)))
        QUALITY.validate(through_text(quality_record(result, given)))


def test_reports_of_a_real_evaluation_keep_to_them(tmp_path: Path) -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(120, 30), reference.tokenizer, 16)
    sized = replace(candidate, table_bytes=1000, bits_per_value=4.5)
    (result,) = evaluate([sized], reference, windows, device="cpu", progress=SilentProgress())
    verdicts, baseline = judged(result, tmp_path)
    assert [v.status for v in verdicts[1:2]] == ["passed"]
    report = through_text(to_json(result, verdicts, baseline))
    EVAL.validate(report)
    record = through_text(quality_record(result, verdicts))
    QUALITY.validate(record)
    sums, metrics = record["window_sums"], record["metrics"]
    assert {len(values) for values in sums.values()} == {len(windows)}
    tokens = windows.n_tokens
    for name, mean in (
        ("ppl_token", math.exp(sum(sums["nll_nats"]) / tokens)),
        ("kl_mean_nats", sum(sums["kl_nats"]) / tokens),
        ("top1_agreement", sum(sums["agreeing_tokens"]) / tokens),
    ):
        assert mean == pytest.approx(metrics[name]["value"], rel=1e-8), name
    assert report["baseline"]["identity"] == result.identity


def test_the_schemas_refuse_what_they_should() -> None:
    report, record = through_text(to_json(made())), through_text(quality_record(made()))
    for check, good in ((EVAL, report), (QUALITY, record)):
        check.validate(good)
        for key in good:
            assert not check.is_valid({k: v for k, v in good.items() if k != key}), key
        assert not check.is_valid({**good, "speed": 3})
        assert not check.is_valid({**good, "metrics": {"ppl_token": {"value": "3"}}})
        assert not check.is_valid({**good, "dtype": "float64", "label": 5})


def test_versions_in_code_and_schema_agree() -> None:
    assert QUALITY.schema["properties"]["schema"]["const"] == QUALITY_SCHEMA
    assert re.match(EVAL.schema["properties"]["schema_version"]["pattern"], SCHEMA_VERSION)


@pytest.mark.parametrize("name", RESULTS)
def test_every_record_that_keeps_to_the_schema_can_be_read(name: str) -> None:
    record = parse_record(json.dumps(quality_record(RESULTS[name])).encode(), "line")
    assert record is not None
    assert record.counts["windows"] == RESULTS[name].conditions.n_windows
    assert {k for k, m in record.metrics.items() if math.isfinite(m.value)} == {
        k for k, m in RESULTS[name].metrics.items() if math.isfinite(m.value)
    }


# JUnit: element -> attributes (required in capitals) and children in order, as junit-10.xsd of
# Jenkins' xUnit plugin has them, restricted to what GitHub's and GitLab's readers use.
JUNIT: dict[str, tuple[set[str], set[str], list[str]]] = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, set(), ["testsuite"]),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped", "time"},
        {"name", "tests"},
        ["properties", "testcase", "system-out"],
    ),
    "properties": (set(), set(), ["property"]),
    "property": ({"name", "value"}, {"name", "value"}, []),
    "testcase": (
        {"name", "classname", "time"},
        {"name", "classname", "time"},
        ["failure", "system-out"],
    ),
    "failure": ({"type", "message"}, {"type", "message"}, []),
    "system-out": (set(), set(), []),
}


def check_element(element: ET.Element) -> None:
    allowed, required, order = JUNIT[element.tag]
    assert required <= set(element.attrib) <= allowed, element.tag
    places = [order.index(child.tag) for child in element]
    assert places == sorted(places), f"children of {element.tag} out of order"
    assert not order or not (element.text or "").strip(), "text among elements"
    for name in ("tests", "failures", "errors", "skipped"):
        assert element.get(name, "0").isdecimal()
    assert math.isfinite(float(element.get("time", "0")))
    for child in element:
        check_element(child)


@pytest.mark.parametrize("name", RESULTS)
def test_junit_has_the_structure_its_readers_know(name: str, tmp_path: Path) -> None:
    result = replace(RESULTS[name], label="we\x00ird \x1b[31m & <b>]]>")
    verdicts, baseline = judged(result, tmp_path)
    for given in ((), verdicts):
        text = to_junit(result, given, baseline)
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", text)
        root = ET.fromstring(text)
        assert root.tag == "testsuites"
        check_element(root)
        (suite,) = root
        cases = suite.findall("testcase")
        assert int(suite.get("tests")) == int(root.get("tests")) == len(cases) == max(1, len(given))
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
        total_s = sum(float(case.get("time")) for case in cases)
        assert total_s == pytest.approx(float(suite.get("time")), abs=0.0005 * len(cases) + 0.001)
        assert len({(c.get("classname"), c.get("name")) for c in cases}) == len(cases)


def test_junit_says_the_numbers(tmp_path: Path) -> None:
    result = windowed(9, seed=1)
    verdicts, baseline = judged(result, tmp_path)
    root = ET.fromstring(to_junit(result, verdicts, baseline))
    said = [case.find("system-out").text for case in root.iter("testcase")]
    assert said == [verdict.message for verdict in verdicts]
    assert (
        f"ppl_token {result.metrics['ppl_token'].value!r} +/-"
        in root.find("testsuite/system-out").text
    )
    properties = {p.get("name"): p.get("value") for p in root.iter("property")}
    assert properties["baseline"] == result.identity


def test_markdown_has_a_column_for_the_baseline(tmp_path: Path) -> None:
    result = windowed(9, seed=1)
    verdicts, baseline = judged(result, tmp_path)
    text = to_markdown(result, verdicts, baseline)
    value = f"{result.metrics['ppl_token'].value:.5g}"
    row = next(line for line in text.splitlines() if line.startswith("| ppl_token |"))
    assert row.split(" | ")[1] == row.split(" | ")[4] == value
    assert "| metric | value | s.e. | reference | baseline | n |" in text
    assert f"baseline `{result.identity[:12]}`." in text
    table = [line for line in text.splitlines() if line.startswith("| ") and "<=" not in line]
    assert {line.count("|") for line in table if "verdict" not in line and ">=" not in line} == {7}
    assert "baseline" not in to_markdown(result)
