"""`tol plan`: what a size would hold and cost."""

from __future__ import annotations

from typing import Annotated

from tolkit_cli._command import command
from tolkit_cli._compress_options import (
    CalibrationOption,
    CodingOption,
    HadamardOption,
    NoFeedbackOption,
    PredictOption,
    WeightsOption,
)
from tolkit_cli._options import WHAT, SourceArgument, ThreadsOption, option
from tolkit_cli._output import Output

__all__ = ["plan"]

_DEFAULT_SIZES = "0.5,1,2"

SizesOption = Annotated[
    str | None,
    option(
        WHAT,
        "--bits-per-value",
        metavar="LIST",
        help=f"True bits a value, separated by commas. [default: {_DEFAULT_SIZES}]",
    ),
]
BudgetsOption = Annotated[
    str | None,
    option(WHAT, "--budget", metavar="LIST", help="The same as bytes: 1.5GB,800MiB."),
]
PlanDropOption = Annotated[
    str | None,
    option(
        WHAT,
        "--drop",
        metavar="LAYERS",
        help="Also leave out layers, folded into the next kept one: 3-5,9.",
    ),
]


@command(
    "plan",
    stage="Shrink",
    examples=[
        "tol plan ckpt --bits-per-value 1,2",
        "tol plan full.tol --budget 2MB --coding entropy",
    ],
    next_step="tol compress --bits-per-value X, to write one of them.",
)
def plan(
    out: Output,
    source: SourceArgument,
    bits_per_value: SizesOption = None,
    budget: BudgetsOption = None,
    drop: PlanDropOption = None,
    weights: WeightsOption = "auto",
    no_feedback: NoFeedbackOption = False,
    calibration: CalibrationOption = None,
    predict: PredictOption = "auto",
    hadamard: HadamardOption = False,
    coding: CodingOption = "fixed",
    threads: ThreadsOption = 0,
) -> None:
    """Predict bytes, errors, time and memory of a size.

    Reads a bundle or a checkpoint, fits codec bands to at most 16,384 of its rows for each size,
    encodes some thousand of them, and writes nothing. The bytes are those that tol compress will
    write where V is at most 16,384, elsewhere within 0.5 %, 1 % with --coding entropy.

    Errors of rows do not tell what a model loses: measure that with tol eval, or let tol compress
    --max-kl find the size. Takes some walks over the sample a size; with --coding entropy up to
    the time of a compression, as all rows are coded where V is at most 16,384.
    """
    from tolkit.bundling import Resources
    from tolkit.compress import CompressSpec
    from tolkit.compress.outlook import outlook
    from tolkit.compress.spec import BandsWish, parse_layers, parse_predict
    from tolkit.errors import UsageError
    from tolkit.sources import open_source
    from tolkit_cli._plan_report import show_plan

    if bits_per_value and budget:
        raise UsageError("--budget: give either --budget or --bits-per-value, not both")
    out.record("inputs", source=source)
    layers = parse_layers(drop, open_source(source).num_layers, "--drop") if drop else ()
    plans = []
    too_small: UsageError | None = None
    for bits, size_bytes in _sizes(bits_per_value, budget):
        spec = CompressSpec(
            drop=layers,
            feedback=not no_feedback,
            weights=weights,
            bits_per_value=bits,
            budget_bytes=size_bytes,
            calibration=None if calibration is None else str(calibration),
            bands=BandsWish("hadamard" if hadamard else "klt", parse_predict(predict)),
            coding=coding,
        )
        resources = Resources(threads or None)
        try:
            plans.append(outlook(source, spec, resources=resources, progress=out.progress()))
        except UsageError as error:
            if not error.message.startswith("budget: "):
                raise
            too_small = error
            out.warn(error.message)
    if not plans:
        assert too_small is not None
        raise too_small
    show_plan(out, plans)


def _sizes(bits_per_value: str | None, budget: str | None) -> list[tuple[float | None, int | None]]:
    """Bits a value or bytes of each size."""
    from tolkit.compress.spec import parse_size
    from tolkit.errors import UsageError

    if budget:
        return [(None, parse_size(part, "--budget")) for part in budget.split(",")]
    text = bits_per_value or _DEFAULT_SIZES
    try:
        return [(float(part), None) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--bits-per-value: {text!r} is no list of numbers", hint="write 0.5,1,2"
        ) from error
