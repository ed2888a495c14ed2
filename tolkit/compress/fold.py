"""Leaving layers out: what becomes of their tables (LAB finding 2).

Folding adds a dropped table to the next kept plane, a tail to the last kept one: the residual
stream is a running sum, so only the readers in between see the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tolkit.errors import UsageError
from tolkit_formats.manifest import LayerStatus

__all__ = ["drop", "members_of"]


def drop(
    statuses: Sequence[LayerStatus],
    layers: Sequence[int],
    *,
    fold: bool,
    option: str,
    into: Mapping[int, int] | None = None,
) -> tuple[LayerStatus, ...]:
    """Statuses after leaving `layers` out.

    A layer that was folded into one that now goes, goes along with it.

    Args:
        statuses: of all L layers as they are.
        layers: original indices, all kept so far.
        option: named in errors.
        into: where to fold each of `layers`; by default the next kept one, else the last.

    Raises:
        UsageError: out of range, already without a table, or nothing would be left; `into` names
            other layers than `layers`, or a receiver that has no table then.
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
    receiver = {layer: next((i for i in left if i > layer), left[-1]) for layer in layers}
    if into is not None:
        _require_receivers(into, layers, left, fold, option)
        receiver = dict(into)
    result = list(statuses)
    for layer in layers:
        result[layer] = LayerStatus("folded", receiver[layer]) if fold else LayerStatus("dropped")
        for i, status in enumerate(statuses):
            if status.into == layer:
                result[i] = result[layer]
    return tuple(result)


def _require_receivers(
    into: Mapping[int, int], layers: Sequence[int], left: Sequence[int], fold: bool, option: str
) -> None:
    """UsageError unless each of `layers` is folded into one of those left."""
    if not fold or set(into) != set(layers):
        raise UsageError(
            f"{option}: receivers are given for layers {sorted(into)}, expected "
            f"{sorted(layers) if fold else 'none, their tables are dropped'}"
        )
    for layer, to in sorted(into.items()):
        if to not in left:
            raise UsageError(f"{option}: layer {layer} is folded into {to}, expected one of {left}")


def members_of(
    before: Sequence[LayerStatus], after: Sequence[LayerStatus]
) -> dict[int, tuple[int, ...]]:
    """For each layer kept `after`: the planes of `before` whose sum it now stands for, in order."""
    members = {i: [i] for i, status in enumerate(after) if status.status == "kept"}
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.status == "kept" and new.into is not None:
            members[new.into].append(i)
    return {layer: tuple(sorted(planes)) for layer, planes in sorted(members.items())}
