"""Making tables smaller: rank, bits, and fewer layers. Library entry points of the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tolkit.calibrate import Calibration, load_metric
from tolkit.compress.keep import keep_rows
from tolkit.compress.plan import plan_compress, plan_drop
from tolkit.compress.spec import CompressSpec, DropSpec
from tolkit.counts import assumed_counts, load_counts
from tolkit.progress import Progress, TqdmProgress
from tolkit.sources import TableSource, open_source

if TYPE_CHECKING:
    from tolkit.bundling import BundleReport, Resources

__all__ = [
    "CompressSpec",
    "DropSpec",
    "compress",
    "compress_options",
    "weights_kind",
    "drop_layers",
    "open_for",
]


def compress(
    source_path: str | Path,
    out: str | Path,
    spec: CompressSpec,
    *,
    resources: Resources | None = None,
    dry: bool = False,
    progress: Progress | None = None,
) -> BundleReport:
    """Write a smaller bundle from a bundle, or straight from a checkpoint.

    From a checkpoint the full table is never written. The source is never changed.

    Args:
        source_path: NAME.tol or a checkpoint folder.
        out: the NAME.tol folder to create.
        spec: rank, codec, layers to drop, feedback, weights.
        dry: report the plan with predicted bytes, write nothing.

    Raises:
        UsageError: a rank, layer or codec that cannot be had.
        InputError, MismatchError, ResourceError: see their classes; nothing is published.
    """
    from tolkit.bundling import Resources, dry_run, write_bundle

    source, counts_V, calibration = open_for(source_path, spec)
    plan = plan_compress(source, spec)
    if dry:
        return dry_run(
            source,
            plan,
            command="compress",
            weights_V=counts_V,
            calibration=calibration,
            progress=progress or TqdmProgress(),
            resources=resources or Resources(),
        )
    return write_bundle(
        source,
        plan,
        out,
        command="compress",
        options=compress_options(spec, weights_kind(source, counts_V), calibration, source),
        weights_V=counts_V,
        resources=resources or Resources(),
        progress=progress or TqdmProgress(),
        calibration=calibration,
    )


def open_for(
    source_path: str | Path, spec: CompressSpec
) -> tuple[TableSource, npt.NDArray[np.uint64] | None, Calibration | None]:
    """The source in the order of the counts that `spec` names, those that weigh rows, the metric.

    Raises:
        MismatchError: counts or metric of another model or tokenizer.     InputError and its kin.
    """
    source = open_source(source_path)
    if spec.weights not in ("auto", "none"):
        source.use_counts(load_counts(Path(spec.weights), source))
    keep_rows(source, spec.keep_rows)
    counts_V = None if spec.weights == "none" else source.token_counts_V
    unknown = counts_V is None and source.slot_of_token_V is None
    if unknown and spec.weights == "auto" and spec.codec == "bands":
        counts_V = assumed_counts(source.vocab_size)
    calibration = None
    if spec.calibration is not None:
        calibration = load_metric(Path(spec.calibration), source)
    return source, counts_V, calibration


def weights_kind(source: TableSource, counts_V: npt.NDArray[np.uint64] | None) -> str:
    """What rows were weighed by, for the history: none, counts or assumed."""
    if counts_V is None:
        return "none"
    return "assumed" if source.token_counts_V is None else "counts"


def compress_options(
    spec: CompressSpec, weights: str, calibration: Calibration | None, source: TableSource
) -> dict[str, Any]:
    """What the history of a compressed bundle says about how: plain JSON, no paths."""
    options: dict[str, Any] = {
        "rank": spec.rank,
        "codec": spec.codec or "f16",
        "drop": list(spec.drop),
        "fold": spec.fold,
        "feedback": spec.feedback,
        "weights": weights,
        **spec.chosen_by,
    }
    if spec.into is not None:
        options["into"] = [spec.into[layer] for layer in spec.drop]
    if spec.keep_rows is not None and source.num_rows < source.vocab_size:
        options["keep_rows"] = source.num_rows
    if spec.codec == "bands" and spec.bands is not None:
        options |= {
            "bits_per_value": spec.bits_per_value,
            "budget_bytes": spec.budget_bytes,
            "transform": spec.bands.transform,
            "predictor_bits": spec.bands.predictor_bits,
            "tiers": spec.bands.tiers,
            "coding": spec.coding,
            "calibration": None if calibration is None else calibration.digest,
        }
    return options


def drop_layers(
    source_path: str | Path,
    out: str | Path,
    spec: DropSpec,
    *,
    resources: Resources | None = None,
    dry: bool = False,
    progress: Progress | None = None,
) -> BundleReport:
    """Write a bundle without some layers' tables, by default folded into the next kept one.

    Args:
        source_path: NAME.tol; a checkpoint goes through `compress` with `drop`.
        out: the NAME.tol folder to create.

    Raises:
        UsageError: layers out of range, already gone, or all of them.
        InputError, MismatchError, ResourceError: see their classes; nothing is published.
    """
    from tolkit.bundling import Resources, dry_run, write_bundle

    source = open_source(source_path)
    plan = plan_drop(source, spec)
    if dry:
        return dry_run(source, plan, command="drop-layers")
    options: dict[str, Any] = {"layers": list(spec.layers), "fold": spec.fold}
    if spec.into is not None:
        options["into"] = [spec.into[layer] for layer in spec.layers]
    options |= spec.chosen_by
    return write_bundle(
        source,
        plan,
        out,
        command="drop-layers",
        options=options,
        weights_V=source.token_counts_V,
        resources=resources or Resources(),
        progress=progress or TqdmProgress(),
    )
