"""WinoGrande (Sakaguchi et al. 2020): the same ending after either name."""

from __future__ import annotations

from tolkit.evaluate.tasks.base import Item, LabelledTask
from tolkit.evaluate.tasks.records import Record

__all__ = ["WINOGRANDE"]


def _item(record: Record) -> Item:
    sentence = record.text("sentence")
    before, blank, after = sentence.partition("_")
    if not blank:
        record.wrong("sentence", "a blank written _", sentence)
    options = [record.text("option1"), record.text("option2")]
    ending = " " + after.strip()
    return Item(
        where=record.where,
        pairs=tuple((before + option, ending) for option in options),
        gold=record.label("answer", first=1, count=2),
        lengths=tuple(len(before + option) for option in options),
    )


WINOGRANDE = LabelledTask("winogrande", "1.0", ("acc",), _item)
