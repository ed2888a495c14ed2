"""`tol measure`: quality of bundles, in a file that searches reuse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tolkit_cli._command import command
from tolkit_cli._compress_options import JudgeDataOption
from tolkit_cli._eval_options import (
    DtypeOption,
    LimitOption,
    OtherReferenceOption,
    PackedOption,
    WindowOption,
)
from tolkit_cli._measuring import MeasuringOptions, judge_for, require_kin
from tolkit_cli._options import (
    INPUT,
    WHAT,
    BatchTokensOption,
    DeviceOption,
    ForceOption,
    OutOption,
    option,
)
from tolkit_cli._output import Column, Output
from tolkit_cli._units import bytes_text

if TYPE_CHECKING:
    from tolkit.evaluate.judge import Judge
    from tolkit.measured import LayerCosts, Measurement
    from tolkit.tables import Runnable

__all__ = ["measure"]

ModelsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL...", help="Bundles, or checkpoint folders.", rich_help_panel=INPUT
    ),
]
MeasureReferenceOption = Annotated[
    Path | None,
    option(
        INPUT,
        "--reference",
        metavar="MODEL",
        help="Compare with this checkpoint or bundle. Without it: perplexity only, and layers "
        "against their model as it is.",
    ),
]
LayersOption = Annotated[
    bool,
    option(WHAT, "--layers", help="What each layer alone costs, of bundles too."),
]


@command(
    "measure",
    stage="Check",
    examples=[
        "tol measure small.tol -o m.json --reference ckpt --data stdlib:valid --limit-tokens 2000",
        "tol measure ckpt -o layers.json --data stdlib:valid --limit-tokens 1000",
    ],
    next_step="tol compress --max-kl X --measured FILE, which makes none of them again.",
)
def measure(
    out: Output,
    models: ModelsArgument,
    path: OutOption,
    data: JudgeDataOption = None,
    reference: MeasureReferenceOption = None,
    other_reference: OtherReferenceOption = False,
    layers: LayersOption = False,
    window: WindowOption = None,
    packed: PackedOption = False,
    limit_tokens: LimitOption = None,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_tokens: BatchTokensOption = None,
) -> None:
    """Evaluate models into a file that searches start from.

    Reads text and scores it with all bundles in one pass, as tol eval does; of a checkpoint (and
    with --layers of bundles) it measures what each layer costs without its table, folded to
    either side, a pass a layer and side. Writes JSON, and changes nothing else.

    An entry holds for the very bundle, text, windows and reference it was measured with; tol
    compress --max-kl takes it for any bundle of the same content, tol drop-layers and --drop auto
    take layers of the same model.
    """
    from tolkit.measured import Measured, save_measured
    from tolkit.tables import load_runnable
    from tolkit_cli._eval_report import require_writable

    require_writable({"--out": path}, force)
    options = MeasuringOptions(
        data,
        reference,
        other_reference,
        None,
        window,
        packed,
        limit_tokens,
        batch_tokens,
        device,
        dtype,
    )
    out.record("inputs", models=models)
    bundles: list[Measurement] = []
    costs: list[LayerCosts] = []
    first, judge = judge_for(out, models[0], options, itself=False)
    loaded = [first, *(load_runnable(model) for model in models[1:])]
    for model in loaded[1:]:
        require_kin(model, judge.reference, options)
    plain = [model for model in loaded if model.kind == "bundle"]
    if plain:
        bundles = _bundles(out, plain, judge)
    for model in loaded:
        if layers or model.kind != "bundle":
            costs.append(_layers(out, model, judge))
    save_measured(path, Measured(tuple(bundles), tuple(costs)))
    out.field("outputs", "measured", path)
    out.quiet_value(path)


def _bundles(out: Output, models: list[Runnable], judge: Judge) -> list[Measurement]:
    """One entry a bundle, all evaluated in one pass."""
    from tolkit.compress.search.recipe import entry_of
    from tolkit_cli._search_report import metric_columns, metric_facts, show_text

    show_text(out, judge)
    with out.timing("evaluate"):
        records = judge.records([model.path for model in models], out.progress())
    entries = [entry_of(model.path, record) for model, record in zip(models, records, strict=True)]
    rows: list[dict[str, Any]] = []
    for model, entry in zip(models, entries, strict=True):
        record = entry.record
        rows.append(
            {
                "bundle": str(model.path),
                "identity": record.bundle[:16],
                "bytes": record.table_bytes,
                **metric_facts(record.metrics),
            }
        )
    out.text()
    columns = [
        Column("bundle", "bundle", right=False),
        Column("identity", "identity", right=False),
        Column("bytes", "tables", bytes_text),
        *metric_columns(out),
    ]
    out.table("bundles", columns, rows, leading=1)
    out.text()
    return entries


def _layers(out: Output, model: Runnable, judge: Judge) -> LayerCosts:
    from tolkit.compress.search.choose_known import layer_costs, measure_layers
    from tolkit_cli._choice_report import show_alone

    with out.timing("layers"):
        costs = measure_layers(model, judge, progress=out.progress())
    show_alone(out, costs)
    return layer_costs(costs, model, judge)
