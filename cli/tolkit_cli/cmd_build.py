"""`tol build`: the tables of a checkpoint, computed for every token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tolkit_cli._command import command
from tolkit_cli._compress_options import KeepRowsOption
from tolkit_cli._options import (
    INPUT,
    WHAT,
    DryRunOption,
    ForceOption,
    OutOption,
    RestartOption,
    ThreadsOption,
    option,
)
from tolkit_cli._output import Output
from tolkit_cli._report import show_report

__all__ = ["build"]

CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT", help="A checkpoint folder (memory or flex).", rich_help_panel=INPUT
    ),
]
DtypeOption = Annotated[
    Literal["f16", "bf16", "f32"],
    option(WHAT, "--dtype", metavar="f16|bf16|f32", help="Number format of the tables."),
]


@command(
    "build",
    stage="Make",
    examples=["tol build ckpt -o full.tol", "tol build ckpt -o exact.tol --dtype f32"],
    next_step="tol compress, to make it small; tol eval, to see that nothing was lost.",
    resumable=True,
)
def build(
    out: Output,
    checkpoint: CheckpointArgument,
    path: OutOption,
    dtype: DtypeOption = "f16",
    keep_rows: KeepRowsOption = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    restart: RestartOption = False,
    threads: ThreadsOption = 0,
) -> None:
    """Compute the tables of a checkpoint for every token.

    Reads a checkpoint, runs each layer's FFN once for every token of the vocabulary, and writes
    a bundle of 2 x V x L x D bytes (f16), 12.6 GB for a 1B model. The checkpoint is not changed.

    Memory: one layer's FFN and some blocks of rows. At the end rows are read back and compared
    with the FFN path. An interrupted run is continued by the same command.
    """
    from tolkit.build import build as build_tables
    from tolkit.bundling import Resources

    out.record("inputs", checkpoint=checkpoint)
    report = build_tables(
        checkpoint,
        path,
        dtype=dtype,
        keep=keep_rows,
        resources=Resources(threads or None, force, restart),
        dry=dry_run,
        progress=out.progress(),
    )
    show_report(out, report)
    out.record("metrics", **report.checks)
    if report.checks:
        rows, largest = report.checks["rows"], report.checks["max_abs_difference"]
        out.text(f"{rows:,.0f} rows a layer read back: largest difference {largest:.2e}")
