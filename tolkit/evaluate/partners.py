"""Whether models, tokenizer and text belong together; asked before anything is scored."""

from __future__ import annotations

from collections.abc import Sequence

from tolkit.errors import DataError, MismatchError, UsageError
from tolkit.evaluate.runnable import Runnable
from tolkit.evaluate.windows import Windows

__all__ = ["check_models", "check_partners"]


def check_partners(
    candidates: Sequence[Runnable],
    reference: Runnable | None,
    windows: Windows,
    labels: Sequence[str],
) -> None:
    """Raises MismatchError, DataError or UsageError as `evaluate` says; `labels` name candidates.

    Tokenizers are compared by their vocabulary in id order, so two files that mean the same are
    the same.
    """
    if not len(windows):
        raise DataError("text: no windows, nothing to evaluate")
    named = check_models(candidates, reference, labels)
    base_label, base = named[0]
    vocabulary = base.model.config.vocab_size
    for label, runnable in named:
        limit = runnable.model.config.max_position_embeddings
        if windows.length > limit:
            raise UsageError(
                f"window: {windows.length} tokens, {label} reads at most {limit}",
                hint=f"use --window {limit}",
            )
    if windows.tokenizer_digest != base.tokenizer.digest:
        raise MismatchError(
            f"text: cut with another tokenizer than that of {base_label}, expected digest "
            f"{base.tokenizer.digest[:12]}, got {windows.tokenizer_digest[:12]}"
        )
    smallest, largest = windows.id_range()
    if largest >= vocabulary or smallest < 0:
        raise MismatchError(
            f"text: holds token id {largest}, the models' vocabulary has {vocabulary} rows"
        )


def check_models(
    candidates: Sequence[Runnable], reference: Runnable | None, labels: Sequence[str]
) -> list[tuple[str, Runnable]]:
    """The reference, where there is one, and the candidates, by name, once they are known to share
    tokenizer and vocabulary.

    Raises:
        UsageError: no candidates.      MismatchError: another tokenizer or vocabulary.
    """
    if not candidates:
        raise UsageError("candidates: none given, expected at least one model")
    named = list(zip(labels, candidates, strict=True))
    if reference is not None:
        named.insert(0, ("reference", reference))
    base_label, base = named[0]
    vocabulary = base.model.config.vocab_size
    for label, runnable in named:
        if runnable.tokenizer.digest != base.tokenizer.digest:
            raise MismatchError(
                f"{label}: its tokenizer is not that of {base_label}, expected digest "
                f"{base.tokenizer.digest[:12]}, got {runnable.tokenizer.digest[:12]}",
                hint="compare models that share a tokenizer",
            )
        found = runnable.model.config.vocab_size
        if found != vocabulary:
            raise MismatchError(
                f"{label}: vocabulary of another size than {base_label}'s, expected "
                f"{vocabulary}, got {found}"
            )
    return named
