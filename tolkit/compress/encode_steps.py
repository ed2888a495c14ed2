"""Encoding `steps` into a budget: fit, encode, and again where the size came out wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from tolkit.compress.encode import encode_rows
from tolkit.compress.fit_bands import filled_plan
from tolkit.compress.fit_steps import StepsFitter
from tolkit.compress.plan import EncodePlan
from tolkit.compress.resolve import WorkingArrays
from tolkit.errors import UsageError
from tolkit.parallel import BlockPool
from tolkit.progress import Progress
from tolkit.sources import TableSource
from tolkit_formats.layer_errors import ErrorSums
from tolkit_formats.reader import shared_name
from tolkit_formats.sizes import table_bytes
from tolkit_formats.writer import BundleWriter

__all__ = ["encode_within", "named_arrays"]

_IN_HAND = 0.003
_FULL = 0.99  # below that one more attempt is worth its time
_ATTEMPTS = 4
_TARGET = "entropy_target"
_FIT = "bands"  # the note that require_same_fit leaves

Stored = dict[str, tuple[str, npt.NDArray[Any]]]


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
    budget_bytes = plan.table_bytes
    first, target = writer.note(_TARGET) or (0, int(budget_bytes * (1 - _IN_HAND)))
    for attempt in range(first, _ATTEMPTS):
        filled = fitter.fit(target)
        decided = replace(
            filled_plan(plan, filled), coding=filled.coding, layer_bytes=filled.layer_bytes
        )
        stored: Stored = named_arrays({i: layer.stored for i, layer in filled.layers.items()})
        stored |= filled.common
        require_same_fit(decided, stored)
        writer.remember(_TARGET, [attempt, target])
        shared = WorkingArrays(filled.layers)
        errors = encode_rows(source, decided, shared, writer, pool, progress, filled.coders)
        size = table_bytes(
            filled.tiers,
            {name: (dtype, array.shape) for name, (dtype, array) in stored.items()},
            mapped_vocab_size=source.vocab_size if source.slot_of_token_V is not None else None,
            shard_bytes=writer.shard_bytes(),
        )
        if size <= budget_bytes and (attempt or size >= _FULL * budget_bytes):
            return replace(decided, table_bytes=size), stored, errors
        target = int(target * budget_bytes / size * (1 - _IN_HAND / 2))
        writer.forget_shards(_FIT)
        writer.remember(_TARGET, [attempt + 1, target])
    raise UsageError(
        f"budget: {budget_bytes:,} bytes could not be met in {_ATTEMPTS} attempts, the last took "
        f"{size:,}",
        hint="give a little more, or --coding fixed",
    )


def named_arrays(layers: Mapping[int, Mapping[str, tuple[str, npt.NDArray[Any]]]]) -> Stored:
    """Arrays under their full names in tables/bases.safetensors."""
    return {
        shared_name(layer, name): array
        for layer, arrays in layers.items()
        for name, array in arrays.items()
    }
