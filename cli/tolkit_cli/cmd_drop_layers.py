"""`tol drop-layers`: leave out the tables of some layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tolkit_cli._command import command
from tolkit_cli._options import (
    WHAT,
    BundleArgument,
    DryRunOption,
    ForceOption,
    OutOption,
    RestartOption,
    ThreadsOption,
    option,
)
from tolkit_cli._output import Output
from tolkit_cli._report import show_report

__all__ = ["drop_layers"]

LayersOption = Annotated[
    str | None,
    option(WHAT, "--layers", metavar="LAYERS", help="Leave out these original layers: 3-5,9."),
]
MiddleOption = Annotated[
    int | None,
    option(WHAT, "--middle", metavar="N", help="Leave out the N middle ones of those kept."),
]
KeepOption = Annotated[
    str | None,
    option(WHAT, "--keep", metavar="LAYERS", help="Leave out all but these: 0-2,10-."),
]
PlainOption = Annotated[
    bool,
    option(WHAT, "--plain", help="Drop as the paper does; do not fold into the next kept layer."),
]


@command(
    "drop-layers",
    stage="Shrink",
    examples=[
        "tol drop-layers full.tol -o thin.tol --middle 2",
        "tol drop-layers full.tol -o plain.tol --layers 3-4 --plain",
    ],
    next_step="tol compress, which is best done after dropping.",
    resumable=True,
)
def drop_layers(
    out: Output,
    bundle: BundleArgument,
    path: OutOption,
    layers: LayersOption = None,
    middle: MiddleOption = None,
    keep: KeepOption = None,
    plain: PlainOption = False,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    restart: RestartOption = False,
    threads: ThreadsOption = 0,
) -> None:
    """Remove layers' tables and fold them into those that stay.

    Reads a bundle and writes a new one, smaller by one plane of V x D values a layer; the input
    is not changed. Layers are numbered from 0 as in the original model, also after earlier drops.

    A dropped table is added to the next kept one (a tail to the last), which keeps the running
    sum right and loses far less than --plain. On compressed tables the receiving planes are
    encoded a second time: drop first, then compress.
    """
    from tolkit.bundling import Resources
    from tolkit.compress import DropSpec
    from tolkit.compress import drop_layers as drop_tables

    out.record("inputs", bundle=bundle)
    chosen = _chosen_layers(bundle, layers, middle, keep)
    spec = DropSpec(chosen, fold=not plain)
    report = drop_tables(
        bundle,
        path,
        spec,
        resources=Resources(threads or None, force, restart),
        dry=dry_run,
        progress=out.progress(),
    )
    show_report(out, report)


def _chosen_layers(
    bundle: Path, layers: str | None, middle: int | None, keep: str | None
) -> tuple[int, ...]:
    """Original indices to leave out, from the one of the three options that was given."""
    from tolkit.compress.spec import middle_layers, parse_layers
    from tolkit.errors import UsageError
    from tolkit_formats import open_bundle

    if sum(value is not None for value in (layers, middle, keep)) != 1:
        raise UsageError("--layers: give exactly one of --layers, --middle and --keep")
    opened = open_bundle(bundle)
    if layers is not None:
        return parse_layers(layers, opened.num_layers, "--layers")
    if middle is not None:
        return middle_layers(opened.layer_ids, middle)
    assert keep is not None
    kept = parse_layers(keep, opened.num_layers, "--keep")
    gone = sorted(set(kept) - set(opened.layer_ids))
    if gone:
        raise UsageError(f"--keep: layer {gone[0]} has no table any more")
    rest = tuple(layer for layer in opened.layer_ids if layer not in kept)
    if not rest:
        raise UsageError("--keep: names every layer there is, nothing to leave out")
    return rest
