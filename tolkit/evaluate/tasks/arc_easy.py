"""ARC, easy set (Clark et al. 2018): three to five choices."""

from __future__ import annotations

from tolkit.evaluate.tasks.base import Item, LabelledTask, choice_item
from tolkit.evaluate.tasks.options import lettered_choices
from tolkit.evaluate.tasks.records import Record

__all__ = ["ARC_EASY"]


def _item(record: Record) -> Item:
    original = isinstance(record.fields.get("question"), dict)
    question = record.part("question").text("stem") if original else record.text("question")
    choices, gold = lettered_choices(record)
    return choice_item(record, f"Question: {question}\nAnswer:", choices, gold)


ARC_EASY = LabelledTask("arc_easy", "1.0", ("acc", "acc_norm"), _item, test_split=True)
