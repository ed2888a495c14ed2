"""Malformed task files: every message names file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _task_rows import CHOICES, ROWS, write_jsonl

from tolkit.errors import DataError
from tolkit.evaluate.tasks import load_task

MISSING = object()


def refusal(name: str, path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_task(name, path)
    assert caught.value.exit_code == 4
    return caught.value.message


FIELDS = {
    "lambada": ["text"],
    "siqa": ["context", "question", "answerA", "answerB", "answerC", "label"],
    "arc_easy": ["question", "choices", "answerKey"],
    "hellaswag": ["activity_label", "endings", "label"],
    "winogrande": ["sentence", "option1", "option2", "answer"],
    "boolq": ["passage", "question"],
    "piqa": ["goal", "sol1", "sol2", "label"],
    "openbookqa": ["question_stem", "choices", "answerKey"],
    "wikitext": ["page"],
}
EACH_FIELD = [(name, field) for name, fields in FIELDS.items() for field in fields]


@pytest.mark.parametrize(("name", "field"), EACH_FIELD)
def test_a_missing_field(tmp_path: Path, name: str, field: str) -> None:
    broken = {key: value for key, value in ROWS[name][0].items() if key != field}
    path = write_jsonl(tmp_path / "f.jsonl", [ROWS[name][0], broken])
    assert refusal(name, path) == f"{path}:2: field {field!r} is missing"


@pytest.mark.parametrize("value", [None, [], {"a": 1}, 1.5, True], ids=repr)
@pytest.mark.parametrize(("name", "field"), EACH_FIELD)
def test_a_field_of_another_type(tmp_path: Path, name: str, field: str, value: object) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [ROWS[name][0], {**ROWS[name][0], field: value}])
    message = refusal(name, path)
    assert message.startswith(f"{path}:2: ")
    assert f"{field!r}" in message or (field == "question" and "'stem'" in message)


LABELS = [
    ("siqa", "label", "0", "a label from 1 to 3, got '0'"),
    ("siqa", "label", 4, "a label from 1 to 3, got 4"),
    ("siqa", "label", "", "a label from 1 to 3, got ''"),
    ("siqa", "label", "-1", "a label from 1 to 3, got '-1'"),
    ("siqa", "label", "²", "a label from 1 to 3, got '²'"),
    ("hellaswag", "label", "", "a label from 0 to 3, got ''"),
    ("hellaswag", "label", 4, "a label from 0 to 3, got 4"),
    ("winogrande", "answer", "", "a label from 1 to 2, got ''"),
    ("winogrande", "answer", "0", "a label from 1 to 2, got '0'"),
    ("boolq", "label", -1, "a label from 0 to 1, got -1"),
    ("boolq", "label", "yes", "a label from 0 to 1, got 'yes'"),
    ("piqa", "label", 2, "a label from 0 to 1, got 2"),
    ("arc_easy", "answerKey", "D", "one of A, B, C, got 'D'"),
    ("arc_easy", "answerKey", "1", "one of A, B, C, got '1'"),
    ("openbookqa", "answerKey", "", "one of A, B, C, got ''"),
    ("lambada", "text", " \n", "a passage, got ' \\n'"),
    ("winogrande", "sentence", "no blank", "a blank written _, got 'no blank'"),
    ("hellaswag", "endings", ["one"], "at least 2 strings, got a list of 1"),
    ("hellaswag", "endings", ["a", 2], "a list of strings, got a list of 2"),
]


@pytest.mark.parametrize(("name", "field", "value", "expected"), LABELS)
def test_a_value_out_of_range(
    tmp_path: Path, name: str, field: str, value: object, expected: str
) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [{**ROWS[name][0], field: value}])
    assert refusal(name, path) == f"{path}:1: field {field!r}: expected {expected}"


@pytest.mark.parametrize(("choices", "expected"), [
    ({**CHOICES, "label": ["A", "B"]}, "in 'choices': field 'label': expected 3 labels, one a"),
    ({"text": ["a", "b"]}, "in 'choices': field 'label' is missing"),
    ({"text": ["a"], "label": ["A"]}, "in 'choices': field 'text': expected at least 2 strings"),
    ([{"text": "a", "label": "A"}, {"label": "B"}], "in 'choices': field 'text' is missing"),
    ([{"text": "a", "label": "A"}], "field 'choices': expected at least two objects with text"),
    ("a, b", "field 'choices': expected an object, got 'a, b'"),
])  # fmt: skip
def test_choices_that_do_not_fit(tmp_path: Path, choices: Any, expected: str) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [{**ROWS["arc_easy"][0], "choices": choices}])
    assert refusal("arc_easy", path).startswith(f"{path}:1: {expected}")


def test_marks_in_a_context_said_to_be_clean(tmp_path: Path) -> None:
    row = {"activity_label": "A", "ctx": "How [title] B", "endings": ["a", "b"], "label": 0}
    path = write_jsonl(tmp_path / "f.jsonl", [row])
    expected = "field 'ctx': expected cleaned text, or the original ctx_a and ctx_b"
    assert expected in refusal("hellaswag", path)
    write_jsonl(path, [{**row, "ctx": "How B", "endings": ["a", "b [step]"]}])
    assert "field 'endings': expected cleaned text" in refusal("hellaswag", path)


GOOD = json.dumps(ROWS["piqa"][0]).encode()


@pytest.mark.parametrize(("content", "line", "expected"), [
    (GOOD + b"\n{'goal': 1}", 2, "not JSON"),
    (GOOD[:-1], 1, "not JSON"),
    (GOOD + GOOD, 1, "not JSON"),
    (b"[1, 2]", 1, "expected a JSON object, got a list of 2"),
    (b'"text"', 1, "expected a JSON object, got 'text'"),
    (b'{"goal": "a", "goal": "b"}', 1, "duplicate key 'goal'"),
    (b'{"goal": NaN}', 1, "NaN is not JSON"),
    (b"\n\n" + GOOD + b"\n\xff\xfe", 4, "not UTF-8 text (byte 0xff)"),
    (b'{"goal": ' + b"[" * 5000, 1, "nested deeper"),
    (GOOD.replace(b"Sit", b"\\ud800"), 1, "field 'goal': expected Unicode text, got"),
])  # fmt: skip
def test_lines_that_are_no_records(
    tmp_path: Path, content: bytes, line: int, expected: str
) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    message = refusal("piqa", path)
    assert message.startswith(f"{path}:{line}: ") and expected in message


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf\n"])
def test_empty_files(tmp_path: Path, content: bytes) -> None:
    for name, suffix, expected in [("piqa", "jsonl", "no records"), ("wikitext", "txt", "empty")]:
        path = tmp_path / f"f.{suffix}"
        path.write_bytes(content)
        assert expected in refusal(name, path)


def test_byte_order_mark_blank_lines_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + GOOD)
    task = load_task("piqa", path)
    assert [item.where for item in task.items] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(("labels", "expected"), [
    ("0\n", "expected 2 labels, one for each record of valid.jsonl, got 1"),
    ("0\n1\n1\n", "expected 2 labels, one for each record of valid.jsonl, got 3"),
    ("0\n2\n", "field 'label': expected a label from 0 to 1, got '2'"),
    ("0\nx\n", "field 'label': expected a label from 0 to 1, got 'x'"),
    (None, "valid.jsonl:1: field 'label' is missing"),
])  # fmt: skip
def test_labels_beside_that_do_not_fit(tmp_path: Path, labels: str | None, expected: str) -> None:
    rows = [{"goal": "a", "sol1": "b", "sol2": "c"}] * 2
    path = write_jsonl(tmp_path / "valid.jsonl", rows)
    if labels is not None:
        (tmp_path / "valid-labels.lst").write_text(labels)
    assert expected in refusal("piqa", path)
