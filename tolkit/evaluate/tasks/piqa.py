"""PIQA (Bisk et al. 2020): the sensible of two solutions. Labels may lie in a file beside."""

from __future__ import annotations

from tolkit.evaluate.tasks.base import Item, LabelledTask, choice_item
from tolkit.evaluate.tasks.records import Record

__all__ = ["PIQA"]


def _item(record: Record) -> Item:
    context = f"Question: {record.text('goal')}\nAnswer:"
    choices = [record.text("sol1"), record.text("sol2")]
    return choice_item(record, context, choices, record.label("label", first=0, count=2))


PIQA = LabelledTask("piqa", "1.0", ("acc", "acc_norm"), _item, labels_field="label")
