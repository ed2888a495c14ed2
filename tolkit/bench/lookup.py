"""How fast rows of random tokens come, from each place, beside a bare gather of the same bytes.

n ids asked for, S record stride, K kept layers, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tolkit.bench.residency import make_cold, make_warm, record_paths
from tolkit.bench.specs import BATCHES, STATES, LookupSpec
from tolkit.errors import UsageError
from tolkit.evaluate.runnable import pick_device, pick_dtype
from tolkit.progress import Progress, SilentProgress
from tolkit.runtime.rows import TableRows, open_table_rows
from tolkit_formats import files
from tolkit_formats.frame_plan import least_cache_bytes
from tolkit_formats.limits import NO_SLOT
from tolkit_formats.reader import Bundle, open_bundle
from tolkit_formats.tensorfile import TensorFile

__all__ = ["GATHER", "LookupReport", "LookupResult", "bench_lookup"]

GATHER = "memmap gather"
_READER = "numpy reader"
_COPY = "device copy"
_COPY_BYTES = 256 << 20

_BARE = (GATHER, _READER)
_AGAIN = "cached"

_Ids = npt.NDArray[np.int64]
_Way = tuple[str, str]
_LookUp = Callable[[_Ids], Callable[[], Any]]
"""Given ids, what to time."""


@dataclass(frozen=True)
class LookupResult:
    """One way of looking up, with one batch.

    Attributes:
        what: ``disk``, ``host`` or ``device`` (decoded rows, through the runtime); ``memmap
            gather`` (bare bytes of the records, a numpy gather on the mapped files);
            ``numpy reader`` (checked bytes, `tolkit_formats`); ``device copy`` (a GPU's own
            bandwidth, bytes read and written).
        state: of the page cache; ``cached``: the same tokens asked of disk again at once, their
            records in the row cache where it has room; "" where it does not matter.
        batch: distinct tokens a call.
        rows_per_s, bytes_per_s: by the median call; bytes as stored. decoded_bytes_per_s: of the
            rows that came of it.
        ratio: bytes given a second (decoded where rows are) over those of a gather of the same
            tokens in the same state, the median.
        resident_before: share of the records in the page cache before the last call.
    """

    what: str
    state: str
    batch: int
    rows_per_s: float | None
    bytes_per_s: float
    decoded_bytes_per_s: float | None
    ratio: float | None
    resident_before: float | None


@dataclass(frozen=True)
class LookupReport:
    """All results, and what was looked up in."""

    spec: LookupSpec
    device: str
    record_bytes: float
    table_bytes: int
    results: tuple[LookupResult, ...]


def bench_lookup(spec: LookupSpec, progress: Progress | None = None) -> LookupReport:
    """Look up random distinct tokens, every way in turn with the same ones.

    Raises:
        UsageError: a batch larger than the number of rows. ResourceError: no such device, no
            room, or a page cache that is not in the state asked for.
        BundleError and its kin: a damaged bundle.
    """
    progress = SilentProgress() if progress is None else progress
    device = pick_device(spec.device)
    before = torch.get_num_threads()
    torch.set_num_threads(spec.threads or before)
    bundle = open_bundle(spec.bundle)
    tokens = _tokens_with_rows(bundle)
    batches = spec.batches or tuple(n for n in BATCHES if n <= len(tokens))
    for batch in batches:
        if batch > len(tokens):
            raise UsageError(
                f"batch: expected at most the {len(tokens)} rows there are, got {batch}"
            )
    results: list[LookupResult] = []
    try:
        with progress.task("lookup", len(spec.states) * len(batches), "batches") as task:
            for state in spec.states:
                for batch in batches:
                    task.note(f"{state}, {batch} rows")
                    results += _measured(spec, bundle, device, state, batch, tokens)
                    task.advance(1)
        if device.type == "cuda":
            results.append(_device_copy(device, spec.repeats))
    finally:
        torch.set_num_threads(before)
    return LookupReport(
        spec, device.type, _record_bytes(bundle), bundle.table_bytes, tuple(results)
    )


def _measured(
    spec: LookupSpec,
    bundle: Bundle,
    device: torch.device,
    state: str,
    batch: int,
    tokens: _Ids,
) -> Iterator[LookupResult]:
    paths = record_paths(bundle)
    share = make_warm(paths) if state == "warm" else None
    random = np.random.default_rng(batch)
    with ExitStack() as stack:
        ways = _ways(spec, bundle, device, state, stack)
        times: dict[_Way, list[float]] = {way: [] for way in ways}
        resident: dict[_Way, float | None] = {}
        for repeat in range(spec.repeats + 1):
            ids = np.sort(random.choice(tokens, batch, replace=False)).astype(np.int64)
            for way in ways:
                if state == "warm" and way[0] in _BARE:
                    ways[way](ids)()  # mapped and checked once before anything is timed
            for way, prepared in ways.items():
                look_up = prepared(ids)
                resident[way] = make_cold(paths) if state == "cold" else share
                _wait(device)
                started_s = time.perf_counter()
                look_up()
                _wait(device)
                if repeat:
                    times[way].append(time.perf_counter() - started_s)
    bare = times.get((GATHER, state))
    record_bytes = _record_bytes(bundle)
    decoded_bytes = len(bundle.layer_ids) * bundle.hidden_size * pick_dtype(spec.dtype).itemsize
    for (what, label), found in times.items():
        rate = batch / median(found)
        gain = 1.0 if what in _BARE else decoded_bytes / record_bytes
        yield LookupResult(
            what=what,
            state=label,
            batch=batch,
            rows_per_s=rate,
            bytes_per_s=rate * record_bytes,
            decoded_bytes_per_s=None if what in _BARE else rate * decoded_bytes,
            ratio=median(gain * a / b for a, b in zip(bare, found, strict=True)) if bare else None,
            resident_before=resident[what, label] if label in STATES else None,
        )


def _ways(
    spec: LookupSpec, bundle: Bundle, device: torch.device, state: str, stack: ExitStack
) -> dict[_Way, _LookUp]:
    """What is timed in this state. Tables in memory are measured once, with the warm ones."""
    ways: dict[_Way, _LookUp] = {}
    if bundle.manifest.coding is None:
        ways[GATHER, state] = _gathered(bundle)
    ways[_READER, state] = lambda ids: partial(_read, bundle, ids)
    dtype = pick_dtype(spec.dtype)
    for place in spec.tables:
        if place != "disk" and state == "cold" and "warm" in spec.states:
            continue
        most = spec.max_table_bytes if place == "disk" else None
        if place == "disk" and state == "cold":
            most = least_cache_bytes(bundle)
        rows = open_table_rows(bundle, place, device=device, dtype=dtype, max_table_bytes=most)
        stack.callback(rows.close)
        ways[place, state if place == "disk" else ""] = _fetched(rows)
        if place == "disk" and state == "warm":
            ways[place, _AGAIN] = _fetched(rows)
    return ways


def _gathered(bundle: Bundle) -> _LookUp:
    """A bare gather of record bytes on the mapped shards: places known, nothing checked."""
    mapped: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
    for tier in bundle.manifest.tiers:
        for shard in range(tier.num_shards):
            path = bundle.path / "tables" / tier.shard_name(shard)
            info = TensorFile(path).infos["records"]
            data = files.map_bytes(path, random_access=True)[info.start : info.end]
            mapped[tier.index, shard] = data.reshape(tier.shard_rows(shard), tier.stride)

    def prepared(ids: _Ids) -> Callable[[], Any]:
        slots = bundle.slots_of(ids)
        parts = []
        for tier, where in bundle.by_tier(slots):
            rows = slots[where] - tier.first_slot
            shards = rows // tier.rows_per_shard
            for shard in np.unique(shards).tolist():
                own = rows[shards == shard] - shard * tier.rows_per_shard
                parts.append((mapped[tier.index, shard], own))
        return lambda: [records.take(rows, axis=0) for records, rows in parts]

    return prepared


def _read(bundle: Bundle, ids: _Ids) -> Any:
    """Checked record bytes through the bundle's own reader."""
    slots = bundle.slots_of(ids)
    return [bundle.shards.take(tier, slots[where]) for tier, where in bundle.by_tier(slots)]


def _fetched(rows: TableRows) -> _LookUp:
    """Decoded rows of every layer, one layer's alive at a time as in a decoder."""

    def fetch(ids: _Ids) -> None:
        for plane_nD in rows.fetch(torch.from_numpy(ids)):
            del plane_nD

    return lambda ids: partial(fetch, ids)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_copy(device: torch.device, repeats: int) -> LookupResult:
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        started_s = time.perf_counter()
        target.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - started_s)
    rate = 2 * _COPY_BYTES / median(times[1:])
    return LookupResult(_COPY, "", 0, None, rate, None, None, None)


def _tokens_with_rows(bundle: Bundle) -> _Ids:
    slots_V = bundle.slot_of_token
    if slots_V is None:
        return np.arange(bundle.vocab_size, dtype=np.int64)
    return np.flatnonzero(slots_V != NO_SLOT).astype(np.int64)


def _record_bytes(bundle: Bundle) -> float:
    """Stored bytes of a record, the mean where they differ."""
    stored = sum(path.stat().st_size for path in record_paths(bundle))
    tiers = bundle.manifest.tiers
    if len(tiers) == 1 and not tiers[0].coded:
        return tiers[0].stride
    return stored / bundle.manifest.num_rows
