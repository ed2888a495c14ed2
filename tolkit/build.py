"""`build`: the FFN output of every token in every layer, computed once and stored (paper, 2.9)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tolkit.bundling import BundleReport, Resources, dry_run, write_bundle
from tolkit.compress.encode import WORK_ROWS
from tolkit.compress.keep import keep_rows
from tolkit.compress.plan import plan_build
from tolkit.errors import TolError, UsageError
from tolkit.parallel import one_intra_op_thread
from tolkit.progress import Progress, TqdmProgress
from tolkit.sources import BundleSource, CheckpointSource, is_bundle

__all__ = ["TABLE_DTYPES", "build"]

TABLE_DTYPES = ("f16", "bf16", "f32")
# What storing may change: unit roundoff, and half the spacing of subnormal numbers.
_ROUNDOFF = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}
_SMALLEST_ERROR = {"f32": 0.0, "f16": 2.0**-25, "bf16": 2.0**-134}


def build(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: str = "f16",
    keep: str | None = None,
    resources: Resources | None = None,
    dry: bool = False,
    progress: Progress | None = None,
) -> BundleReport:
    """Write the raw tables of a memory or flex checkpoint as a bundle.

    Args:
        checkpoint: folder with config.json and model.safetensors; never changed.
        out: the NAME.tol folder to create, V x L x D x (2 or 4) bytes and the backbone.
        dtype: of the stored values: f16 (range +-65504), bf16 or f32 (exact).
        keep: records of the most frequent tokens only, ``5000`` or ``25%``; see
            `CompressSpec.keep_rows`. Counts must be in the checkpoint.
        dry: report predicted bytes, write nothing.

    Returns:
        the report; `checks` holds what comparing whole blocks of stored rows with freshly
        computed FFN outputs gave (`max_abs_difference`, `rows`, `relative_error`).

    Raises:
        CheckpointError, UnsafeInputError, NonFiniteError, MismatchError, OutputExistsError,
        ResourceError: nothing is published.
    """
    progress = progress or TqdmProgress()
    resources = resources or Resources()
    if dtype not in TABLE_DTYPES:
        raise UsageError(f"--dtype: {dtype!r} is not offered, expected {', '.join(TABLE_DTYPES)}")
    if is_bundle(Path(checkpoint)):
        raise UsageError(
            f"{checkpoint}: is a bundle, build takes a checkpoint", hint="use: tol compress"
        )
    source = CheckpointSource(Path(checkpoint))
    keep_rows(source, keep)
    plan = plan_build(source, dtype)
    options: dict[str, object] = {"dtype": dtype}
    if source.num_rows < source.vocab_size:
        options["keep_rows"] = source.num_rows
    if dry:
        return dry_run(source, plan, command="build")
    report = write_bundle(
        source,
        plan,
        out,
        command="build",
        options=options,
        weights_V=None,
        resources=resources,
        progress=progress,
    )
    assert report.path is not None
    return replace(report, checks=_check(source, report.path, dtype))


def _check(source: CheckpointSource, path: Path, dtype: str) -> dict[str, float]:
    """Compare the first, a middle and the last run of stored rows with the FFN path.

    On this thread alone: one run of rows and one layer's weights in memory at a time.
    """
    stored = BundleSource(path)
    last = (source.num_rows - 1) // WORK_ROWS
    spans = [
        (run * WORK_ROWS, min((run + 1) * WORK_ROWS, source.num_rows))
        for run in sorted({0, last // 2, last})
    ]
    largest, lost, total = 0.0, 0.0, 0.0
    with one_intra_op_thread():
        for layer in range(source.num_layers):
            ffn, table = source.plane(layer), stored.plane(layer)
            for span in spans:
                want = ffn(*span)
                total += float(want.square().sum(dtype=torch.float64))
                difference = table(*span).sub_(want).abs_()
                lost += float(difference.square().sum(dtype=torch.float64))
                worst = float(difference.max())
                bound = want.abs_().mul_(_ROUNDOFF[dtype]).add_(_SMALLEST_ERROR[dtype])
                if bool((difference > bound).any()):
                    raise TolError(
                        f"{path}: layer {layer}: stored rows differ from the FFN path by up to "
                        f"{worst:g}, more than {dtype} rounding explains"
                    )
                largest = max(largest, worst)
            del ffn, table
    return {
        "rows": float(sum(stop - start for start, stop in spans)),
        "max_abs_difference": largest,
        "relative_error": (lost / total) ** 0.5 if total else 0.0,
    }
