"""One pass over a text: every candidate beside the reference, which runs once.

B batch, T positions, N scored positions of a batch, V vocabulary, D hidden, W windows.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tolkit.errors import ResourceError, UsageError
from tolkit.evaluate.batching import batches, padded
from tolkit.evaluate.estimates import ratio_estimate
from tolkit.evaluate.metrics import Tally, TextSizes, comparison_metrics, perplexity_metrics
from tolkit.evaluate.partners import check_partners
from tolkit.evaluate.result import Conditions, EvalResult, Metric, metric_of
from tolkit.evaluate.runnable import (
    Placed,
    Runnable,
    device_label,
    full_float32,
    pick_device,
    pick_dtype,
)
from tolkit.evaluate.scoring import score_positions
from tolkit.evaluate.windows import Windows
from tolkit.progress import Progress, Task, TqdmProgress

__all__ = ["evaluate"]

_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
_NOISE_WINDOWS = 32


def evaluate(
    candidates: Sequence[Runnable],
    reference: Runnable | None,
    windows: Windows,
    *,
    dtype: str | torch.dtype = "float32",
    device: str = "auto",
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    labels: Sequence[str] | None = None,
) -> list[EvalResult]:
    """Perplexity of each candidate and, with a reference, what it lost against it.

    Cost: one forward pass a model; logits exist for one tile of positions x vocabulary at a time.

    Args:
        candidates: one or more models. They are not changed.
        reference: what KL, top-1 agreement and ppl_increase compare with; None for perplexity
            only.
        windows: from `windows_of`, with the tokenizer of these models.
        dtype: number format of the forward passes. Products in float32 are real float32. In any
            other format the reference's own loss is measured on up to 32 windows (`noise_floor`).
        device: auto, cpu, cuda or cuda:N.
        batch_tokens: tokens read at once; by default 8,192 on a CPU, 65,536 on CUDA.
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
    here, number_format = pick_device(device), pick_dtype(dtype)
    progress = progress or TqdmProgress()
    names = list(labels) if labels is not None else [c.kind for c in candidates]
    assert len(names) == len(candidates)
    check_partners(candidates, reference, windows, names)
    size = _BATCH_TOKENS[here.type] if batch_tokens is None else batch_tokens
    if size < 1:
        raise UsageError(f"batch_tokens: expected at least 1, got {size}")

    runnables = [*([] if reference is None else [reference]), *candidates]
    try:
        with full_float32(), torch.inference_mode():
            models = [Placed(runnable, here, number_format) for runnable in runnables]
            run = _Pass(models, windows, reference is not None, here)
            with progress.task("evaluate", windows.n_tokens, "token") as task:
                run.over(range(len(windows)), size, task)
            noise = None
            if reference is not None and number_format != torch.float32:
                exact = Placed(reference, here, torch.float32)
                noise = _noise_floor(exact, models[0], windows, size, here)
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(size) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise _out_of_memory(size) from error
    conditions = _conditions(windows, here, number_format)
    return run.results(candidates, reference, names, conditions, noise)


def _out_of_memory(size: int) -> ResourceError:
    return ResourceError(
        f"batch_tokens: out of memory while reading {size:,} tokens at once",
        hint=f"use --batch-tokens {max(1, size // 2)}",
    )


class _Pass:
    """The models, their tallies and the clock of one pass; the first model may be a reference."""

    def __init__(
        self, models: Sequence[Placed], windows: Windows, with_reference: bool, device: torch.device
    ) -> None:
        self.models = models
        self.windows = windows
        self.with_reference = with_reference
        self.device = device
        self.tallies = [Tally(len(windows)) for _ in models]
        self.forward_s = [0.0] * len(models)
        self.scoring_s = 0.0

    def over(self, indices: Sequence[int], batch_tokens: int, task: Task | None) -> None:
        """Score the windows of these indices."""
        for batch in batches(self.windows, indices, batch_tokens):
            self._score(batch)
            if task is not None:
                task.advance(sum(self.windows[i].scored for i in batch))

    def _score(self, batch: Sequence[int]) -> None:
        ids_BT, scored_BT, window_N = padded([self.windows[i] for i in batch], batch)
        inputs_BT = ids_BT[:, :-1].to(self.device)
        targets_N = ids_BT[:, 1:][scored_BT].to(self.device)
        index_N = scored_BT.flatten().nonzero()[:, 0].to(self.device)
        hidden: list[Tensor] = []
        for model, placed in enumerate(self.models):
            started_s = self._now_s()
            hidden_BTD = placed.hidden(inputs_BT)
            hidden.append(hidden_BTD.flatten(0, 1).index_select(0, index_N))
            self.forward_s[model] += self._now_s() - started_s
        started_s = self._now_s()
        heads = [placed.head_weight for placed in self.models]
        scores = score_positions(hidden, heads, targets_N, with_reference=self.with_reference)
        for tally, of_model in zip(self.tallies, scores, strict=True):
            tally.add(of_model, window_N)
        self.scoring_s += self._now_s() - started_s

    def _now_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def results(
        self,
        candidates: Sequence[Runnable],
        reference: Runnable | None,
        labels: Sequence[str],
        conditions: Conditions,
        noise_floor: Metric | None,
    ) -> list[EvalResult]:
        """One result a candidate."""
        sizes = TextSizes(self.windows)
        first = len(self.models) - len(candidates)
        found = []
        for i, candidate in enumerate(candidates):
            tally = self.tallies[first + i]
            metrics = perplexity_metrics(tally, sizes)
            problems = self._problems(labels[i], tally)
            reference_metrics: dict[str, Metric] = {}
            if reference is not None:
                metrics |= comparison_metrics(tally, self.tallies[0], sizes)
                reference_metrics = perplexity_metrics(self.tallies[0], sizes)
                problems += self._problems("reference", self.tallies[0])
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
                    timings_s={
                        "forward": self.forward_s[first + i],
                        "reference_forward": self.forward_s[0] if reference is not None else 0.0,
                        "scoring_of_all": self.scoring_s,
                    },
                )
            )
        return found

    def _problems(self, label: str, tally: Tally) -> list[str]:
        bad = tally.first_bad_window()
        if bad is not None:
            where = self.windows.name_of(bad)
            return [f"{label}: NaN or infinite logits, first in window {bad} ({where})"]
        if tally.flat_tokens == self.windows.n_tokens:
            return [f"{label}: all logits are equal at every position; the model says nothing"]
        return []


def _noise_floor(
    exact: Placed, rounded: Placed, windows: Windows, batch_tokens: int, device: torch.device
) -> Metric:
    """KL(reference in float32 || reference in the other format) on evenly spread windows."""
    count = min(_NOISE_WINDOWS, len(windows))
    indices = sorted({i * len(windows) // count for i in range(count)})
    # The format's logits are compared as float32 numbers: a float32 head on rounded hidden
    # states would hide the rounding of the head itself.
    run = _Pass([exact, rounded], windows, True, device)
    run.over(indices, batch_tokens, None)
    scored_W = TextSizes([windows[i] for i in indices]).tokens_W
    estimate = ratio_estimate(run.tallies[1].kl_W[indices], scored_W)
    return metric_of(estimate, round(float(scored_W.sum())))


def _conditions(windows: Windows, device: torch.device, dtype: torch.dtype) -> Conditions:
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
        device=device_label(device),
        dtype=str(dtype).removeprefix("torch."),
        versions={
            "tolkit": version,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    )
