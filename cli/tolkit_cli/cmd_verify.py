"""`tol verify`: every rule of the format on every byte, without torch; the tables, with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tolkit_cli._command import command
from tolkit_cli._describe import ERROR_COLUMNS
from tolkit_cli._options import INPUT, WHAT, BundleArgument, option
from tolkit_cli._output import Column, Output
from tolkit_cli._units import bytes_text

__all__ = ["verify"]

_COLUMNS = (Column("layer", "layer"), *ERROR_COLUMNS)
ReferenceOption = Annotated[
    Path | None,
    option(
        INPUT,
        "--reference",
        metavar="MODEL",
        help="Compute the errors anew against this checkpoint, or bundle of it.",
    ),
]
RowsOption = Annotated[
    int,
    option(
        WHAT,
        "--rows",
        metavar="N",
        min=0,
        help="With --reference: tokens to look at, spread evenly; 0 = all.",
    ),
]


@command(
    "verify",
    stage="Check",
    examples=["tol verify small.tol", "tol verify small.tol --reference ckpt --json"],
    next_step="tol eval, to measure what the tables cost in quality.",
)
def verify(
    out: Output, bundle: BundleArgument, reference: ReferenceOption = None, rows: RowsOption = 0
) -> None:
    """Check a bundle's structure, checksums and values.

    Reads every byte, at roughly 0.5 to 1 GB a second, and needs no torch. Writes nothing. Prints
    one line per check done and the errors the bundle records, as tol diff defines them; stops at
    the first broken rule with exit code 4, naming the file and the place in it.

    With --reference, computes that checkpoint's tables again, which takes as long as tol build,
    and both errors of every layer against them. Exit code 5 when the tables were not made from
    it, 4 when a recorded error does not come out again (not asked of --rows N).
    """
    from tolkit_cli._describe import error_lines, error_rows
    from tolkit_formats import open_bundle
    from tolkit_formats import verify as check_bundle
    from tolkit_formats.errors import UsageError

    if rows and reference is None:
        raise UsageError(
            "--rows: is for --reference", hint=f"tol diff {bundle} B.tol --rows {rows}"
        )
    out.record("inputs", bundle=bundle, reference=reference)
    manifest = open_bundle(bundle).manifest
    total = manifest.bundle_bytes
    with out.timing("verify"), out.progress().task("verify", total, "B") as task:
        report = check_bundle(bundle, on_bytes=task.advance)
    checks = [*report.checks]
    found = None
    if reference is not None:
        from tolkit.verify_tables import verify_tables

        with out.timing("reference"):
            found = verify_tables(bundle, reference, max_rows=rows or None, progress=out.progress())
        said = f"{found.num_agreeing} recorded errors come out again"
        if found.num_agreeing == 0:
            said = "a sample" if rows else "no recorded error is relative to it"
        checks.append(f"{found.num_rows:,} rows compared with {reference}: {said}")
    out.record("metrics", checks=checks, records=report.num_records)
    for check in checks:
        out.text(check)
    out.field("metrics", "identity", report.identity, text=f"{report.identity[:16]}...")
    out.field("metrics", "bundle_bytes", report.size_bytes, "size", bytes_text(report.size_bytes))
    out.field("metrics", "verdict", "ok")
    out.text()
    out.table("layers", _COLUMNS, error_rows(manifest))
    out.text()
    for line in error_lines(manifest):
        out.text(line)
    if found is not None:
        out.record("metrics", reference_rows=found.num_rows, agreeing=found.num_agreeing)
        out.text()
        out.text(f"against {reference}, {found.num_rows:,} rows:")
        out.table("reference_layers", _COLUMNS, [vars(layer) for layer in found.layers])
    out.quiet_value("ok")
