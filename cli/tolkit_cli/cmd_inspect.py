"""`tol inspect`: what a bundle holds, layer by layer, without torch."""

from __future__ import annotations

from tolkit_cli._command import command
from tolkit_cli._options import BundleArgument
from tolkit_cli._output import Output
from tolkit_cli._units import bytes_text

__all__ = ["inspect"]


@command(
    "inspect",
    stage="Check",
    examples=["tol inspect small.tol", "tol inspect small.tol --json"],
    next_step="tol verify, to check every byte.",
)
def inspect(out: Output, bundle: BundleArgument) -> None:
    """Show what a bundle holds, layer by layer.

    Reads the manifest, headers and file sizes only, so it is instant at any size and needs no
    torch. Writes nothing.

    bits/value of a layer counts its codes, scales and basis; the bundle's figure counts
    everything under tables/ (checksums, maps and padding too) over V x L x D of the source.

    error and running sum are as tol diff defines them, recorded when the tables were made; the
    lines below the table say relative to what.
    """
    from tolkit_cli._describe import (
        LAYER_COLUMNS,
        error_lines,
        layer_rows,
        lineage_text,
        record_bytes,
        show_partial,
    )
    from tolkit_formats import open_bundle

    with out.timing("open"):
        opened = open_bundle(bundle, check_crc=False)
    manifest = opened.manifest
    version = ".".join(str(part) for part in manifest.version)
    shape = (opened.vocab_size, opened.num_layers, opened.hidden_size)
    stride = record_bytes(manifest)
    out.field("inputs", "bundle", bundle)
    out.field("metrics", "format_version", version, "format")
    out.field("metrics", "identity", opened.identity, text=f"{opened.identity[:16]}...")
    out.record("metrics", vocab_size=shape[0], num_layers=shape[1], hidden_size=shape[2])
    out.field("metrics", "shape", shape, "V x L x D", " x ".join(f"{n:,}" for n in shape))
    out.field("metrics", "bytes", opened.table_bytes, "tables", _exact(opened.table_bytes))
    bits = opened.bits_per_value
    out.field("metrics", "bits_per_value", bits, "bits/value", f"{bits:.4f}")
    total = manifest.bundle_bytes
    out.field("metrics", "bundle_bytes", total, "with backbone", _exact(total))
    out.field("metrics", "stride_bytes", stride, "record", ", ".join(f"{s:,} B" for s in stride))
    if manifest.coding is not None:
        out.field("metrics", "coding", "entropy", text="entropy, records of their mean length")
    if manifest.partial is not None:
        show_partial(out, manifest.partial)
    out.field("metrics", "combine", manifest.combine)
    out.field("metrics", "feedback", manifest.encoding.feedback, "error feedback", None)
    out.field("metrics", "history", lineage_text(manifest), "made by")
    out.text()
    out.record("metrics", errors=[errors.to_json() for errors in manifest.encoding.errors])
    out.table("layers", LAYER_COLUMNS, layer_rows(opened))
    out.text()
    for line in error_lines(manifest):
        out.text(line)
    out.quiet_value(opened.table_bytes)


def _exact(size_bytes: int) -> str:
    return f"{bytes_text(size_bytes)} ({size_bytes:,} bytes)"
