"""`tol bench`: what decoding, look-ups and row caches cost here and now."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from tolkit_cli._bench_options import (
    ArchOption,
    BatchesOption,
    CacheOption,
    CodecOption,
    ColdOption,
    ContextOption,
    DataOption,
    DecodeDtypeOption,
    DecodeTablesOption,
    LatencyOption,
    LayersOption,
    LimitOption,
    LookupDtypeOption,
    LookupMemoryOption,
    LookupStateOption,
    LookupTablesOption,
    ModelsArgument,
    PolicyOption,
    PresetOption,
    RateOption,
    RepeatsOption,
    ReplayStateOption,
    RoundsOption,
    StepOption,
    TableMemoryOption,
    ThreadsOption,
    TokensOption,
    VocabOption,
    WorkOption,
)
from tolkit_cli._bench_report import show_decode, show_lookup, show_replay
from tolkit_cli._command import command
from tolkit_cli._help import PlainGroup
from tolkit_cli._options import BundleArgument, DeviceOption
from tolkit_cli._output import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["decode", "family", "lookup", "replay"]


def family() -> typer.Typer:
    """The group that `tol bench` is."""
    return typer.Typer(
        cls=PlainGroup,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        help="Measure decoding, look-ups and row caches on this machine.",
    )


@command(
    "bench decode",
    stage="Run",
    examples=[
        "tol bench decode --preset tiny --tables disk,host --rounds 3",
        "tol bench decode small.tol --arch dense --context 64 --json",
    ],
    next_step="tol bench replay, to choose the row cache.",
)
def decode(
    out: Output,
    models: ModelsArgument = None,
    preset: PresetOption = None,
    arch: ArchOption = None,
    layers: LayersOption = None,
    vocab_size: VocabOption = None,
    codec: CodecOption = "nf4",
    tables: DecodeTablesOption = "disk",
    context: ContextOption = 256,
    tokens: TokensOption = 16,
    rounds: RoundsOption = 5,
    cold: ColdOption = False,
    work: WorkOption = None,
    max_table_memory: TableMemoryOption = None,
    device: DeviceOption = "auto",
    dtype: DecodeDtypeOption = "bfloat16",
    threads: ThreadsOption = 0,
) -> None:
    """Compare dense, flex and memory models while they decode.

    All models are loaded together and take turns, so that ratios hold on a busy machine: time and
    CPU time a token, weights in fast memory, bytes of weights a token must read (the bound), and
    the paper's own Table 6 beside. Random models have the shape's weights and tables, made in
    seconds: at 1b 3 GB of memory dense, 1.3 GB memory, and 3.5 GB of disk (nf4) for tables.

    Writes nothing but random tables, into --work or a temporary folder. Minutes at 1b.
    """
    from tolkit.bench import DecodeSpec, bench_decode
    from tolkit.compress.spec import parse_size

    spec = DecodeSpec(
        inputs=tuple(models or ()),
        preset=preset,
        architectures=_words(arch, "arch"),
        tables=_words(tables, "tables"),
        layers=layers,
        vocab_size=vocab_size,
        context=context,
        tokens=tokens,
        rounds=rounds,
        dtype=dtype,
        device=device,
        codec=codec,
        max_table_bytes=parse_size(max_table_memory, "max_table_memory")
        if max_table_memory
        else None,
        cold=cold,
        threads=threads or None,
        work=work,
    )
    out.record("inputs", spec=vars(spec))
    with out.timing("bench"):
        report = bench_decode(spec, out.progress())
    show_decode(out, report)


@command(
    "bench lookup",
    stage="Run",
    examples=[
        "tol bench lookup small.tol --state warm --repeats 3",
        "tol bench lookup small.tol --tables disk,host --batch 1,16 --state warm --json",
    ],
    next_step="tol bench decode, to see what look-ups are of a step.",
)
def lookup(
    out: Output,
    bundle: BundleArgument,
    batch: BatchesOption = None,
    tables: LookupTablesOption = "disk,host,device",
    state: LookupStateOption = "cold,warm",
    repeats: RepeatsOption = 9,
    max_table_memory: LookupMemoryOption = "64MiB",
    device: DeviceOption = "auto",
    dtype: LookupDtypeOption = "float32",
    threads: ThreadsOption = 0,
) -> None:
    """Measure how fast rows of random tokens come from each place.

    Reads the bundle; writes nothing. Rows and bytes a second of the runtime's sources, decoded,
    beside the reader's checked bytes and a bare gather of the mapped files; on a GPU its copy
    bandwidth too. Cold puts the records out of the page cache before each call and refuses to go
    on where they stay. Seconds, and as long as reading the tables once.
    """
    from tolkit.bench import LookupSpec, bench_lookup
    from tolkit.compress.spec import parse_size

    spec = LookupSpec(
        bundle=bundle,
        batches=tuple(_numbers(batch, "batch")),
        tables=_words(tables, "tables"),
        states=_words(state, "state"),
        repeats=repeats,
        dtype=dtype,
        device=device,
        max_table_bytes=parse_size(max_table_memory, "max_table_memory"),
        threads=threads or None,
    )
    out.record("inputs", spec=vars(spec))
    with out.timing("bench"):
        report = bench_lookup(spec, out.progress())
    show_lookup(out, report)


@command(
    "bench replay",
    stage="Run",
    examples=[
        "tol bench replay small.tol --data text --cache 64kB,1MB --limit-tokens 2000",
        "tol bench replay small.tol --data text --cache 64kB --policy lru,lfu,optimal "
        "--limit-tokens 2000",
    ],
    next_step="tol generate --max-table-memory with the size that serves.",
)
def replay(
    out: Output,
    bundle: BundleArgument,
    data: DataOption,
    cache: CacheOption = "1MB,16MB,256MB",
    policy: PolicyOption = None,
    state: ReplayStateOption = "warm",
    limit_tokens: LimitOption = None,
    read_us: LatencyOption = 100.0,
    read_rate: RateOption = "2GB",
    step_ms: StepOption = 0.0,
) -> None:
    """Replay a text against sizes and policies of the row cache.

    Reads text and bundle; writes nothing. Hit rate, reads and bytes a token of the runtime's own
    policies, run with real reads, and of others, simulated; and the tokens a second that a disk
    with --read-us and --read-rate allows. Cold and warm are made and checked. About 30,000 tokens
    a second for each size and policy.
    """
    from tolkit.bench import ReplaySpec, bench_replay
    from tolkit.compress.spec import parse_size

    spec = ReplaySpec(
        bundle=bundle,
        data=tuple(data),
        cache_bytes=tuple(parse_size(word, "cache") for word in _words(cache, "cache")),
        policies=_words(policy, "policy"),
        states=_words(state, "state"),
        limit_tokens=limit_tokens,
        read_latency_s=1e-6 * read_us,
        read_bytes_per_s=float(parse_size(read_rate, "read_rate")),
        step_s=1e-3 * step_ms,
    )
    out.record("inputs", spec=vars(spec))
    with out.timing("bench"):
        report = bench_replay(spec, out.progress())
    show_replay(out, report)


def _words(text: str | None, name: str) -> tuple[str, ...]:
    """``a,b`` -> a, b; nothing for None."""
    from tolkit.errors import UsageError

    if text is None:
        return ()
    found = tuple(word.strip() for word in text.split(","))
    if "" in found:
        raise UsageError(f"{name}: {text!r} has an empty entry", hint="separate by commas")
    return found


def _numbers(text: str | None, name: str) -> Sequence[int]:
    from tolkit.errors import UsageError

    words = _words(text, name)
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(f"{name}: expected whole numbers, got {text!r}")
    return [int(word) for word in words]
