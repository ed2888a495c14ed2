"""Gates against a baseline: grammar, verdicts, which record is taken, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _eval_results import CONDITIONS, METRICS, made, windowed
from hypothesis import given
from hypothesis import strategies as st

from tolkit.errors import (
    DataError,
    InputError,
    MismatchError,
    UnsupportedVersionError,
    UsageError,
)
from tolkit.evaluate import (
    Baseline,
    EvalResult,
    Metric,
    TaskItems,
    append_quality,
    check_gates,
    load_baseline,
    load_gates,
    parse_gate,
    quality_record,
)
from tolkit.evaluate.gates import GateVerdict
from tolkit.progress import SilentProgress


def stored(folder: Path, *results: EvalResult) -> Path:
    """A folder whose quality.jsonl holds a record a result."""
    folder.mkdir(exist_ok=True)
    for result in results:
        assert append_quality(folder, quality_record(result), SilentProgress())
    return folder


def verdict(result: EvalResult, text: str, baseline: Path, allow: bool = False) -> GateVerdict:
    (found,) = check_gates(result, [parse_gate(text)], allow, load_baseline(baseline))
    return found


@pytest.mark.parametrize(
    ("text", "metric", "limit", "relative"),
    [
        ("ppl_token<=baseline+0.7%", "ppl_token", 0.007, True),
        ("ppl_token <= baseline + 0.7 %", "ppl_token", 0.007, True),
        ("ppl_token<baseline-0.7%", "ppl_token", -0.007, True),
        ("ppl_token<=baseline+0.25", "ppl_token", 0.25, False),
        ("ppl_token<=baseline", "ppl_token", 0.0, False),
        ("kl_mean<=baseline+5%", "kl_mean_nats", 0.05, True),
        ("kl_mean<=baseline+1e-3", "kl_mean_nats", 0.001, False),
        ("bits_per_byte<=baseline+1%", "bits_per_byte", 0.01, True),
        ("top1_agreement>=baseline-1%", "top1_agreement", -0.01, False),
        ("top1_agreement>=baseline-.01", "top1_agreement", -0.01, False),
        ("ppl_increase<=baseline+0.1%", "ppl_increase", 0.001, False),
        ("bytes<=baseline+10%", "bytes", 0.1, True),
        ("bytes<=baseline+10MB", "bytes", 1e7, False),
        ("bytes<=baseline-1KiB", "bytes", -1024.0, False),
        ("bits_per_value<=baseline+0.1", "bits_per_value", 0.1, False),
        ("piqa.acc>=baseline-2%", "piqa.acc", -0.02, False),
        ("lambada.perplexity<=baseline+3%", "lambada.perplexity", 0.03, True),
        ("piqa.acc_norm>=70%", "piqa.acc_norm", 0.7, False),
        ("piqa.choice_agreement>=0.99", "piqa.choice_agreement", 0.99, False),
        ("arc_easy.acc_change>=-1%", "arc_easy.acc_change", -0.01, False),
        ("ppl_word<=reference+2%", "ppl_word", 0.02, True),
        ("bits_per_byte<=reference", "bits_per_byte", 0.0, False),
    ],
)
def test_the_grammar(text: str, metric: str, limit: float, relative: bool) -> None:
    gate = parse_gate(text)
    partner = next((p for p in ("baseline", "reference") if p in text), None)
    assert (gate.metric, gate.limit, gate.relative, gate.partner, gate.text) == (
        metric, limit, relative, partner, text
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "ppl_token<=baseline+",
        "ppl_token<=baseline+%",
        "ppl_token<=baseline%",
        "ppl_token<=baseline 5%",
        "ppl_token<=baseline++5%",
        "ppl_token<=baseline+-5%",
        "ppl_token<=+baseline",
        "ppl_token<=5%+baseline",
        "ppl_token<=Baseline+5%",
        "ppl_token<=base+5%",
        "ppl_token<=baseline*1.05",
        "ppl_token<=baseline+nan",
        "ppl_token<=baseline+1e999",
        "ppl_token<=baseline+1e99999999999999999999%",
        "ppl_token<=baseline+5MB",
        "bytes<=baseline+5mb",
        "baseline<=ppl_token",
        "ppl_increase<=reference+1%",
        "kl_mean<=reference",
        "top1_agreement>=reference",
        "bytes<=reference",
        "piqa.acc>=reference-1%",
        "1piqa.acc>=50%",
        "piqa.1acc>=50%",
        "piqa.acc.x>=50%",
        "piqa.>=50%",
        ".acc>=50%",
        "Piqa.acc>=50%",
        "piqa-x.acc>=50%",
        "_x.acc>=50%",
        "lambada.perplexity<=5%",
        "piqa.acc<=5MB",
    ],
)
def test_what_is_no_gate(text: str) -> None:
    with pytest.raises(UsageError, match=r"^gate: ") as caught:
        parse_gate(text)
    assert caught.value.hint


@given(st.text(alphabet="ab.<=>+-%0123456789 eKMGTiBpseline_reference", max_size=30))
def test_any_text_is_a_gate_or_a_usage_error(text: str) -> None:
    try:
        gate = parse_gate(text)
    except UsageError:
        return
    assert math.isfinite(gate.limit)
    assert parse_gate(gate.text) == gate


def test_gates_from_toml_may_name_baselines_and_tasks(tmp_path: Path) -> None:
    file = tmp_path / "gates.toml"
    texts = ["ppl_token<=baseline+0.5%", "piqa.acc>=baseline-1%", "piqa.acc_norm>=70%"]
    file.write_text(f"gates = {json.dumps(texts)}\n")
    expected = [parse_gate(text) for text in texts]
    assert load_gates(file) == expected
    file.write_text(
        '[gates]\nppl_token = "<=baseline+0.5%"\npiqa.acc = ">=baseline-1%"\n'
        '"piqa.acc_norm" = [">=70%"]\n'
    )
    assert load_gates(file) == expected
    file.write_text("[gates]\npiqa.acc.deep = '<=1'\n")
    with pytest.raises(DataError, match=r"gates piqa\.acc: expected text"):
        load_gates(file)


def test_a_paired_interval_decides(tmp_path: Path) -> None:
    before = stored(tmp_path / "b", windowed(100, seed=1))
    worse = windowed(100, seed=2, worse=0.01)  # 1 % worse, give or take 0.3 % paired, 8 % unpaired
    assert verdict(worse, "ppl_token<=baseline+2%", before).status == "passed"
    assert verdict(worse, "ppl_token<=baseline+1%", before).status == "undecided"
    assert verdict(worse, "ppl_token<=baseline+1%", before, True).ok
    assert verdict(worse, "ppl_token<=baseline+0.5%", before, True).status == "failed"
    assert verdict(worse, "ppl_token>=baseline+0.5%", before).status == "passed"
    unpaired = replace(worse, windows=None)
    assert verdict(unpaired, "ppl_token<=baseline+2%", before).status == "undecided"
    assert "unpaired" in verdict(unpaired, "ppl_token<=baseline+2%", before).message


def test_the_same_run_again_meets_every_bare_gate(tmp_path: Path) -> None:
    result = windowed(100, seed=1)
    before = stored(tmp_path / "b", result)
    for metric in ("ppl_token", "ppl_word", "bits_per_byte", "ppl_increase", "kl_mean", "bytes"):
        assert verdict(result, f"{metric}<=baseline", before).status == "passed", metric
        assert verdict(result, f"{metric}<baseline", before).status == "failed", metric
    assert verdict(result, "top1_agreement>=baseline", before).ok


@pytest.mark.parametrize(
    ("text", "bytes_now", "expected"),
    [
        ("bytes<=baseline+5%", 105, True),
        ("bytes<=baseline+5%", 106, False),
        ("bytes<baseline+5%", 105, False),
        ("bytes<=baseline+30%", 130, True),
        ("bytes<=baseline+7%", 107, True),
        ("bytes>=baseline-7%", 93, True),
        ("bytes<=baseline+7B", 107, True),
        ("bytes<=baseline", 100, True),
        ("bytes<=baseline", 101, False),
    ],
)
def test_sizes_are_compared_as_the_user_writes_decimals(
    tmp_path: Path, text: str, bytes_now: int, expected: bool
) -> None:
    before = stored(tmp_path / "b", made(table_bytes=100))
    assert verdict(made(table_bytes=bytes_now), text, before).ok == expected


def test_messages_say_what_was_compared(tmp_path: Path) -> None:
    before = stored(tmp_path / "b", made(table_bytes=1000))
    found = verdict(made(table_bytes=1100), "bytes<=baseline+5%", before)
    assert found.message == (
        "bytes<=baseline+5%: failed, bytes is 1,100, the baseline's 1,000, +10.0000%"
    )
    found = verdict(made(), "top1_agreement>=baseline-5%", before)
    assert found.message == (
        "top1_agreement>=baseline-5%: passed, top1_agreement is 97.0000%, the baseline's 97.0000%,"
        " +0.0000 points, 95 % interval -0.8000 points to +0.8000 points, unpaired (both errors at"
        " their worst)"
    )


def test_a_gate_on_a_baseline_needs_one() -> None:
    with pytest.raises(UsageError, match="compares with a baseline, none was given") as caught:
        check_gates(made(), [parse_gate("bytes<=baseline")])
    assert "--baseline" in caught.value.hint


@pytest.mark.parametrize("allow", [False, True])
def test_nothing_unmeasured_or_broken_passes(tmp_path: Path, allow: bool) -> None:
    nan = Metric(math.nan, math.nan, 10, math.nan, math.nan)
    lacking = made(metrics={}, table_bytes=None, bits_per_value=None)
    broken = made(metrics=dict.fromkeys(METRICS, nan), problems=("NaN logits",))
    good, empty = stored(tmp_path / "good", made()), stored(tmp_path / "empty", lacking)
    for metric in (*METRICS, "bytes", "bits_per_value", "piqa.acc"):
        for text in (f"{metric}<=baseline+1000", f"{metric}>=baseline-1000"):
            assert not verdict(lacking, text, good, allow).ok
            assert not verdict(made(), text, empty, allow).ok
            assert not verdict(broken, text, good, allow).ok


SETTINGS: dict[str, tuple[str, Any, str]] = {
    "text": ("text_digest", "e" * 64, "text digest is a{16} here, e{16} there"),
    "tokenizer": ("tokenizer_digest", "e" * 64, "tokenizer digest is b{16} here, e{16} there"),
    "length": ("window_length", 128, "window length is 256 here, 128 there"),
    "packed": ("packed", True, "packed is no here, yes there"),
    "prefix": ("prefix_id", None, "prefix id is 1 here, none there"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_another_setting_does_not_compare(tmp_path: Path, name: str) -> None:
    field, value, message = SETTINGS[name]
    other = made(conditions=replace(CONDITIONS, **{field: value}))
    with pytest.raises(MismatchError, match=message) as caught:
        verdict(made(), "bytes<=baseline", stored(tmp_path / "b", other))
    assert "quality.jsonl:1" in caught.value.message
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("reference", [None, "e" * 64])
def test_another_reference_does_not_compare(tmp_path: Path, reference: str | None) -> None:
    before = stored(tmp_path / "b", made(reference_identity=reference))
    with pytest.raises(MismatchError, match="reference is dddddddddddddddd here"):
        verdict(made(), "bytes<=baseline", before)


def test_other_counts_do_not_compare(tmp_path: Path) -> None:
    before = stored(tmp_path / "b", made(conditions=replace(CONDITIONS, n_tokens=9_999)))
    with pytest.raises(MismatchError, match="9999 tokens of the same text, here 10000"):
        check_gates(made(), [], baseline=load_baseline(before))


def test_the_last_record_that_fits_is_taken(tmp_path: Path) -> None:
    other_text = made(table_bytes=4, conditions=replace(CONDITIONS, text_digest="e" * 64))
    broken = made(table_bytes=3, problems=("NaN logits",))
    folder = stored(tmp_path / "b", made(table_bytes=1), made(table_bytes=2), broken, other_text)
    (folder / "quality.jsonl").open("ab").write(b'{"schema": "tolkit.qual')
    assert verdict(made(), "bytes<=baseline", folder).change.against == 2
    assert verdict(made(), "bytes<=baseline", folder / "quality.jsonl").change.against == 2


def test_an_identity_picks_a_bundles_record(tmp_path: Path) -> None:
    results = [made(table_bytes=i, identity=f"abc{i}" + "0" * 60) for i in (1, 2, 3)]
    folder = stored(tmp_path / "b", *results)
    for i in (1, 2, 3):
        path = Path(f"{folder}#abc{i}")
        assert verdict(made(), "bytes<=baseline", path).change.against == i
    assert load_baseline(folder, "abc1" + "0" * 60).identity.startswith("abc10")
    with pytest.raises(DataError, match=r"holds no record of a bundle ffff\.\."):
        load_baseline(f"{folder}/quality.jsonl#ffff")
    for wrong in ("abc", "ABCD", "zzzz", "", "0" * 65):
        with pytest.raises(UsageError, match="hex digits after #"):
            load_baseline(folder, wrong)
    close = [made(identity=f"abcd{i}" + "0" * 59) for i in (1, 2)]
    with pytest.raises(UsageError, match=r"abcd fits records of abcd10+ and abcd20+"):
        load_baseline(stored(tmp_path / "c", *close), "abcd")


def test_only_broken_records(tmp_path: Path) -> None:
    folder = stored(tmp_path / "b", made(problems=("NaN logits, all of them",)))
    with pytest.raises(DataError, match="is no baseline: NaN logits"):
        verdict(made(), "bytes<=baseline", folder)


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_baseline(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"quality\.jsonl: no such file"):
        load_baseline(tmp_path)
    for data in (b"", b"\n\n", b'{"torn', b"\xff\xfe\n", b"NaN\n"):
        (tmp_path / "quality.jsonl").write_bytes(data)
        with pytest.raises(DataError, match="holds no record"):
            load_baseline(tmp_path)


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    record = json.loads(json.dumps(quality_record(windowed(5, seed=1))))
    change(record)
    return json.dumps(record).encode() + b"\n"


def test_a_record_of_another_schema_version(tmp_path: Path) -> None:
    old = json.dumps(quality_record(made())).encode() + b"\n"
    new = edited(lambda record: record.update(schema="tolkit.quality/2"))
    file = tmp_path / "quality.jsonl"
    file.write_bytes(old + new)
    with pytest.raises(UnsupportedVersionError, match=r"quality.jsonl:2: schema is .*/2"):
        load_baseline(file)
    file.write_bytes(new + old)
    assert verdict(made(), "bytes<=baseline", file).ok, "what is behind it is not looked at"


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "schema is missing": lambda r: r.pop("schema"),
    "schema is 'x'": lambda r: r.update(schema="x"),
    "bundle is not text": lambda r: r.update(bundle=5),
    "text_digest is missing": lambda r: r.pop("text_digest"),
    "reference is not text or null": lambda r: r.update(reference=7),
    "metrics is not an object": lambda r: r.update(metrics=[]),
    "metrics: ppl_token: n is not an integer": lambda r: r["metrics"]["ppl_token"].update(n=True),
    "metrics: ppl_token: value is not a number or null": lambda r: r["metrics"]["ppl_token"].update(
        value="3"
    ),
    "windows: packed is not true or false": lambda r: r["windows"].update(packed=1),
    "n: windows is missing": lambda r: r["n"].pop("windows"),
    "nll_nats has 4 entries, expected 5": lambda r: r["window_sums"]["nll_nats"].pop(),
    "nll_nats holds something that is not": lambda r: r["window_sums"]["nll_nats"].__setitem__(
        0, None
    ),
    "window_sums is not an object": lambda r: r.update(window_sums=[1]),
    "outcomes: acc holds something besides": lambda r: r.update(
        tasks={"piqa": {"digest": "d", "outcomes": {"acc": "012"}}}
    ),
    "tasks: expected an object": lambda r: r.update(tasks=[]),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_record_names_line_and_field(tmp_path: Path, message: str) -> None:
    file = tmp_path / "quality.jsonl"
    file.write_bytes(edited(DAMAGE[message]))
    with pytest.raises(DataError, match=message) as caught:
        load_baseline(file)
    assert caught.value.message.startswith(f"{file}:1")


def test_the_undamaged_record_is_one(tmp_path: Path) -> None:
    file = tmp_path / "quality.jsonl"
    file.write_bytes(edited(lambda record: None))
    assert isinstance(load_baseline(file), Baseline)


def test_records_of_before_window_sums_compare_unpaired(tmp_path: Path) -> None:
    file = tmp_path / "quality.jsonl"

    def older(record: dict[str, Any]) -> None:
        for key in ("window_sums", "window_sums_left_out", "tasks", "intervals_95"):
            del record[key]

    file.write_bytes(edited(older))
    found = verdict(windowed(5, seed=1), "ppl_token<=baseline+100%", file)
    assert found.change is not None and not found.change.paired


def test_a_task_metric_is_looked_up_and_paired_over_items(tmp_path: Path) -> None:
    def scored(outcomes: str) -> EvalResult:
        share = outcomes.count("1") / len(outcomes)
        metrics = {**METRICS, "piqa.acc": Metric(share, 0.02, len(outcomes))}
        return made(metrics=metrics, tasks={"piqa": TaskItems("d" * 64, {"acc": outcomes})})

    before = stored(tmp_path / "b", scored("0111" * 50))
    assert verdict(scored("0111" * 50), "piqa.acc>=baseline", before).ok
    assert verdict(scored("0111" * 49 + "0011"), "piqa.acc>=baseline-5%", before).ok
    assert verdict(scored("0101" * 50), "piqa.acc>=baseline-5%", before, True).status == "failed"
    assert not verdict(made(), "piqa.acc>=baseline-5%", before).ok
    (plain,) = check_gates(made(), [parse_gate("piqa.acc>=1%")])
    assert plain.message == "piqa.acc>=1%: piqa.acc was not measured"
