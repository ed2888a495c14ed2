"""Whether two things come from the same weights."""

from __future__ import annotations

from tolkit.errors import MismatchError
from tolkit_formats.manifest import Sources

__all__ = ["require_same_sources"]


def require_same_sources(ours: Sources, theirs: Sources, *, where: str, hint: str) -> None:
    """MismatchError unless all digests agree: tokenizer, embedding, each layer's norm and FFN,
    config.

    Args:
        where: how the message begins, naming whose digests `theirs` are.
    """
    if ours.tokenizer != theirs.tokenizer:
        raise MismatchError(f"{where}: another tokenizer", hint=hint)
    if len(ours.layers) != len(theirs.layers):
        raise MismatchError(
            f"{where}: {len(theirs.layers)} layers, expected {len(ours.layers)}", hint=hint
        )
    if ours.embedding != theirs.embedding:
        raise MismatchError(f"{where}: another embedding", hint=hint)
    for layer, (a, b) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        if a != b:
            what = "norm" if a.norm != b.norm else "FFN"
            raise MismatchError(f"{where}: another {what} in layer {layer}", hint=hint)
    if ours.config != theirs.config:
        raise MismatchError(f"{where}: another config.json", hint=hint)
