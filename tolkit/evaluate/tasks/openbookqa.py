"""OpenBookQA (Mihaylov et al. 2018), without the book: the stem alone is the prompt."""

from __future__ import annotations

from tolkit.evaluate.tasks.base import Item, LabelledTask, choice_item
from tolkit.evaluate.tasks.options import lettered_choices
from tolkit.evaluate.tasks.records import Record

__all__ = ["OPENBOOKQA"]


def _item(record: Record) -> Item:
    original = isinstance(record.fields.get("question"), dict)
    stem = record.part("question").text("stem") if original else record.text("question_stem")
    choices, gold = lettered_choices(record)
    return choice_item(record, stem, choices, gold)


OPENBOOKQA = LabelledTask("openbookqa", "1.0", ("acc", "acc_norm"), _item, test_split=True)
