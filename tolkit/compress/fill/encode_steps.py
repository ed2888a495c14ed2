"""Encoding `steps` into a budget: fit, encode, and again where the size came out wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy.typing as npt

from tolkit.compress.encode import encode_rows
from tolkit.compress.fill.bands import filled_plan
from tolkit.compress.fill.resolve import WorkingArrays
from tolkit.compress.fill.steps import FilledSteps, StepsFitter
from tolkit.compress.plan import EncodePlan
from tolkit.errors import UsageError
from tolkit.parallel import BlockPool
from tolkit.progress import Progress
from tolkit.sources import TableSource
from tolkit_formats.layer_errors import ErrorSums
from tolkit_formats.reader import shared_name
from tolkit_formats.sizes import table_bytes
from tolkit_formats.writer import BundleWriter

__all__ = ["Stored", "coded_bytes", "decided", "encode_within", "meet", "named_arrays"]

_IN_HAND = 0.003
_FULL = 0.99  # below that one more attempt is worth its time
_ATTEMPTS = 4
_TARGET = "entropy_target"
_FIT = "bands"  # the note that require_same_fit leaves

Stored = dict[str, tuple[str, npt.NDArray[Any]]]
_Made = TypeVar("_Made")


def encode_within(
    source: TableSource,
    plan: EncodePlan,
    fitter: StepsFitter,
    writer: BundleWriter,
    pool: BlockPool,
    progress: Progress,
    require_same_fit: Callable[[EncodePlan, Stored], None],
) -> tuple[EncodePlan, Stored, list[ErrorSums]]:
    """Write all records so that tables/ takes at most `plan.table_bytes`.

    What the attempt aims at is noted before it starts, so that an interrupted run continues with
    the parameters its finished shards were written with.

    Args:
        require_same_fit: starts over where finished shards were encoded with another fit.

    Returns:
        the plan with everything decided, the shared arrays to store, and what layers lost.

    Raises:
        UsageError: below the floor.
    """
    begun = writer.note(_TARGET)

    def attempt(number: int, target: int) -> tuple[int, tuple[EncodePlan, Stored, list[ErrorSums]]]:
        if number > (begun or [0])[0]:
            writer.forget_shards(_FIT)
            writer.remember(_TARGET, [number, target])
        filled = fitter.fit(target)
        plan_now, stored = decided(plan, filled)
        require_same_fit(plan_now, stored)
        writer.remember(_TARGET, [number, target])
        shared = WorkingArrays(filled.layers)
        errors = encode_rows(source, plan_now, shared, writer, pool, progress, filled.coders)
        size = coded_bytes(source, filled, stored, writer.shard_bytes())
        return size, (replace(plan_now, table_bytes=size), stored, errors)

    return meet(plan.table_bytes, fitter.floor_bytes, attempt, begun)


def meet(
    budget_bytes: int,
    floor_bytes: int,
    attempt: Callable[[int, int], tuple[int, _Made]],
    begun: tuple[int, int] | None = None,
) -> _Made:
    """What the first attempt makes that takes at most `budget_bytes`, and about as much.

    Args:
        floor_bytes: less is not aimed at.
        attempt: from its number and a target in bytes to what came out: bytes and anything.
        begun: number and target of the attempt that an interrupted run was at.

    Raises:
        UsageError: none does.
    """
    first, target = begun or (0, max(floor_bytes, int(budget_bytes * (1 - _IN_HAND))))
    size = 0
    for number in range(first, _ATTEMPTS):
        size, made = attempt(number, target)
        if size <= budget_bytes and (number or size >= _FULL * budget_bytes):
            return made
        target = max(floor_bytes, int(target * budget_bytes / size * (1 - _IN_HAND / 2)))
    raise UsageError(
        f"budget: {budget_bytes:,} bytes could not be met in {_ATTEMPTS} attempts, the last took "
        f"{size:,}",
        hint="give a little more, or --coding fixed",
    )


def decided(plan: EncodePlan, filled: FilledSteps) -> tuple[EncodePlan, Stored]:
    """The plan with everything that the fit decided, and the arrays to store."""
    plan = replace(filled_plan(plan, filled), coding=filled.coding, layer_bytes=filled.layer_bytes)
    stored = named_arrays({i: layer.stored for i, layer in filled.layers.items()})
    return plan, stored | dict(filled.common)


def coded_bytes(
    source: TableSource, filled: FilledSteps, stored: Stored, shard_bytes: Mapping[str, int]
) -> int:
    """Bytes under tables/ once the records are coded.

    Args:
        shard_bytes: of their files, by name.
    """
    return table_bytes(
        filled.tiers,
        {name: (dtype, array.shape) for name, (dtype, array) in stored.items()},
        mapped_vocab_size=source.vocab_size if source.slot_of_token_V is not None else None,
        shard_bytes=shard_bytes,
    )


def named_arrays(layers: Mapping[int, Mapping[str, tuple[str, npt.NDArray[Any]]]]) -> Stored:
    """Arrays under their full names in tables/bases.safetensors."""
    return {
        shared_name(layer, name): array
        for layer, arrays in layers.items()
        for name, array in arrays.items()
    }
