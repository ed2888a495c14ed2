"""A few rows of every task, in the forms the files and the harness' data sets have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

CHOICES = {"text": ["a mat", "the cat", "42"], "label": ["A", "B", "C"]}
NUMBERED = {"text": ["sat on", "a hat", "times 7", "who"], "label": ["1", "2", "3", "4"]}

ROWS: dict[str, Rows] = {
    "lambada": [
        {"text": "the cat sat on a mat"},
        {"text": "who are you to say it did not?  Well"},
        {"text": "a line\nends here \n and then"},
        {"text": "cat"},
        {"text": "42 times 7 [1, 2]"},
        {"text": "it is 42"},
    ],
    "siqa": [
        {
            "context": "Tracy sat on a mat.",
            "question": "What will Tracy want?",
            "answerA": "a cat",
            "answerB": "to say it",
            "answerC": "who",
            "label": str(label),
        }
        for label in (1, 2, 3)
    ],
    "arc_easy": [
        {"id": "a", "question": "Who sat?", "choices": CHOICES, "answerKey": "B"},
        {"id": "b", "question": "What is 'it'?", "choices": NUMBERED, "answerKey": "3"},
        {"id": "c", "question": "Same?", "choices": {**CHOICES, "text": ["x", "x", "y"]},
         "answerKey": "A"},
    ],
    "hellaswag": [
        {
            "ind": 24,
            "activity_label": "Sitting on mats",
            "ctx_a": "[header] How to sit [title] Find a mat. [step] Sit on it.",
            "ctx_b": "the Cat",
            "ctx": "unused",
            "endings": ["sat [substeps] on   it.", "[title] did not.", "Well [title] then.", "7"],
            "label": "2",
        },
        {
            "ind": 25,
            "activity_label": " Cats",
            "ctx_a": "A cat is on a mat.",
            "ctx_b": "",
            "ctx": "unused",
            "endings": ["It sat.", "It sat  down.", "It is 42.", "Who?"],
            "label": "0",
        },
    ],
    "winogrande": [
        {"sentence": "The cat sat on the mat as _ was warm.", "option1": "the cat",
         "option2": "the mat", "answer": "2"},
        {"sentence": "_ sat and _ did not.", "option1": "Ann", "option2": "Bo", "answer": "1"},
    ],
    "boolq": [
        {"passage": "The cat sat.", "question": "did it sit", "label": 1},
        {"passage": "A mat (42)\nis here.", "question": "is it a hat", "label": 0},
    ],
    "piqa": [
        {"goal": "Sit on a mat", "sol1": "Find a mat, sit.", "sol2": "Find a cat.", "label": 0},
        {"goal": "Say it", "sol1": "Well:", "sol2": "Not at all then!", "label": 1},
    ],
    "openbookqa": [
        {"id": "7-1", "question_stem": "The cat sat on", "choices": CHOICES, "answerKey": "A"},
        {"id": "7-2", "question_stem": "Who are ", "choices": NUMBERED, "answerKey": " 4"},
    ],
    "wikitext": [
        {"page": " = The Cat = \n \n The cat 's mat ( 42 @-@ fold ) , sat on ; 7 @,@ 000 N \" times"
                 " \" .\n = = Mats = = \n it did not ? Well : it cost 5 @.@ 5 . \n" * 3},
        {"page": " = Who = \n a cat"},
    ],
}  # fmt: skip


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_rows(folder: Path, rows: Mapping[str, Rows] = ROWS) -> dict[str, Path]:
    """FOLDER/<task>/validation.jsonl for each task; the files by task."""
    return {name: write_jsonl(folder / name / "validation.jsonl", rows[name]) for name in rows}
