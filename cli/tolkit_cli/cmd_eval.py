"""`tol eval`: perplexity, divergence from a reference, tasks, gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tolkit_cli._command import command
from tolkit_cli._eval_options import (
    AlphaOption,
    BaselineOption,
    DataOption,
    DtypeOption,
    ForceReportsOption,
    GateOption,
    GatesOption,
    HarnessOption,
    JsonOutOption,
    JunitOption,
    LimitOption,
    MarkdownOption,
    ModelArgument,
    OtherReferenceOption,
    PackedOption,
    PrefixOption,
    ReferenceOption,
    TablesOption,
    TaskDataOption,
    TaskLimitOption,
    TasksOption,
    UndecidedOption,
    WindowOption,
)
from tolkit_cli._eval_report import require_writable, show_result, write_reports
from tolkit_cli._options import BatchTokensOption, DeviceOption
from tolkit_cli._output import Output

if TYPE_CHECKING:
    from tolkit.data import Tokenizer
    from tolkit.evaluate import EvalResult, Windows
    from tolkit.evaluate.tasks import TaskData
    from tolkit.tables import Runnable

__all__ = ["evaluate"]


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
    data: DataOption = None,
    reference: ReferenceOption = None,
    other_reference: OtherReferenceOption = False,
    baseline: BaselineOption = None,
    task_data: TaskDataOption = None,
    tasks: TasksOption = None,
    task_limit: TaskLimitOption = None,
    lm_eval: HarnessOption = None,
    alpha: AlphaOption = 1.0,
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
    """Measure perplexity, divergence and tasks; fail on a gate.

    Reads text and scores every token once: perplexity, and with --reference the KL divergence
    from it, top-1 agreement and the change of perplexity, each with a standard error over
    windows. --tasks adds the accuracy of tasks, equal to lm-evaluation-harness'. Appends a
    record to the bundle's quality.jsonl; changes nothing else.

    Gates compare unrounded with the 95 % interval: exit code 3 when one fails or cannot be
    decided. Takes about one forward pass per model; a small model reads thousands of tokens a
    second on a CPU. Several processes share the text: torchrun --nproc-per-node N -m
    tolkit_cli.main eval ...
    """
    from tolkit import ranks
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
    )
    from tolkit.evaluate.adjust import scaled
    from tolkit.evaluate.tasks import find_tasks
    from tolkit.evaluate.windows import no_windows, windows_of
    from tolkit.tables import load_runnable, require_partners
    from tolkit_formats.errors import NonFiniteError

    if ranks.rank() > 0:
        out.mute()
    reports = {"--json-out": json_out, "--junit": junit, "--markdown": markdown}
    require_writable(reports, force)
    _require_sense(data, tasks, task_data, lm_eval, alpha)
    conditions = [parse_gate(text) for text in gate or []]
    conditions += load_gates(gates) if gates else []
    stored = load_baseline(baseline) if baseline else None
    require_gate_partners(conditions, baseline=stored, reference=reference is not None)
    items = find_tasks(_names(tasks), task_data, task_limit) if tasks and task_data else []
    progress = out.progress()
    out.record("inputs", model=model, reference=reference, data=data, baseline=baseline)
    out.record("inputs", tasks=[str(task.path) for task in items], lm_eval=lm_eval, alpha=alpha)
    with out.timing("load"):
        candidate = load_runnable(model)
        partner = load_runnable(reference) if reference else None
    if partner and candidate.kind == "bundle" and not other_reference:
        require_partners(candidate, partner)
    if alpha != 1:
        candidate = scaled(candidate, alpha)
    with out.timing("text"):
        length = window or candidate.model.config.max_position_embeddings
        windows = no_windows(candidate.tokenizer, length)
        if data:
            documents = _documents(data, candidate.tokenizer, limit_tokens)
            windows = windows_of(documents, candidate.tokenizer, length, packed, prefix)
    before = None
    if stored is not None:
        before = stored.record_for(planned_setting(windows, partner.identity if partner else None))

    where = {"dtype": dtype, "device": device}
    how = {**where, "batch_tokens": batch_tokens, "tables": tables, "progress": progress}
    result = _measured(out, candidate, partner, windows, items, str(model), window, where, how)
    if lm_eval:
        options = {"include_path": task_data, "limit": task_limit, **where, "progress": progress}
        result = _with_lm_eval(out, result, model, reference, _names(lm_eval), options)

    verdicts = check_gates(result, conditions, allow_undecided, stored)
    show_result(out, result, verdicts, before)
    if ranks.rank() == 0:
        write_reports(out, result, verdicts, before, reports)
        if candidate.kind == "bundle" and alpha == 1:
            append_quality(model, quality_record(result, verdicts), progress)
    if result.problems:  # before the gates: broken numbers are no verdict on quality
        raise NonFiniteError(result.problems[0], hint=f"run: tol verify {model}")
    require_gates(verdicts)


def _require_sense(
    data: list[str] | None,
    tasks: str | None,
    task_data: Path | None,
    lm_eval: str | None,
    alpha: float,
) -> None:
    """UsageError for options that leave nothing to do, or do not go together."""
    from tolkit import ranks
    from tolkit.errors import UsageError

    if not (data or tasks or lm_eval):
        raise UsageError("eval: nothing to measure", hint="give --data, --tasks or --lm-eval")
    if tasks and task_data is None:
        raise UsageError("--tasks: needs their files", hint="give --task-data DIR")
    if lm_eval and (alpha != 1 or ranks.world_size() > 1):
        raise UsageError("--lm-eval: runs in one process, with the tables as they are")


def _measured(
    out: Output,
    candidate: Runnable,
    partner: Runnable | None,
    windows: Windows,
    items: list[TaskData],
    label: str,
    window: int | None,
    where: dict[str, Any],
    how: dict[str, Any],
) -> EvalResult:
    """Text and tasks, where there are any, in one result."""
    from tolkit.evaluate import evaluate as measure
    from tolkit.evaluate import without_text
    from tolkit.evaluate.combine import with_tasks
    from tolkit.evaluate.tasks import evaluate_tasks

    if len(windows):
        with out.timing("evaluate"):
            (result,) = measure([candidate], partner, windows, labels=[label], **how)
    else:
        result = without_text(candidate, partner, windows, label=label, **where)
    if not items:
        return result
    with out.timing("tasks"):
        (found,) = evaluate_tasks([candidate], partner, items, labels=[label], window=window, **how)
    return with_tasks(result, found)


def _with_lm_eval(
    out: Output,
    result: EvalResult,
    model: Path,
    reference: Path | None,
    names: list[str],
    options: dict[str, Any],
) -> EvalResult:
    """The result with the harness's tasks, run on the model and on the reference."""
    from tolkit.evaluate.combine import with_harness
    from tolkit.evaluate.lm_eval import run_lm_eval

    with out.timing("lm_eval"):
        found = run_lm_eval(model, names, **options)
        beside = None if reference is None else run_lm_eval(reference, names, **options)
    out.record("outputs", lm_eval=found.to_json())
    return with_harness(result, found, beside)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _documents(data: Sequence[str], tokenizer: Tokenizer, limit_tokens: int | None) -> Any:
    from tolkit.data import read_documents
    from tolkit.data.limit import limited

    documents = read_documents(data)
    return documents if limit_tokens is None else limited(documents, tokenizer, limit_tokens)
