"""A text's tokens against row caches: hit rates, reads, and what they mean for a disk.

Policies the runtime has are run with its own cache and real reads; others are simulated, and say
so. One token at a time, as decoding one text asks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tolkit.bench.policies import SIMULATED
from tolkit.bench.residency import make_cold, make_warm, record_paths, resident_share
from tolkit.bench.specs import ReplaySpec
from tolkit.data import read_documents
from tolkit.data.limit import limited
from tolkit.errors import DataError, UsageError
from tolkit.progress import Progress, SilentProgress
from tolkit.tables import bundle_tokenizer
from tolkit_formats.cached_rows import CachedRows
from tolkit_formats.frame_plan import least_cache_bytes, plan_frames
from tolkit_formats.frames import Frames
from tolkit_formats.limits import NO_SLOT
from tolkit_formats.reader import Bundle, open_bundle

__all__ = ["ReplayReport", "ReplayResult", "bench_replay", "replay_ids", "token_ids"]

_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReplayResult:
    """One policy with one size of the cache.

    Attributes:
        policy: ``seeded`` (half for the most frequent tokens, half for what was used last: the
            runtime's own), ``lru`` (all for what was used last), or one of the simulated ones.
        by: ``runtime`` or ``simulated``.
        state: of the page cache before the run; "" for a simulation.
        cache_bytes: its ceiling, bookkeeping counted. frames: records it has room for.
        hits: tokens whose record was in it. hit_rate: of all tokens.
        reads_per_token, bytes_per_token: of records, those of the seed left out.
        seed_bytes: read before the first token.
        us_per_token: measured, to have each token's record as stored; None for a simulation.
        predicted_tokens_per_s: on the disk that was described; None where nothing limits.
        resident_before, resident_after: share of the records in the page cache.
    """

    policy: str
    by: str
    state: str
    cache_bytes: int
    frames: int
    hits: int
    hit_rate: float
    reads_per_token: float
    bytes_per_token: float
    seed_bytes: int
    us_per_token: float | None
    predicted_tokens_per_s: float | None
    resident_before: float | None = None
    resident_after: float | None = None


@dataclass(frozen=True)
class ReplayReport:
    """All results, and what was replayed.

    tokens: of the text. without_record: of them, tokens that a partial bundle has no record of;
    they ask nothing of a cache. distinct: different ones among the others.
    """

    spec: ReplaySpec
    tokens: int
    without_record: int
    distinct: int
    record_bytes: float
    table_bytes: int
    results: tuple[ReplayResult, ...]


def bench_replay(spec: ReplaySpec, progress: Progress | None = None) -> ReplayReport:
    """Replay `spec.data` with the bundle's own tokenizer.

    Raises:
        UsageError: a cache without room for a record; seeded or static without token counts.
        DataError: no such text, or no tokens in it.
        ResourceError: a page cache that is not in the state asked for.
        BundleError and its kin: a damaged bundle.
    """
    progress = SilentProgress() if progress is None else progress
    ids = token_ids(open_bundle(spec.bundle), spec.data, spec.limit_tokens)
    return replay_ids(spec, ids, progress)


def token_ids(bundle: Bundle, data: Sequence[str], limit_tokens: int | None) -> _Ids:
    """Ids of a text, each document's end included where the tokenizer has one; int64 [n].

    Raises:
        DataError: there are none.
    """
    tokenizer = bundle_tokenizer(bundle)
    documents = read_documents(list(data))
    if limit_tokens is not None:
        documents = limited(documents, tokenizer, limit_tokens)
    ending = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    found: list[int] = []
    for document in documents:
        own = tokenizer.encode(document.text)
        found += own + ending if own else []
    if not found:
        raise DataError(f"{' '.join(data)}: holds no token")
    return np.asarray(found, np.int64)


def replay_ids(spec: ReplaySpec, ids: _Ids, progress: Progress | None = None) -> ReplayReport:
    """Replay ids at hand; `spec.data` is not read."""
    progress = SilentProgress() if progress is None else progress
    bundle = open_bundle(spec.bundle)
    known = bundle.token_counts() is not None and bundle.slot_of_token is not None
    policies = spec.policies or (("seeded", "lru") if known else ("lru",))
    for policy in policies:
        if policy in {"seeded", "static"} and not known:
            raise UsageError(
                f"policies: {policy} needs token counts, {spec.bundle} has none",
                hint="build it from a checkpoint with token_counts.safetensors, or take lru",
            )
    slots_V = bundle.slot_of_token
    has_record = np.ones(len(ids), bool) if slots_V is None else slots_V[ids] != NO_SLOT
    asked = ids[has_record]
    if not len(asked):
        raise DataError(f"{' '.join(spec.data)}: none of its tokens has a record")
    results = []
    real = [policy for policy in policies if policy not in SIMULATED]
    runs = len(spec.cache_bytes) * (len(policies) + len(real) * (len(spec.states) - 1))
    for cache_bytes in spec.cache_bytes:
        plan_frames(bundle, cache_bytes, seeded=False)  # too small a cache is said at once
    with progress.task("replay", runs, "runs") as task:
        for cache_bytes in spec.cache_bytes:
            for policy in policies:
                if policy in SIMULATED:
                    results.append(_simulated(spec, bundle, policy, cache_bytes, asked))
                    task.advance(1)
                    continue
                for state in spec.states:
                    task.note(f"{policy}, {state}")
                    results.append(_run(spec, policy, state, cache_bytes, asked))
                    task.advance(1)
    return ReplayReport(
        spec=spec,
        tokens=len(ids),
        without_record=len(ids) - len(asked),
        distinct=len(np.unique(asked)),
        record_bytes=sum(_record_bytes(bundle)) / len(bundle.manifest.tiers),
        table_bytes=bundle.table_bytes,
        results=tuple(results),
    )


def _run(spec: ReplaySpec, policy: str, state: str, cache_bytes: int, ids: _Ids) -> ReplayResult:
    """The runtime's own cache on real files, a bundle opened for it alone."""
    bundle = open_bundle(spec.bundle)
    paths = record_paths(bundle)
    before = make_cold(paths) if state == "cold" else make_warm(paths)
    with CachedRows(bundle, cache_bytes=cache_bytes, seed=policy == "seeded") as cached:
        opened = cached.statistics
        started_s = time.perf_counter()
        for i in range(len(ids)):
            cached.records(ids[i : i + 1])
        elapsed_s = time.perf_counter() - started_s
        found = cached.statistics.since(opened)
    plan = plan_frames(bundle, cache_bytes, seeded=policy == "seeded")
    reads, size_bytes = found.rows_read / len(ids), found.bytes_read / len(ids)
    return ReplayResult(
        policy=policy,
        by="runtime",
        state=state,
        cache_bytes=cache_bytes,
        frames=sum(part.count for part in plan),
        hits=found.cache_hits,
        hit_rate=found.cache_hits / len(ids),
        reads_per_token=reads,
        bytes_per_token=size_bytes,
        seed_bytes=opened.bytes_read,
        us_per_token=1e6 * elapsed_s / len(ids),
        predicted_tokens_per_s=_predicted(spec, reads, size_bytes),
        resident_before=before,
        resident_after=resident_share(paths),
    )


def _simulated(
    spec: ReplaySpec, bundle: Bundle, policy: str, cache_bytes: int, ids: _Ids
) -> ReplayResult:
    slots = bundle.slots_of(ids)
    static = policy == "static"
    frames = (
        _static_frames(bundle, cache_bytes)
        if static
        else [part.count for part in plan_frames(bundle, cache_bytes, seeded=False)]
    )
    hits, size_bytes = 0, 0.0
    stored = _record_bytes(bundle)
    for tier, where in bundle.by_tier(slots):
        rows = (slots[where] - tier.first_slot).tolist()
        own = SIMULATED[policy](rows, frames[tier.index])
        hits += own
        size_bytes += (len(rows) - own) * stored[tier.index]
    reads = 1 - hits / len(ids)
    per_token = size_bytes / len(ids)
    seed_bytes = sum(n * b for n, b in zip(frames, stored, strict=True)) if static else 0
    return ReplayResult(
        policy=policy,
        by="simulated",
        state="",
        cache_bytes=cache_bytes,
        frames=sum(frames),
        hits=hits,
        hit_rate=hits / len(ids),
        reads_per_token=reads,
        bytes_per_token=per_token,
        seed_bytes=round(seed_bytes),
        us_per_token=None,
        predicted_tokens_per_s=_predicted(spec, reads, per_token),
    )


def _static_frames(bundle: Bundle, cache_bytes: int) -> list[int]:
    """Frames of each tier when all of a cache goes to the first slots."""
    tiers = bundle.manifest.tiers
    each = [Frames.frame_bytes(tier.stride) for tier in tiers]
    left = cache_bytes - (least_cache_bytes(bundle) - sum(each))
    found = []
    for tier, frame_bytes in zip(tiers, each, strict=True):
        found.append(min(tier.num_rows, left // frame_bytes))
        left -= found[-1] * frame_bytes
    return found


def _record_bytes(bundle: Bundle) -> list[float]:
    """Stored bytes of a record of each tier; the mean where they differ."""
    found: list[float] = []
    for tier in bundle.manifest.tiers:
        paths = [bundle.path / "tables" / tier.shard_name(i) for i in range(tier.num_shards)]
        stored = sum(path.stat().st_size for path in paths)
        found.append(stored / tier.num_rows if tier.coded else tier.stride)
    return found


def _predicted(spec: ReplaySpec, reads: float, size_bytes: float) -> float | None:
    """Tokens a second where reads wait for each other and for the step."""
    token_s = spec.step_s + reads * spec.read_latency_s + size_bytes / spec.read_bytes_per_s
    return 1 / token_s if token_s > 0 else None
