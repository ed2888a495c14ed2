"""Lettered choices: the form ARC and OpenBookQA share."""

from __future__ import annotations

from tolkit.evaluate.tasks.records import Record

__all__ = ["lettered_choices"]


def lettered_choices(record: Record) -> tuple[list[str], int]:
    """Texts of ``choices`` and the index ``answerKey`` names.

    ``choices`` is {"text": [...], "label": [...]}, or the original list of {"text", "label"},
    which lies in ``question`` beside its ``stem``. Labels may be letters or numbers.
    """
    holder = record.part("question") if isinstance(record.fields.get("question"), dict) else record
    if isinstance(holder.get("choices"), list):
        entries = holder.fields["choices"]
        if not all(isinstance(entry, dict) for entry in entries) or len(entries) < 2:
            holder.wrong("choices", "at least two objects with text and label", entries)
        parts = [Record(f"{holder.where}: in 'choices'", entry) for entry in entries]
        texts = [part.text("text") for part in parts]
        labels = [part.text("label") for part in parts]
    else:
        choices = holder.part("choices")
        texts = choices.texts("text", at_least=2)
        labels = choices.texts("label", at_least=2)
        if len(labels) != len(texts):
            choices.wrong("label", f"{len(texts)} labels, one a text", labels)
    key = record.text("answerKey").strip()
    if key not in labels:
        record.wrong("answerKey", f"one of {', '.join(labels)}", key)
    return texts, labels.index(key)
