"""`tol diff`: how far two bundles' rows are apart, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tolkit_cli._command import command
from tolkit_cli._describe import ERROR_COLUMNS
from tolkit_cli._options import INPUT, WHAT, option
from tolkit_cli._output import Column, Output
from tolkit_cli._units import bytes_text

__all__ = ["diff"]

_COLUMNS = (
    Column("layer", "layer"),
    Column("stored_a", "A", right=False),
    Column("stored_b", "B", right=False),
    *ERROR_COLUMNS,
)
BundleA = Annotated[
    Path, typer.Argument(metavar="A", help="A NAME.tol folder.", rich_help_panel=INPUT)
]
BundleB = Annotated[
    Path, typer.Argument(metavar="B", help="The one to compare with it.", rich_help_panel=INPUT)
]
RowsOption = Annotated[
    int,
    option(WHAT, "--rows", metavar="N", min=0, help="Tokens to compare, spread evenly; 0 = all."),
]


@command(
    "diff",
    stage="Check",
    examples=["tol diff full.tol small.tol", "tol diff full.tol small.tol --rows 1000 --json"],
    next_step="tol eval, for what a difference means in quality.",
)
def diff(out: Output, a: BundleA, b: BundleB, rows: RowsOption = 0) -> None:
    """Compare two bundles' tables, layer by layer.

    Decodes the rows of both and prints for each layer its error, ||B - A|| / ||A||, and the same
    for the running sum of all layers so far, which is what the model sees. A layer without a table
    counts as zeros; one that others were folded into is compared with the sum of theirs and its
    own. Of partial tables the tokens with a record in both are compared. Needs no torch. Writes
    nothing.

    Exit code 0 whether they differ or not, 5 when they are of different shapes.
    """
    from tolkit_formats import open_bundle
    from tolkit_formats.diff import diff as compare

    out.record("inputs", a=a, b=b)
    first, second = open_bundle(a), open_bundle(b)
    total = first.vocab_size
    planned = min(rows or total, total)
    with out.timing("diff"), out.progress().task("diff", planned, "rows") as task:
        found = compare(first, second, max_rows=rows or None, on_rows=task.advance)
    out.field("metrics", "equal", found.equal, "same values")
    out.field("metrics", "same_identity", found.same_identity)
    out.field("metrics", "same_sources", found.same_sources)
    out.field("metrics", "rows", found.num_rows, text=f"{found.num_rows:,} of {total:,}")
    if found.num_rows < planned:
        held = (first.manifest.num_rows, second.manifest.num_rows)
        out.field("metrics", "records_a", held[0], "records of A", f"{held[0]:,}")
        out.field("metrics", "records_b", held[1], "records of B", f"{held[1]:,}")
    sizes = (found.table_bytes_a, found.table_bytes_b)
    out.field("metrics", "bytes_a", sizes[0], "tables of A", bytes_text(sizes[0]))
    out.field("metrics", "bytes_b", sizes[1], "tables of B", bytes_text(sizes[1]))
    out.text()
    out.table("layers", _COLUMNS, [vars(layer) for layer in found.layers])
    errors = [layer.running_sum_error or 0.0 for layer in found.layers]
    out.quiet_value(max(errors))
