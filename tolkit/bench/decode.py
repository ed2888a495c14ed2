"""What a token costs while decoding: time and memory of dense, flex and memory models.

All models are loaded together and take turns, a round each, so that what else the machine does
falls on all alike: ratios of one run count, not its milliseconds. L layers, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from tolkit.bench.residency import make_cold, resident_share
from tolkit.bench.shapes import arithmetic
from tolkit.bench.specs import DecodeSpec
from tolkit.bench.token_draw import known_order, zipf_ids
from tolkit.bench.variants import Variant, loaded_variants
from tolkit.errors import NonFiniteError, UsageError
from tolkit.evaluate.runnable import full_float32, pick_device
from tolkit.progress import Progress, SilentProgress
from tolkit.runtime.decoding import Decoding, step_kind
from tolkit.runtime.memory import MemoryWatch, anonymous_bytes
from tolkit.runtime.recompute import RecomputeRows
from tolkit.runtime.rows import TableRows
from tolkit.runtime.statistics import TableStatistics

__all__ = ["DecodeReport", "DecodeResult", "bench_decode"]


@dataclass(frozen=True)
class DecodeResult:
    """One variant's figures. Ratios are to the first variant, which is dense where there is one.

    Attributes:
        ms_per_token: median over rounds; ratio: median of the rounds' ratios. cpu_ms_per_token,
            cpu_ratio: the same of the process's CPU time, all threads, which others on the
            machine disturb less.
        weights_bytes: the model's parameters in fast memory. tables_bytes: the most its source of
            rows may hold of the tables there. memory_ratio: of the two together.
        cache_bytes: keys and values of all positions, as held.
        anonymous_bytes: this process's memory, no file's, that loading it and its first round
            added; small models may fit into what was taken before.
        device_bytes: the same of torch's on a GPU.
        read_bytes: weights read a token; table_read_bytes: measured bytes of tables read a token.
        bound: read_bytes over the first variant's; bound_with_cache: keys and values counted,
            when the context is full. flops: of one token, then.
        hit_rate: of rows that were not read for their token, or just before it.
        computed: share of rows that had no record, and were computed from the FFN weights that a
            partial bundle keeps; their bytes are in no bound.
        resident_before, resident_after: share of its records in the page cache.
    """

    name: str
    architecture: str
    tables: str
    generated: bool
    ms_per_token: float
    ratio: float
    cpu_ms_per_token: float
    cpu_ratio: float
    weights_bytes: int
    tables_bytes: int
    memory_ratio: float
    cache_bytes: int
    anonymous_bytes: int | None
    device_bytes: int | None
    read_bytes: int
    bound: float
    bound_with_cache: float
    flops: int
    table_read_bytes: float | None
    hit_rate: float | None
    computed: float | None
    resident_before: float | None
    resident_after: float | None
    rounds_ms: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class DecodeReport:
    """A run: its conditions and results in the order of the variants."""

    spec: DecodeSpec
    device: str
    dtype: str
    threads: int
    layers: int
    vocab_size: int
    results: tuple[DecodeResult, ...]
    peak_anonymous_bytes: int | None
    peak_device_bytes: int | None


def bench_decode(spec: DecodeSpec, progress: Progress | None = None) -> DecodeReport:
    """Decode with every variant in turn.

    A round decodes `tokens` tokens. Their ids are drawn by Zipf's law (over the counts of the
    first bundle that has some) and given, so that all models do the same; the likeliest token is
    looked for as greedy decoding does.

    Raises:
        UsageError: impossible shapes. ResourceError: no such device, no room, or records that
            stay in the page cache where `cold` was asked for.
        InputError and its kin: inputs that are missing or damaged.
    """
    progress = SilentProgress() if progress is None else progress
    device = pick_device(spec.device)
    before = torch.get_num_threads()
    torch.set_num_threads(spec.threads or before)
    try:
        watch = MemoryWatch(device)
        with loaded_variants(spec, device, progress) as variants:
            order_V = known_order([variant.bundle for variant in variants])
            runs = [_Run(variant, spec, watch, order_V) for variant in variants]
            _measure(runs, spec, progress)
            results = tuple(run.result(runs[0]) for run in runs)
            config = variants[0].model.config
            return DecodeReport(
                spec=spec,
                device=device.type,
                dtype=str(variants[0].model.embedding.dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                layers=config.num_hidden_layers,
                vocab_size=config.vocab_size,
                results=results,
                peak_anonymous_bytes=watch.peak_anonymous_bytes,
                peak_device_bytes=watch.peak_device_bytes,
            )
    finally:
        torch.set_num_threads(before)


def _measure(runs: Sequence[_Run], spec: DecodeSpec, progress: Progress) -> None:
    """One round each that is not counted, then all rounds, each begun by another variant."""
    with progress.task("decode", (spec.rounds + 1) * len(runs), "rounds") as task:
        for number in range(spec.rounds + 1):
            shift = number % len(runs)
            for run in [*runs[shift:], *runs[:shift]]:
                task.note(run.label)
                run.round(number, counted=number > 0)
                task.advance(1)


class _Run:
    """One variant's rounds."""

    def __init__(
        self, variant: Variant, spec: DecodeSpec, watch: MemoryWatch, order_V: Tensor | None
    ) -> None:
        config = variant.model.config
        if spec.context > config.max_position_embeddings:
            raise UsageError(
                f"context: {variant.name} has {config.max_position_embeddings} positions, got "
                f"{spec.context}"
            )
        self.variant, self._spec, self._watch = variant, spec, watch
        fits = order_V is not None and len(order_V) == config.vocab_size
        self._order_V = order_V if fits else None
        self._device = variant.model.embedding.device
        before = anonymous_bytes()
        with torch.inference_mode(), full_float32():
            self._decoding = Decoding(
                variant.model,
                variant.rows,
                [[0]],
                spec.context,
                static=step_kind(variant.model, variant.rows),
            )
            scores_BV = self._decoding.prompt_scores()
        self._grown = _growth(before)
        if not bool(torch.isfinite(scores_BV).all()):
            raise NonFiniteError(f"{variant.name}: its scores are not finite")
        self.arithmetic = arithmetic(variant.model, spec.context, self._decoding.cache_dtype)
        self.wall_ms: list[float] = []
        self.cpu_ms: list[float] = []
        self._before: float | None = None
        self._after: float | None = None
        self._statistics = TableStatistics()
        self._cold = 0

    @property
    def label(self) -> str:
        """Model and place of its tables."""
        return ", ".join(part for part in (self.variant.name, self.variant.tables) if part)

    def round(self, number: int, *, counted: bool) -> None:
        """Decode, timed."""
        spec, decoding, rows = self._spec, self._decoding, self.variant.rows
        vocab_size = self.variant.model.config.vocab_size
        ids = zipf_ids(vocab_size, spec.tokens, number, self._order_V)
        paths, before = self.variant.record_paths, anonymous_bytes()
        if paths and spec.cold:
            self._before = make_cold(paths)
        elif paths:
            self._before = resident_share(paths)
        with torch.inference_mode(), full_float32():
            decoding.pretend(spec.context - spec.tokens)
            known = None if rows is None else rows.statistics
            known_cold = _cold_rows(rows)
            self._synchronise()
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            for token in ids:
                decoding.announce([token])
                decoding.step([token])[0].argmax().item()
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        self._watch.look()
        if not counted and self._grown is not None:
            self._grown += _growth(before) or 0
        if paths:
            self._after = resident_share(paths)
        if counted:
            self.wall_ms.append(1e3 * wall_s / spec.tokens)
            self.cpu_ms.append(1e3 * cpu_s / spec.tokens)
            if rows is not None and known is not None:
                self._count(rows.statistics.since(known))
                self._cold += _cold_rows(rows) - known_cold

    def result(self, first: _Run) -> DecodeResult:
        """The figures, beside those of the first variant."""
        variant, own, base = self.variant, self.arithmetic, first.arithmetic
        tables_bytes, base_tables = self._tables_bytes(), first._tables_bytes()
        counts, tokens = self._statistics, self._spec.tokens * self._spec.rounds
        with_cache = own.weights_read_bytes + own.cache_read_bytes
        anonymous = variant.anonymous_bytes
        if anonymous is not None and self._grown is not None:
            anonymous += self._grown
        return DecodeResult(
            name=variant.name,
            architecture=variant.architecture,
            tables=variant.tables,
            generated=variant.generated,
            ms_per_token=median(self.wall_ms),
            ratio=_ratio(self.wall_ms, first.wall_ms),
            cpu_ms_per_token=median(self.cpu_ms),
            cpu_ratio=_ratio(self.cpu_ms, first.cpu_ms),
            weights_bytes=own.weights_bytes,
            tables_bytes=tables_bytes,
            memory_ratio=(own.weights_bytes + tables_bytes) / (base.weights_bytes + base_tables),
            cache_bytes=self._decoding.cache_bytes,
            anonymous_bytes=anonymous,
            device_bytes=variant.device_bytes,
            read_bytes=own.weights_read_bytes,
            bound=own.weights_read_bytes / base.weights_read_bytes,
            bound_with_cache=with_cache / (base.weights_read_bytes + base.cache_read_bytes),
            flops=own.flops,
            table_read_bytes=counts.bytes_read / tokens if variant.rows is not None else None,
            hit_rate=None if variant.rows is None else _hit_rate(counts),
            computed=self._cold / tokens if variant.rows is not None else None,
            resident_before=self._before,
            resident_after=self._after,
            rounds_ms=tuple(self.wall_ms),
        )

    def _tables_bytes(self) -> int:
        if self.variant.rows is None:
            return 0
        known, bundle = self.variant.rows.statistics, self.variant.bundle
        assert bundle is not None
        return max(min(known.cache_bytes, bundle.table_bytes), known.resident_bytes)

    def _count(self, found: TableStatistics) -> None:
        self._statistics = self._statistics.plus(
            rows_asked=found.rows_asked,
            rows_distinct=found.rows_distinct,
            rows_read=found.rows_read,
            bytes_read=found.bytes_read,
            cache_hits=found.cache_hits,
        )

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _growth(before: int | None) -> int | None:
    now = anonymous_bytes()
    return None if now is None or before is None else now - before


def _cold_rows(rows: TableRows | None) -> int:
    """Rows of a partial bundle that were computed so far."""
    return rows.cold_statistics.rows_cold if isinstance(rows, RecomputeRows) else 0


def _hit_rate(counts: TableStatistics) -> float:
    """As generation counts it: a row read just before it is needed is a row read."""
    return max(0.0, 1 - counts.rows_read / max(1, counts.rows_distinct))


def _ratio(own: Sequence[float], base: Sequence[float]) -> float:
    return median(a / b for a, b in zip(own, base, strict=True))
