"""LAMBADA (Paperno et al. 2016), OpenAI's text: the last word of a passage."""

from __future__ import annotations

from tolkit.evaluate.tasks.base import Item, LabelledTask
from tolkit.evaluate.tasks.records import Record

__all__ = ["LAMBADA"]


def _item(record: Record) -> Item:
    passage = record.text("text")
    if not passage.strip():
        record.wrong("text", "a passage", passage)
    context, _, word = passage.rpartition(" ")
    return Item(record.where, ((context, " " + word),))


LAMBADA = LabelledTask("lambada", "1.0", ("perplexity", "acc"), _item, test_split=True)
