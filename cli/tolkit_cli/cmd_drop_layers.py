"""`tol drop-layers`: leave out the tables of some layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tolkit_cli._choose_options import (
    AutoOption,
    ChooseDataOption,
    ChooseReferenceOption,
    MaxKlOption,
    MaxPplOption,
    SearchOption,
)
from tolkit_cli._command import command
from tolkit_cli._compress_options import MeasuredOption
from tolkit_cli._eval_options import (
    LimitOption,
    OtherReferenceOption,
    PackedOption,
    WindowOption,
)
from tolkit_cli._options import (
    WHAT,
    BatchTokensOption,
    BundleArgument,
    DeviceOption,
    DryRunOption,
    ForceOption,
    OutOption,
    RestartOption,
    ThreadsOption,
    option,
)
from tolkit_cli._output import Output
from tolkit_cli._report import show_report

if TYPE_CHECKING:
    from tolkit.compress import DropSpec
    from tolkit.compress.search.choose import DropWish

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
        "tol drop-layers full.tol -o best.tol --auto 2 --data stdlib:valid --limit-tokens 2000",
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
    auto: AutoOption = None,
    max_kl: MaxKlOption = None,
    max_ppl_increase: MaxPplOption = None,
    plain: PlainOption = False,
    search: SearchOption = None,
    data: ChooseDataOption = None,
    reference: ChooseReferenceOption = None,
    other_reference: OtherReferenceOption = False,
    measured: MeasuredOption = None,
    window: WindowOption = None,
    packed: PackedOption = False,
    limit_tokens: LimitOption = None,
    device: DeviceOption = "auto",
    batch_tokens: BatchTokensOption = None,
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

    --auto, --max-kl and --max-ppl-increase choose the layers, and whether each table goes to the
    next or the previous kept one, by evaluating sets of layers on --data, a forward pass each:
    for N of L layers about (N + 2) x L. A few thousand tokens rank layers well (--limit-tokens);
    --dry-run measures too. A bound must hold at the upper end of the 95 % interval, as in tol
    eval; where no layer can go: exit code 3. The chosen set was selected on that text: judge it
    on other text.
    """
    from tolkit.bundling import Resources
    from tolkit.compress import DropSpec
    from tolkit.compress import drop_layers as drop_tables

    out.record("inputs", bundle=bundle)
    _require_one(layers, middle, keep, auto, max_kl, max_ppl_increase)
    measuring = {
        "search": search,
        "data": data,
        "reference": reference,
        "other_reference": other_reference,
        "measured": measured,
        "window": window,
        "packed": packed,
        "limit_tokens": limit_tokens,
        "batch_tokens": batch_tokens,
    }
    if auto is None and max_kl is None and max_ppl_increase is None:
        _require_unused(measuring)
        spec = DropSpec(_chosen_layers(bundle, layers, middle, keep), fold=not plain)
    else:
        wish = _wish(auto, max_kl, max_ppl_increase, not plain, search or "auto")
        if not dry_run:
            _require_absent(path, force)
        spec = _measured(out, bundle, wish, {**measuring, "device": device})
    report = drop_tables(
        bundle,
        path,
        spec,
        resources=Resources(threads or None, force, restart),
        dry=dry_run,
        progress=out.progress(),
    )
    show_report(out, report)
    if spec.into and any(layer.codec and layer.codec["name"] != "raw" for layer in report.layers):
        out.warn(
            "costs are of the tables as they are now, before those that receive others are "
            "encoded again: check the result with tol eval"
        )


def _require_one(*options: object) -> None:
    """UsageError unless one of the options that say which layers is given."""
    from tolkit.errors import UsageError

    if sum(value is not None for value in options) != 1:
        raise UsageError(
            "--layers: give exactly one of --layers, --middle, --keep, --auto, --max-kl and "
            "--max-ppl-increase"
        )


def _require_unused(measuring: dict[str, Any]) -> None:
    """UsageError for options of measuring where nothing is measured."""
    from tolkit.errors import UsageError

    for name, value in measuring.items():
        if value:
            raise UsageError(f"{name}: nothing is measured", hint="give --auto N, or leave it out")


def _require_absent(path: Path, force: bool) -> None:
    """OutputExistsError now, and not after minutes of measuring."""
    from tolkit_formats.writer import require_absent

    require_absent(path, force=force)


def _wish(
    auto: int | None, max_kl: str | None, max_ppl: str | None, fold: bool, search: Any
) -> DropWish:
    from tolkit.compress.search.choose import DropWish, parse_bound

    return DropWish(
        auto=auto,
        max_kl=None if max_kl is None else parse_bound(max_kl, "max_kl"),
        max_ppl_increase=None if max_ppl is None else parse_bound(max_ppl, "max_ppl_increase"),
        fold=fold,
        search=search,
    )


def _measured(out: Output, bundle: Path, wish: DropWish, asked: dict[str, Any]) -> DropSpec:
    """The layers that measuring on text chooses, after showing what it found."""
    from tolkit.compress import DropSpec
    from tolkit.compress.search.choose import choose_layers, most_evaluations
    from tolkit.compress.search.choose_known import known_costs
    from tolkit.data import read_documents
    from tolkit.data.limit import limited
    from tolkit.errors import UsageError
    from tolkit.evaluate import windows_of
    from tolkit.evaluate.adjust import layers_with_tables
    from tolkit.evaluate.forward import Machine
    from tolkit.evaluate.judge import Judge
    from tolkit.measured import Measured, load_measured
    from tolkit.tables import load_runnable, require_partners
    from tolkit_cli._choice_report import show_choice

    data, limit = asked["data"], asked["limit_tokens"]
    if not data:
        raise UsageError("--data: costs are measured on text", hint="add --data TEXT")
    out.record("inputs", data=data, reference=asked["reference"])
    machine = Machine(asked["device"], batch_tokens=asked["batch_tokens"])
    with out.timing("load"):
        model = load_runnable(bundle)
        partner = load_runnable(asked["reference"]) if asked["reference"] else None
    if partner and not asked["other_reference"]:
        require_partners(model, partner)
    with out.timing("text"):
        documents = read_documents(data)
        if limit is not None:
            documents = limited(documents, model.tokenizer, limit)
        length = asked["window"] or model.model.config.max_position_embeddings
        windows = windows_of(documents, model.tokenizer, length, asked["packed"])
    most = most_evaluations(len(layers_with_tables(model)), wish)
    out.text(f"{'to measure':<20}  up to {most:,} sets of layers, {windows.n_tokens:,} tokens each")
    judge = Judge(partner, windows, device=asked["device"], batch_tokens=asked["batch_tokens"])
    measured = load_measured(asked["measured"]) if asked["measured"] else Measured()
    with out.timing("choose"):
        choice = choose_layers(
            model,
            windows,
            wish,
            reference=partner,
            machine=machine,
            progress=out.progress(),
            known=known_costs(measured, model, judge, fold=wish.fold),
        )
    show_choice(out, choice)
    return DropSpec(choice.layers, wish.fold, choice.into, choice.to_history())


def _chosen_layers(
    bundle: Path, layers: str | None, middle: int | None, keep: str | None
) -> tuple[int, ...]:
    """Original indices to leave out, from the one of the three options that names them."""
    from tolkit.compress.spec import middle_layers, parse_layers
    from tolkit.errors import UsageError
    from tolkit_formats import open_bundle

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
