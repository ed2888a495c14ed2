"""`tol eval`: perplexity, divergence from a reference, gates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tolkit_cli._command import command
from tolkit_cli._options import (
    INPUT,
    OUTPUT,
    RESOURCES,
    TEXT_HELP,
    WHAT,
    BatchTokensOption,
    ComputeDtype,
    DeviceOption,
    option,
)
from tolkit_cli._output import Column, Output
from tolkit_cli._units import number_text, percent_text

if TYPE_CHECKING:
    from tolkit.evaluate import EvalResult, GateVerdict, Metric
    from tolkit.quality_log import QualityRecord, RecordedMetric

__all__ = ["evaluate"]

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="A bundle (NAME.tol) or a checkpoint folder.", rich_help_panel=INPUT
    ),
]
DataOption = Annotated[
    list[str], option(INPUT, "--data", metavar="TEXT", help=f"{TEXT_HELP} Repeatable.")
]
ReferenceOption = Annotated[
    Path | None,
    option(
        INPUT,
        "--reference",
        metavar="MODEL",
        help="Compare with this checkpoint (its FFN path) or bundle. Without it: perplexity only.",
    ),
]
OtherReferenceOption = Annotated[
    bool,
    option(INPUT, "--other-reference", help="Allow a reference the tables were not built from."),
]
GateOption = Annotated[
    list[str] | None,
    option(
        WHAT,
        "--gate",
        metavar="COND",
        help="Condition to meet: ppl_increase<=0.5%, kl_mean<=0.01, top1_agreement>=97%, "
        "bytes<=1.6GB. Repeatable.",
    ),
]
GatesOption = Annotated[
    Path | None, option(WHAT, "--gates", metavar="FILE", help="Conditions in TOML.")
]
BaselineOption = Annotated[
    str | None,
    option(
        INPUT,
        "--baseline",
        metavar="FILE",
        help="Earlier evaluation to compare with: a quality.jsonl, or a bundle that holds one; "
        "FILE#IDENTITY picks a bundle's record. For gates as ppl_token<=baseline+0.5%.",
    ),
]
UndecidedOption = Annotated[
    bool,
    option(
        WHAT, "--allow-undecided", help="A gate inside the measurement's error passes, not fails."
    ),
]
WindowOption = Annotated[
    int | None,
    option(
        WHAT, "--window", metavar="N", min=1, help="Tokens of a window. [default: the model's most]"
    ),
]
PackedOption = Annotated[
    bool, option(WHAT, "--packed", help="Join documents with <eos> before cutting windows.")
]
LimitOption = Annotated[
    int | None,
    option(WHAT, "--limit-tokens", metavar="N", min=1, help="Stop after about N tokens of text."),
]
DtypeOption = Annotated[
    ComputeDtype,
    option(
        RESOURCES,
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16 or float16; below float32 its noise floor is reported.",
    ),
]
PrefixOption = Annotated[
    Literal["eos", "bos", "none"],
    option(
        WHAT,
        "--prefix",
        metavar="TOKEN",
        help="Put before each document: eos, bos or none. A tokenizer without it starts bare.",
    ),
]
TablesOption = Annotated[
    Literal["auto", "resident", "streamed"],
    option(
        RESOURCES,
        "--tables",
        metavar="PLACE",
        help="Table rows: streamed (decoded batch by batch), resident (all, on the device) or "
        "auto (resident on CUDA where they fit).",
    ),
]
JsonOutOption = Annotated[
    Path | None, option(OUTPUT, "--json-out", metavar="FILE", help="Also write the JSON report.")
]
JunitOption = Annotated[
    Path | None, option(OUTPUT, "--junit", metavar="FILE", help="Also write JUnit XML.")
]
ForceReportsOption = Annotated[
    bool, option(OUTPUT, "--force", help="Replace report files that exist.")
]
MarkdownOption = Annotated[
    Path | None, option(OUTPUT, "--markdown", metavar="FILE", help="Also write Markdown.")
]

_COLUMNS = (
    Column("metric", "metric", right=False),
    Column("value", "value", human="value_text"),
    Column("se", "+/- s.e.", human="se_text"),
    Column("reference", "reference", human="reference_text"),
    Column("baseline", "baseline", human="baseline_text"),
    Column("n", "n", lambda n: f"{n:,}"),
)


@command(
    "eval",
    stage="Check",
    examples=[
        "tol eval small.tol --data stdlib:valid",
        'tol eval small.tol --reference ckpt --data stdlib:valid --gate "ppl_increase<=50%"',
    ],
    next_step="tol compress with other ranks and bits, or tol inspect.",
)
def evaluate(
    out: Output,
    model: ModelArgument,
    data: DataOption,
    reference: ReferenceOption = None,
    other_reference: OtherReferenceOption = False,
    baseline: BaselineOption = None,
    gate: GateOption = None,
    gates: GatesOption = None,
    allow_undecided: UndecidedOption = False,
    window: WindowOption = None,
    packed: PackedOption = False,
    prefix: PrefixOption = "eos",
    limit_tokens: LimitOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_tokens: BatchTokensOption = None,
    tables: TablesOption = "auto",
    json_out: JsonOutOption = None,
    junit: JunitOption = None,
    markdown: MarkdownOption = None,
    force: ForceReportsOption = False,
) -> None:
    """Measure perplexity and divergence; fail on a gate.

    Reads text and scores every token once: perplexity, and with --reference the KL divergence
    from it, top-1 agreement and the change of perplexity, each with a standard error over
    windows. Appends a record to the bundle's quality.jsonl; changes nothing else.

    Gates compare unrounded with the 95 % interval: exit code 3 when one fails or cannot be
    decided. Takes about one forward pass per model; a small model reads thousands of tokens a
    second on a CPU. Several processes share the text: torchrun --nproc-per-node N -m
    tolkit_cli.main eval ...
    """
    from tolkit import ranks
    from tolkit.data import read_documents
    from tolkit.data.limit import limited
    from tolkit.evaluate import (
        append_quality,
        check_gates,
        load_baseline,
        load_gates,
        parse_gate,
        planned_setting,
        quality_record,
        require_gate_partners,
        require_gates,
        windows_of,
    )
    from tolkit.evaluate import evaluate as measure
    from tolkit.tables import load_runnable, require_partners
    from tolkit_formats.errors import NonFiniteError

    if ranks.rank() > 0:
        out.mute()
    reports = {"--json-out": json_out, "--junit": junit, "--markdown": markdown}
    _require_writable(reports, force)
    conditions = [parse_gate(text) for text in gate or []]
    conditions += load_gates(gates) if gates else []
    stored = load_baseline(baseline) if baseline else None
    require_gate_partners(conditions, baseline=stored, reference=reference is not None)
    progress = out.progress()
    out.record("inputs", model=model, reference=reference, data=data, baseline=baseline)
    with out.timing("load"):
        candidate = load_runnable(model)
        partner = load_runnable(reference) if reference else None
    if partner and candidate.kind == "bundle" and not other_reference:
        require_partners(candidate, partner)
    with out.timing("text"):
        documents = read_documents(data)
        if limit_tokens is not None:
            documents = limited(documents, candidate.tokenizer, limit_tokens)
        length = window or candidate.model.config.max_position_embeddings
        windows = windows_of(documents, candidate.tokenizer, length, packed, prefix)
    before = None
    if stored is not None:
        before = stored.record_for(planned_setting(windows, partner.identity if partner else None))
    with out.timing("evaluate"):
        (result,) = measure(
            [candidate],
            partner,
            windows,
            dtype=dtype,
            device=device,
            batch_tokens=batch_tokens,
            tables=tables,
            progress=progress,
            labels=[str(model)],
        )
    verdicts = check_gates(result, conditions, allow_undecided, stored)
    _show(out, result, verdicts, before)
    if ranks.rank() == 0:
        _write_reports(out, result, verdicts, before, reports)
    if ranks.rank() == 0 and candidate.kind == "bundle":
        append_quality(model, quality_record(result, verdicts), progress)
    if result.problems:  # before the gates: broken numbers are no verdict on quality
        raise NonFiniteError(result.problems[0], hint=f"run: tol verify {model}")
    require_gates(verdicts)


def _show(
    out: Output, result: EvalResult, verdicts: list[GateVerdict], before: QualityRecord | None
) -> None:
    """The result in every mode: conditions, metrics, verdicts."""
    from tolkit.evaluate import to_json
    from tolkit.evaluate.reports import ordered_metrics

    ran = result.conditions
    text = f"{ran.n_tokens:,} tokens in {ran.n_windows:,} windows of {ran.window_length}"
    out.field("metrics", "identity", result.identity, "model", result.identity[:16])
    out.field("metrics", "tokens", ran.n_tokens, "text", text)
    out.field("metrics", "device", ran.device, text=f"{ran.device}, {ran.dtype}")
    speed = result.tokens_per_s
    shown = None if speed is None else f"{speed:,.0f} tokens/s, all models together"
    out.field("metrics", "tokens_per_s", speed, "speed", shown)
    for problem in result.problems:
        out.warn(problem)
    if result.noise_floor is not None:
        floor = result.noise_floor
        out.text(f"{'noise floor':<20}  KL {floor.value:.2e} +/- {floor.se:.1e} nats")
    if before is not None:
        out.field(
            "metrics",
            "baseline",
            before.bundle,
            text=f"{before.bundle[:16]}, the record of {before.where}",
        )
        if (before.device, before.dtype) != (ran.device, ran.dtype):
            out.warn(f"baseline: was measured on {before.device} in {before.dtype}")
    out.text()
    partners, earlier = result.reference_metrics, before.metrics if before else {}
    rows = [
        _row(name, metric, partners.get(name), earlier.get(name))
        for name, metric in ordered_metrics(result.metrics)
    ]
    columns = [c for c in _COLUMNS if before is not None or c.key != "baseline"]
    out.table("table", columns, rows, in_json=False)
    report = to_json(result, verdicts, before)
    out.record("metrics", **report["metrics"], bytes=report["bytes"])
    out.record("metrics", bits_per_value=report["bits_per_value"])
    for verdict, facts in zip(verdicts, report["gates"], strict=True):
        out.threshold(facts)
        out.text(verdict.message)
    headline = result.metrics.get("ppl_increase") or result.metrics["ppl_token"]
    out.quiet_value(headline.value)


def _row(
    name: str, metric: Metric, partner: Metric | None, earlier: RecordedMetric | None
) -> dict[str, Any]:
    return {
        "metric": name,
        "value": metric.value,
        "value_text": _shown(name, metric.value),
        "se": metric.se,
        "se_text": _shown(name, metric.se).lstrip("+"),
        "reference": partner.value if partner else None,
        "reference_text": _shown(name, partner.value) if partner else "",
        "baseline": earlier.value if earlier else None,
        "baseline_text": _shown(name, earlier.value) if earlier else "",
        "n": metric.n,
    }


def _shown(name: str, value: float) -> str:
    from tolkit.evaluate.gate_syntax import is_ratio

    if is_ratio(name):
        return percent_text(value, signed=name == "ppl_increase")
    return number_text(value)


def _require_writable(reports: Mapping[str, Path | None], force: bool) -> None:
    """Said before the work, not after it: a report that has no folder or is already there."""
    from tolkit.errors import OutputExistsError, UsageError

    for name, path in reports.items():
        if path is None:
            continue
        if not path.parent.is_dir():
            raise UsageError(f"{name}: {path.parent}: no such folder")
        if path.exists() and not force:
            raise OutputExistsError(
                f"{path}: already exists", hint="choose another name, or add --force"
            )


def _write_reports(
    out: Output,
    result: EvalResult,
    verdicts: list[GateVerdict],
    before: QualityRecord | None,
    reports: Mapping[str, Path | None],
) -> None:
    """The files asked for, and the summary page of a CI step where there is one."""
    import json

    from tolkit.evaluate import append_step_summary, to_json, to_junit, to_markdown
    from tolkit_formats.files import write_atomic

    summary = to_markdown(result, verdicts, before)
    report = to_json(result, verdicts, before)
    texts = {
        "--json-out": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "--junit": to_junit(result, verdicts, before),
        "--markdown": summary,
    }
    for name, path in reports.items():
        if path is not None:
            write_atomic(path, texts[name].encode())
            out.record("outputs", **{name[2:].replace("-", "_"): path})
    append_step_summary(summary)
