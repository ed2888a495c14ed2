"""BoolQ (Clark et al. 2019), as in SuperGLUE: yes or no after a passage."""

from __future__ import annotations

from tolkit.evaluate.tasks.base import Item, LabelledTask, choice_item
from tolkit.evaluate.tasks.records import Record

__all__ = ["BOOLQ"]


def _item(record: Record) -> Item:
    context = f"{record.text('passage')}\nQuestion: {record.text('question')}?\nAnswer:"
    name = "label" if record.has("label") else "answer"
    value = record.get(name)
    gold = int(value) if isinstance(value, bool) else record.label(name, first=0, count=2)
    return choice_item(record, context, ["no", "yes"], gold)


BOOLQ = LabelledTask("boolq", "2.0", ("acc",), _item)
