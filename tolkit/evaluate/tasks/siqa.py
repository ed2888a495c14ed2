"""Social IQa (Sap et al. 2019)."""

from __future__ import annotations

from tolkit.evaluate.tasks.base import Item, LabelledTask, choice_item
from tolkit.evaluate.tasks.records import Record

__all__ = ["SIQA"]


def _item(record: Record) -> Item:
    context = f"Q: {record.text('context')} {record.text('question')}\nA:"
    choices = [record.text(name) for name in ("answerA", "answerB", "answerC")]
    return choice_item(record, context, choices, record.label("label", first=1, count=3))


SIQA = LabelledTask("siqa", "0.0", ("acc",), _item, labels_field="label")
