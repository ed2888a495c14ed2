"""HellaSwag (Zellers et al. 2019): how a described scene goes on."""

from __future__ import annotations

import re

from tolkit.evaluate.tasks.base import Item, LabelledTask, choice_item
from tolkit.evaluate.tasks.records import Record

__all__ = ["HELLASWAG"]

_BRACKETED = re.compile(r"\[.*?\]")


def _cleaned(text: str) -> str:
    """Without WikiHow's marks: a title ends its sentence, other brackets go.

    Pairs of spaces become one in a single pass, so three leave two, as in the harness.
    """
    without_marks = _BRACKETED.sub("", text.strip().replace(" [title]", ". "))
    return without_marks.replace("  ", " ")


def _item(record: Record) -> Item:
    activity = record.text("activity_label")
    endings = record.texts("endings", at_least=2)
    if record.has("ctx_a", "ctx_b"):
        scene = f"{record.text('ctx_a')} {record.text('ctx_b').capitalize()}"
        context = _cleaned(f"{activity}: {scene}")
        endings = [_cleaned(ending) for ending in endings]
    else:
        context = f"{activity}: {record.text('ctx')}"
        for name, text in [("ctx", context), *(("endings", ending) for ending in endings)]:
            if "[header]" in text or "[title]" in text or "[step]" in text:
                record.wrong(name, "cleaned text, or the original ctx_a and ctx_b", text)
    gold = record.label("label", first=0, count=len(endings))
    return choice_item(record, context, endings, gold)


HELLASWAG = LabelledTask("hellaswag", "1.0", ("acc", "acc_norm"), _item)
