"""Prompts, choices and labels of every task, against texts written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _task_rows import ROWS, write_jsonl, write_rows

from tolkit.errors import DataError, UsageError
from tolkit.evaluate.tasks import TASKS, Item, Page, find_tasks, load_task
from tolkit.evaluate.tasks.wikitext import pages_of, undo_spacing


def items_of(folder: Path, name: str, *rows: dict[str, Any]) -> list[Item]:
    task = load_task(name, write_jsonl(folder / "rows.jsonl", rows))
    assert all(isinstance(item, Item) for item in task.items)
    return list(task.items)  # type: ignore[arg-type]


def test_lambada(tmp_path: Path) -> None:
    rows = [{"text": "He said: well, it"}, {"text": "word"}, {"text": "a\nb  c"}, {"text": "a b "}]
    first, alone, spaced, ended = items_of(tmp_path, "lambada", *rows)
    assert first.pairs == (("He said: well,", " it"),)
    assert first.gold is None
    assert alone.pairs == (("", " word"),)
    assert spaced.pairs == (("a\nb ", " c"),)
    assert ended.pairs == (("a b", " "),)


def test_siqa(tmp_path: Path) -> None:
    row = {"context": "Jo left.", "question": "Why?", "answerA": "a", "answerB": "bb"}
    (item,) = items_of(tmp_path, "siqa", {**row, "answerC": "c", "label": "2"})
    prompt = "Q: Jo left. Why?\nA:"
    assert item.pairs == ((prompt, " a"), (prompt, " bb"), (prompt, " c"))
    assert (item.gold, item.lengths) == (1, (1, 2, 1))


def test_arc_easy(tmp_path: Path) -> None:
    choices = {"text": ["red", "blue", "ω"], "label": ["A", "B", "C"]}
    numbered = {"text": ["up", "down"], "label": ["1", "2"]}
    original = {"stem": "Why?", "choices": [
        {"text": "a", "label": "A"}, {"text": "b", "label": "B"}, {"text": "c", "label": "C"},
        {"text": "d", "label": "D"}, {"text": "e", "label": "E"}]}  # fmt: skip
    plain, numeric, nested = items_of(
        tmp_path,
        "arc_easy",
        {"question": "Which?", "choices": choices, "answerKey": "C"},
        {"question": "Where?", "choices": numbered, "answerKey": "2"},
        {"question": original, "answerKey": "E"},
    )
    prompt = "Question: Which?\nAnswer:"
    assert plain.pairs == ((prompt, " red"), (prompt, " blue"), (prompt, " ω"))
    assert (plain.gold, plain.lengths) == (2, (3, 4, 1))
    assert numeric.gold == 1
    assert nested.pairs[4] == ("Question: Why?\nAnswer:", " e") and nested.gold == 4


def test_openbookqa(tmp_path: Path) -> None:
    choices = {"text": ["a", "b"], "label": ["A", "B"]}
    nested = {"stem": "Sharks", "choices": [{"text": t, "label": t.upper()} for t in "ab"]}
    rows = [
        {"question_stem": "Sharks", "choices": choices, "answerKey": " B"},
        {"question": nested, "answerKey": "B"},
    ]
    flat, original = items_of(tmp_path, "openbookqa", *rows)
    assert flat.pairs == (("Sharks", " a"), ("Sharks", " b")) and flat.gold == 1
    assert original.pairs == flat.pairs and original.gold == 1


def test_hellaswag(tmp_path: Path) -> None:
    endings = ["go [step] on.", "stop [title] now.", "a   b", "[x]"]
    original = {"activity_label": "Run", "ctx_a": "[header] How [title] A man.", "ctx_b": "he IS",
                "ctx": "other", "endings": endings, "label": "1"}  # fmt: skip
    cleaned = {"activity_label": "Run", "ctx": "A man. he", "endings": ["a", "b"], "label": 0}
    raw, ready = items_of(tmp_path, "hellaswag", original, cleaned)
    context = "Run: How. A man. He is"
    assert raw.pairs == (
        (context, " go on."),
        (context, " stop. now."),
        (context, " a  b"),
        (context, " "),
    )
    assert (raw.gold, raw.lengths) == (1, (6, 10, 4, 0))
    assert ready.pairs == (("Run: A man. he", " a"), ("Run: A man. he", " b"))


def test_winogrande(tmp_path: Path) -> None:
    row = {"sentence": "Ann hit Bo so _ ran away.", "option1": "Ann", "option2": "Bo"}
    (item,) = items_of(tmp_path, "winogrande", {**row, "answer": "2"})
    assert item.pairs == (
        ("Ann hit Bo so Ann", " ran away."),
        ("Ann hit Bo so Bo", " ran away."),
    )
    assert item.gold == 1


@pytest.mark.parametrize(("field", "value", "gold"), [
    ("answer", True, 1), ("answer", False, 0), ("label", 1, 1), ("label", False, 0),
    ("label", "0", 0),
])  # fmt: skip
def test_boolq(tmp_path: Path, field: str, value: object, gold: int) -> None:
    row = {"passage": "Ice is cold.", "question": "is ice hot", field: value}
    (item,) = items_of(tmp_path, "boolq", row)
    prompt = "Ice is cold.\nQuestion: is ice hot?\nAnswer:"
    assert item.pairs == ((prompt, " no"), (prompt, " yes"))
    assert item.gold == gold


def test_piqa_with_labels_beside(tmp_path: Path) -> None:
    row = {"goal": "Cut", "sol1": "knife", "sol2": "spoon"}
    file = write_jsonl(tmp_path / "piqa" / "valid.jsonl", [row, row, {**row, "label": 1}])
    (tmp_path / "piqa" / "valid-labels.lst").write_text("1\n0\n0\n")
    task = load_task("piqa", tmp_path)
    assert task.path == file
    prompt = "Question: Cut\nAnswer:"
    assert isinstance(task.items[0], Item)
    assert task.items[0].pairs == ((prompt, " knife"), (prompt, " spoon"))
    assert [item.gold for item in task.items] == [1, 0, 1]  # type: ignore[union-attr]
    assert [item.gold for item in load_task("piqa", file, 2).items] == [1, 0]  # type: ignore[union-attr]


# WikiText.


@pytest.mark.parametrize(("written", "read"), [
    ("a @-@ b 1 @,@ 000 2 @.@ 5", "a-b 1,000 2.5"),
    ("He : no ; well . so ! what ? yes , ok", "He: no; well. so! what? yes, ok"),
    ("( a ) [ b ] { c } \" d \" ' e '", "(a) [b] {c} \"d\" 'e'"),
    ("the dogs ' tail", "the dogs' tail"),
    ("the cat 's", "the cat's"),
    ("= = = = x = = = = \n = = y = =", "==== x ====\n== y =="),
    ("5 \N{DEGREE SIGN} C  N m \n b", "5\N{DEGREE SIGN}C  1 m\nb"),
    ("a/' 5/b", "a/'[0-9]/b"),
    (" = T = \n", " = T =\n"),
])  # fmt: skip
def test_spacing_is_undone(written: str, read: str) -> None:
    assert undo_spacing(written) == read


def test_spacing_as_the_harness_undoes_it(tmp_path: Path) -> None:
    preprocess = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    pieces = [" ", "  ", "a", "s", "N", "5", "@-@", "@,@", ":", ".", ",", "(", ")", "[", "]", "{",
              "}", '"', "'", "'s", "= =", "=", "\N{DEGREE SIGN}", "\n", "/' 5/"]  # fmt: skip
    draws = np.random.default_rng(0).integers(0, len(pieces), (2000, 40))
    for row in draws:
        text = "".join(pieces[i] + (" " if i % 3 else "") for i in row)
        assert undo_spacing(text) == preprocess.wikitext_detokenizer({"page": text})


def test_pages_begin_at_top_level_headings() -> None:
    text = " \n = A = \n \n text \n = = Part = = \n more \n \n = B C = \n end \n"
    assert pages_of(text) == [
        " = A = \n \n text \n = = Part = = \n more \n ",
        " = B C = \n end \n",
    ]


def test_pages_without_headings_are_cut_at_form_feeds() -> None:
    assert pages_of("one\ntwo\n\f\n\n\f\nthree") == ["one\ntwo", "three"]
    assert pages_of("x = y =\n") == ["x = y =\n"]
    assert pages_of("\n \n") == []


def test_wikitext_counts_the_page_as_written(tmp_path: Path) -> None:
    page = " = Ä = \n a @-@ b"
    (tmp_path / "test.txt").write_text(page, encoding="utf-8")
    from_text = load_task("wikitext", tmp_path / "test.txt")
    from_json = load_task("wikitext", write_jsonl(tmp_path / "test.jsonl", [{"page": page}]))
    (item,) = from_text.items
    assert isinstance(item, Page)
    assert (item.text, item.n_words, item.n_bytes) == (" = Ä =\na-b", 7, 17)
    assert from_text.digest == from_json.digest
    assert from_text.path != from_json.path


# Finding files, limits, digests.


def test_every_task_is_found_in_its_folder(tmp_path: Path) -> None:
    write_rows(tmp_path)
    found = find_tasks(list(TASKS), tmp_path)
    assert [task.name for task in found] == list(TASKS) == [
        "lambada", "siqa", "arc_easy", "hellaswag", "winogrande", "boolq", "piqa", "openbookqa",
        "wikitext",
    ]  # fmt: skip
    assert [len(task.items) for task in found] == [len(ROWS[name]) for name in TASKS]
    assert [task.version for task in found] == [TASKS[task.name].version for task in found]


@pytest.mark.parametrize(("name", "expected"), [("arc_easy", "test.jsonl"), ("siqa", "dev.jsonl")])
def test_test_files_come_first_only_where_labels_are_public(
    tmp_path: Path, name: str, expected: str
) -> None:
    for file in ("test.jsonl", "dev.jsonl", "val.jsonl"):
        write_jsonl(tmp_path / name / file, ROWS[name])
    assert load_task(name, tmp_path).path.name == expected
    assert load_task(name, tmp_path / name).path.name == expected


def test_limit(tmp_path: Path) -> None:
    files = write_rows(tmp_path)
    whole = load_task("siqa", files["siqa"])
    assert load_task("siqa", files["siqa"], 2).items == whole.items[:2]
    assert load_task("siqa", files["siqa"], 99).digest == whole.digest
    assert load_task("siqa", files["siqa"], 2).digest != whole.digest
    assert len(load_task("wikitext", files["wikitext"], 1).items) == 1
    with pytest.raises(UsageError, match="limit: expected at least 1, got 0"):
        load_task("siqa", files["siqa"], 0)


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    rows = ROWS["boolq"]
    base = load_task("boolq", write_jsonl(tmp_path / "a.jsonl", rows)).digest
    answers = [{"passage": row["passage"], "question": row["question"],
                "answer": bool(row["label"]), "title": "x"} for row in rows]  # fmt: skip
    assert load_task("boolq", write_jsonl(tmp_path / "b.jsonl", answers)).digest == base
    swapped = [{**rows[0], "label": 0}, *rows[1:]]
    assert load_task("boolq", write_jsonl(tmp_path / "c.jsonl", swapped)).digest != base
    turned = list(reversed(rows))
    assert load_task("boolq", write_jsonl(tmp_path / "d.jsonl", turned)).digest != base


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"task: expected one of lambada, .*, got 'mmlu'"):
        load_task("mmlu", tmp_path)
    with pytest.raises(UsageError, match="tasks: none named"):
        find_tasks([], tmp_path)
    with pytest.raises(UsageError, match="mmlu"):
        find_tasks(["piqa", "mmlu"], tmp_path)
    with pytest.raises(DataError, match="no file of task piqa here, expected piqa/ with one of"):
        load_task("piqa", tmp_path)
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read \(No such file"):
        load_task("piqa", tmp_path / "none.jsonl")
