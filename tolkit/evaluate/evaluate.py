"""One pass over a text: what each candidate costs against the reference, as metrics.

W windows.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

import numpy as np
import torch

from tolkit.evaluate.estimates import ratio_estimate
from tolkit.evaluate.forward import ForwardPass, Machine
from tolkit.evaluate.metrics import Tally, TextSizes, comparison_metrics, perplexity_metrics
from tolkit.evaluate.partners import check_partners
from tolkit.evaluate.result import Conditions, EvalResult, Metric, WindowSums, metric_of
from tolkit.evaluate.runnable import Placed, Runnable, device_label
from tolkit.evaluate.windows import Windows
from tolkit.progress import Progress, TqdmProgress

__all__ = ["evaluate", "without_text"]

_NOISE_WINDOWS = 32


def evaluate(
    candidates: Sequence[Runnable],
    reference: Runnable | None,
    windows: Windows,
    *,
    dtype: str | torch.dtype = "float32",
    device: str = "auto",
    batch_tokens: int | None = None,
    tables: str = "auto",
    progress: Progress | None = None,
    labels: Sequence[str] | None = None,
) -> list[EvalResult]:
    """Perplexity of each candidate and, with a reference, what it lost against it.

    Under torchrun the processes share the windows; all of them return the whole result.

    Cost: one forward pass a model; logits exist for one tile of positions x vocabulary at a time.

    Args:
        candidates: one or more models. They are not changed.
        reference: what KL, top-1 agreement and ppl_increase compare with; None for perplexity
            only.
        windows: from `windows_of`, with the tokenizer of these models.
        dtype: number format of the forward passes. Products in float32 are real float32. In any
            other format the reference's own loss is measured on up to 32 windows (`noise_floor`).
        device: auto, cpu, cuda or cuda:N.
        batch_tokens: tokens read at once; by default 8,192 on a CPU, 65,536 on CUDA; halved
            with a warning when memory runs out.
        tables: auto, resident or streamed, as `Machine` says.
        progress: where to report; tqdm by default.
        labels: names of the candidates in messages and reports; by default their kind.

    Returns:
        One result a candidate, in order. NaN or infinite logits make a result's metrics NaN and
        are told in its `problems`.

    Raises:
        MismatchError: a model's tokenizer or vocabulary is not that of the reference or the
            windows.
        DataError: no windows.      UsageError: a window longer than a model's positions.
        ResourceError: no such device, or out of memory.
    """
    machine = Machine(device, dtype, batch_tokens, tables)
    progress = progress or TqdmProgress()
    names = list(labels) if labels is not None else [c.kind for c in candidates]
    assert len(names) == len(candidates)
    check_partners(candidates, reference, windows, names)

    runnables = [*([] if reference is None else [reference]), *candidates]
    with machine.running():
        models = [machine.place(runnable) for runnable in runnables]
        run = ForwardPass(models, windows, machine, with_reference=reference is not None)
        with progress.task("evaluate", windows.n_tokens, "token") as task:
            run.run(range(len(windows)), progress, task)
        noise = None
        if reference is not None and machine.dtype != torch.float32:
            exact = machine.place(reference, torch.float32)
            noise = _noise_floor(exact, models[0], windows, machine)
    return _results(run, windows, candidates, reference, names, noise)


def without_text(
    candidate: Runnable,
    reference: Runnable | None,
    windows: Windows,
    *,
    dtype: str | torch.dtype = "float32",
    device: str = "auto",
    label: str = "",
) -> EvalResult:
    """A result without metrics, for tasks to be added: `windows` are `no_windows`."""
    return EvalResult(
        label=label or candidate.kind,
        identity=candidate.identity,
        kind=candidate.kind,
        reference_identity=None if reference is None else reference.identity,
        metrics={},
        reference_metrics={},
        conditions=_conditions(windows, Machine(device, dtype)),
        table_bytes=candidate.table_bytes,
        bits_per_value=candidate.bits_per_value,
    )


def _results(
    run: ForwardPass,
    windows: Windows,
    candidates: Sequence[Runnable],
    reference: Runnable | None,
    labels: Sequence[str],
    noise_floor: Metric | None,
) -> list[EvalResult]:
    """One result a candidate."""
    sizes = TextSizes.of(windows)
    conditions = _conditions(windows, run.machine)
    first = len(run.models) - len(candidates)
    found = []
    for i, candidate in enumerate(candidates):
        tally = run.tallies[first + i]
        metrics = perplexity_metrics(tally, sizes)
        problems = _problems(windows, labels[i], tally)
        reference_metrics: dict[str, Metric] = {}
        if reference is not None:
            metrics |= comparison_metrics(tally, run.tallies[0], sizes)
            reference_metrics = perplexity_metrics(run.tallies[0], sizes)
            problems += _problems(windows, "reference", run.tallies[0])
        found.append(
            EvalResult(
                label=labels[i],
                identity=candidate.identity,
                kind=candidate.kind,
                reference_identity=None if reference is None else reference.identity,
                metrics=metrics,
                reference_metrics=reference_metrics,
                conditions=conditions,
                noise_floor=noise_floor,
                problems=tuple(problems),
                table_bytes=candidate.table_bytes,
                bits_per_value=candidate.bits_per_value,
                windows=_window_sums(sizes, tally, None if reference is None else run.tallies[0]),
                timings_s={
                    "forward": run.forward_s[first + i],
                    "reference_forward": run.forward_s[0] if reference is not None else 0.0,
                    "scoring_of_all": run.scoring_s,
                    "pass": run.elapsed_s,
                },
            )
        )
    return found


def _window_sums(sizes: TextSizes, tally: Tally, reference: Tally | None) -> WindowSums:
    compared = reference is not None
    return WindowSums(
        tokens_W=sizes.tokens_W,
        words_W=sizes.words_W,
        bytes_W=sizes.bytes_W,
        nll_W=tally.nll_W,
        reference_nll_W=reference.nll_W if reference is not None else None,
        kl_W=tally.kl_W if compared else None,
        agreeing_W=tally.agreeing_W if compared else None,
    )


def _problems(windows: Windows, label: str, tally: Tally) -> list[str]:
    bad = tally.first_bad_window()
    if bad is not None:
        where = windows.name_of(bad)
        return [f"{label}: NaN or infinite logits, first in window {bad} ({where})"]
    if int(tally.flat_tokens[0]) == windows.n_tokens:
        return [f"{label}: all logits are equal at every position; the model says nothing"]
    return []


def _noise_floor(exact: Placed, rounded: Placed, windows: Windows, machine: Machine) -> Metric:
    """KL(reference in float32 || reference in the other format) on evenly spread windows."""
    count = min(_NOISE_WINDOWS, len(windows))
    indices = sorted({i * len(windows) // count for i in range(count)})
    # The format's logits are compared as float32 numbers: a float32 head on rounded hidden
    # states would hide the rounding of the head itself.
    run = ForwardPass([exact, rounded], windows, machine, with_reference=True)
    run.run(indices, None, None)
    scored_W = windows.scored_W[indices].astype(np.float64)
    estimate = ratio_estimate(run.tallies[1].kl_W[indices], scored_W)
    return metric_of(estimate, round(float(scored_W.sum())))


def _conditions(windows: Windows, machine: Machine) -> Conditions:
    try:
        version = importlib.metadata.version("tolkit")
    except importlib.metadata.PackageNotFoundError:
        version = "source"
    return Conditions(
        text_digest=windows.text_digest,
        tokenizer_digest=windows.tokenizer_digest,
        window_length=windows.length,
        packed=windows.packed,
        prefix_id=windows.prefix_id,
        n_documents=windows.n_documents,
        n_windows=len(windows),
        n_tokens=windows.n_tokens,
        n_bytes=windows.n_bytes,
        n_words=windows.n_words,
        device=device_label(machine.device),
        dtype=str(machine.dtype).removeprefix("torch."),
        versions={
            "tolkit": version,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    )
