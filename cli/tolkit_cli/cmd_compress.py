"""`tol compress`: lower ranks and fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tolkit_cli._command import command
from tolkit_cli._compress_options import (
    BitsOption,
    BitsPerValueOption,
    BoundKlOption,
    BoundPplOption,
    BudgetOption,
    CalibrationOption,
    CodecOption,
    CodingOption,
    DropOption,
    HadamardOption,
    JudgeDataOption,
    JudgeReferenceOption,
    KeepRowsOption,
    MeasuredOption,
    NoFeedbackOption,
    PredictOption,
    RankOption,
    WeightsOption,
)
from tolkit_cli._compress_run import CompressAsk, run_compress
from tolkit_cli._eval_options import LimitOption, OtherReferenceOption, PackedOption, WindowOption
from tolkit_cli._measuring import MeasuringOptions
from tolkit_cli._options import (
    BatchTokensOption,
    DeviceOption,
    DryRunOption,
    ForceOption,
    OutOption,
    RestartOption,
    SourceArgument,
    ThreadsOption,
)
from tolkit_cli._output import Output
from tolkit_cli._report import show_report

if TYPE_CHECKING:
    from tolkit.compress import CompressSpec
    from tolkit.compress.search.bound import Bound
    from tolkit.compress.search.choose import Choice

__all__ = ["compress"]


@command(
    "compress",
    stage="Shrink",
    examples=[
        "tol compress full.tol -o small.tol --rank 50% --bits 4",
        "tol compress ckpt -o nf4.tol --bits 4 --dry-run",
        "tol compress ckpt -o good.tol --max-kl 5 --data stdlib:valid --limit-tokens 1000",
    ],
    next_step="tol eval SMALL --reference CKPT --data TEXT, to see what it cost.",
    resumable=True,
)
def compress(
    out: Output,
    source: SourceArgument,
    path: OutOption,
    rank: RankOption = None,
    bits: BitsOption = None,
    codec: CodecOption = None,
    drop: DropOption = None,
    keep_rows: KeepRowsOption = None,
    weights: WeightsOption = "auto",
    no_feedback: NoFeedbackOption = False,
    bits_per_value: BitsPerValueOption = None,
    budget: BudgetOption = None,
    max_kl: BoundKlOption = None,
    max_ppl_increase: BoundPplOption = None,
    calibration: CalibrationOption = None,
    predict: PredictOption = "auto",
    hadamard: HadamardOption = False,
    coding: CodingOption = "fixed",
    data: JudgeDataOption = None,
    reference: JudgeReferenceOption = None,
    other_reference: OtherReferenceOption = False,
    measured: MeasuredOption = None,
    window: WindowOption = None,
    packed: PackedOption = False,
    limit_tokens: LimitOption = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    restart: RestartOption = False,
    threads: ThreadsOption = 0,
    device: DeviceOption = "auto",
    batch_tokens: BatchTokensOption = None,
) -> None:
    """Truncate ranks and quantise tables.

    Reads a bundle, or a checkpoint (the full tables are then never written), and writes a new
    bundle; the input is not changed. Sizes: int8 about 8 bits a value, nf4 4.5 with its scales;
    rank 50% halves either and adds a basis. --dry-run predicts the bytes; of a size to fill it
    shows what tol plan shows.

    Error feedback is on: each layer is encoded with what earlier ones lost, so the running sum
    stays right at no cost in bytes. An interrupted run is continued by the same command.

    --keep-rows needs token counts and a checkpoint, or a bundle that was made with it. Sizes in
    bits/value stay relative to all tokens; the FFN weights count in bundle_bytes.

    --max-kl and --max-ppl-increase find the smallest size by writing bundles and evaluating them
    on --data, typically four to six times a compression and two forward passes. The bound must
    hold at the upper end of the 95 % interval, as in tol eval; where no size can: exit code 3.
    The size was chosen on that text: judge it on other text.
    """
    from tolkit.bundling import Resources
    from tolkit.compress import CompressSpec
    from tolkit.compress.spec import (
        BITS_TO_CODEC,
        BandsWish,
        parse_auto_drop,
        parse_predict,
        parse_size,
    )
    from tolkit.errors import UsageError

    if bits and codec:
        raise UsageError("--bits: give either --bits or --codec, not both")
    out.record("inputs", source=source)
    bound = _bound(max_kl, max_ppl_increase)
    if bound is not None:
        _require_searchable(bits_per_value, budget, rank or bits or codec not in (None, "bands"))
        if dry_run:
            raise UsageError(
                "--dry-run: the size is found by writing and measuring bundles",
                hint="tol plan predicts any size",
            )
    auto = None if drop is None else parse_auto_drop(drop)
    ask = CompressAsk(
        source,
        path,
        MeasuringOptions(
            data,
            reference,
            other_reference,
            measured,
            window,
            packed,
            limit_tokens,
            batch_tokens,
            device,
        ),
        Resources(threads or None, force, restart),
        dry_run,
        bound,
        auto,
    )

    def spec_at(budget_bytes: int | None, choice: Choice | None) -> CompressSpec:
        chosen = None if choice is None else choice.layers
        return CompressSpec(
            rank=rank,
            codec=BITS_TO_CODEC[int(bits)] if bits else codec,
            drop=chosen or (() if auto is not None else _layers(drop, source)),
            feedback=not no_feedback,
            weights=weights,
            into=None if choice is None else choice.into,
            chosen_by={} if choice is None else choice.to_history(),
            bits_per_value=bits_per_value,
            budget_bytes=budget_bytes,
            calibration=None if calibration is None else str(calibration),
            bands=BandsWish("hadamard" if hadamard else "klt", parse_predict(predict)),
            coding=coding,
            keep_rows=keep_rows,
        )

    budget_bytes = None if budget is None else parse_size(budget, "--budget")
    report = run_compress(out, ask, spec_at, budget_bytes)
    if report is not None:
        show_report(out, report)


def _bound(max_kl: str | None, max_ppl_increase: str | None) -> Bound | None:
    from tolkit.compress.search.bound import Bound
    from tolkit.compress.search.choose import parse_bound

    if max_kl is None and max_ppl_increase is None:
        return None
    return Bound(
        None if max_kl is None else parse_bound(max_kl, "max_kl"),
        None if max_ppl_increase is None else parse_bound(max_ppl_increase, "max_ppl_increase"),
    )


def _require_searchable(bits_per_value: float | None, budget: str | None, other: object) -> None:
    """UsageError where a size or a codec of a size of its own is given beside a bound."""
    from tolkit.errors import UsageError

    if bits_per_value is not None or budget is not None:
        raise UsageError(
            "--max-kl: finds the size itself", hint="leave --bits-per-value and --budget out"
        )
    if other:
        raise UsageError(
            "--max-kl: sizes are found for codec bands", hint="leave --rank, --bits and --codec out"
        )


def _layers(drop: str | None, source: Path) -> tuple[int, ...]:
    from tolkit.compress.spec import parse_layers
    from tolkit.sources import open_source

    return parse_layers(drop, open_source(source).num_layers, "--drop") if drop else ()
