"""Leaving layers out: what becomes of their tables (LAB finding 2).

Folding adds a dropped table to the next kept plane, a tail to the last kept one: the residual
stream is a running sum, so only the readers in between see the difference.
"""

from __future__ import annotations

from collections.abc import Sequence

from tolkit.errors import UsageError
from tolkit_formats.manifest import LayerStatus

__all__ = ["drop", "members_of"]


def drop(
    statuses: Sequence[LayerStatus], layers: Sequence[int], *, fold: bool, option: str
) -> tuple[LayerStatus, ...]:
    """Statuses after leaving `layers` out.

    A layer that was folded into one that now goes, goes along with it.

    Args:
        statuses: of all L layers as they are.
        layers: original indices, all kept so far.
        option: named in errors.

    Raises:
        UsageError: out of range, already without a table, or nothing would be left.
    """
    kept = [i for i, status in enumerate(statuses) if status.status == "kept"]
    for layer in layers:
        if not 0 <= layer < len(statuses):
            raise UsageError(
                f"{option}: layer {layer} is out of range, the model has layers 0 to "
                f"{len(statuses) - 1}"
            )
        if layer not in kept:
            raise UsageError(f"{option}: layer {layer} has no table any more, kept: {kept}")
    left = [layer for layer in kept if layer not in layers]
    if not left:
        raise UsageError(f"{option}: would drop all {len(kept)} layers that have a table")
    result = list(statuses)
    for layer in layers:
        later = [i for i in left if i > layer]
        into = later[0] if later else left[-1]
        result[layer] = LayerStatus("folded", into) if fold else LayerStatus("dropped")
        for i, status in enumerate(statuses):
            if status.into == layer:
                result[i] = result[layer]
    return tuple(result)


def members_of(
    before: Sequence[LayerStatus], after: Sequence[LayerStatus]
) -> dict[int, tuple[int, ...]]:
    """For each layer kept `after`: the planes of `before` whose sum it now stands for, in order."""
    members = {i: [i] for i, status in enumerate(after) if status.status == "kept"}
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.status == "kept" and new.into is not None:
            members[new.into].append(i)
    return {layer: tuple(sorted(planes)) for layer, planes in sorted(members.items())}
