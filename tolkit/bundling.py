"""The way every command makes a bundle: plan in, published folder and report out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tolkit import __version__
from tolkit.bundle_report import BundleReport, LayerReport, layer_reports, nominal_bits_of
from tolkit.calibrate import Calibration
from tolkit.card import bundle_card
from tolkit.compress.bases import fit_bases, forget_damaged, row_weights
from tolkit.compress.encode import Shared, encode_rows
from tolkit.compress.fill.bands import filled_plan, fit_bands
from tolkit.compress.fill.encode_steps import encode_within, named_arrays
from tolkit.compress.fill.resolve import WorkingArrays
from tolkit.compress.fill.steps import StepsFitter
from tolkit.compress.foresee import foresee
from tolkit.compress.keep import partial_of, stored_slots
from tolkit.compress.plan import EncodePlan
from tolkit.parallel import block_pool
from tolkit.progress import Progress, SilentProgress
from tolkit.sources import TableSource
from tolkit_formats import digests, files
from tolkit_formats.entropy import models_of, tier_coder
from tolkit_formats.layer_errors import ErrorSums, LayerErrors, rounded
from tolkit_formats.manifest import Encoding, HistoryEntry, Manifest
from tolkit_formats.partial import FFN_FILE, ffn_layers
from tolkit_formats.rans import RowCoder
from tolkit_formats.reader import shared_name
from tolkit_formats.writer import BundleWriter, require_absent

__all__ = ["BundleReport", "LayerReport", "Resources", "dry_run", "write_bundle"]


@dataclass(frozen=True)
class Resources:
    """How a bundle is written, nothing of which changes a bit of it.

    Attributes:
        threads: blocks at a time; None takes every usable CPU.
        force: replace an existing output.
        restart: discard what an interrupted run left instead of continuing it.
    """

    threads: int | None = None
    force: bool = False
    restart: bool = False


def write_bundle(
    source: TableSource,
    plan: EncodePlan,
    destination: str | Path,
    *,
    command: str,
    options: Mapping[str, Any],
    weights_V: npt.NDArray[np.uint64] | None,
    resources: Resources,
    progress: Progress,
    calibration: Calibration | None = None,
) -> BundleReport:
    """Encode `plan` and publish it as `destination`.

    Args:
        options: resolved options for the history; plain JSON, no paths.
        weights_V: token counts that weight covariances, by token id; None weighs all equally.
        calibration: readers' metrics, for `bands`.

    Raises:
        OutputExistsError, ResourceError, NonFiniteError and what the source raises.
    """
    started = time.monotonic()
    destination = Path(destination)
    require_absent(destination, force=resources.force)
    files.require_free(destination.parent, plan.table_bytes)
    for warning in plan.warnings:
        progress.warn(warning)
    origin = source.sources()
    step = HistoryEntry(command, options, source.identity, f"tolkit {__version__}")
    weights = None if weights_V is None else row_weights(weights_V)[_token_of_slot(source)]
    partial_tables, slots_V = partial_of(source), stored_slots(source)
    fingerprint = digests.json_digest(
        {
            "step": {"command": command, "options": dict(options), "tool": step.tool},
            "parent": source.identity,
            "planes": plan.to_json(),
            "embedding": origin.embedding,
            "layers": [[d.norm, d.ffn] for d in origin.layers],
            "weights": _counts_digest(weights_V),
            "partial": None
            if partial_tables is None or slots_V is None
            else [partial_tables.to_json(), digests.array_digest("U32", slots_V.shape, [slots_V])],
            "bands": None
            if plan.bands is None
            else [asdict(plan.bands), plan.table_bytes, plan.entropy],
            "calibration": None if calibration is None else calibration.digest,
            "torch": torch.__version__,
        }
    )
    with (
        BundleWriter(
            destination,
            fingerprint=fingerprint,
            force=resources.force,
            restart=resources.restart,
        ) as writer,
        block_pool(resources.threads) as pool,
    ):
        forget_damaged(writer)
        # First what reads the rest of the source: if that is damaged, hours of encoding are saved.
        _write_side_files(source, writer, plan)
        require_same_fit = partial(_require_same_fit, source, writer)
        if plan.entropy:
            fitter = StepsFitter(source, plan, weights_V, calibration, writer.work, pool, progress)
            plan, stored, sums = encode_within(
                source, plan, fitter, writer, pool, progress, require_same_fit
            )
        elif plan.bands is not None:
            filled = fit_bands(source, plan, weights_V, calibration, writer.work, pool, progress)
            plan = filled_plan(plan, filled)
            shared: Shared = WorkingArrays(filled.layers)
            stored = named_arrays({i: decided.stored for i, decided in filled.layers.items()})
            require_same_fit(plan, stored)
            sums = encode_rows(source, plan, shared, writer, pool, progress)
        else:
            shared = fit_bases(source, plan, weights, writer, pool, progress)
            stored = named_arrays(_stored_bases(source, plan, shared))
            if plan.coding is not None:
                stored |= source.stored_common()
            coders = _copied_coders(plan, stored)
            sums = encode_rows(source, plan, shared, writer, pool, progress, coders)
        errors = _layer_errors(source, plan, sums)
        if stored:
            writer.put_tensors("tables/bases.safetensors", stored)
        manifest = Manifest(
            vocab_size=source.vocab_size,
            num_layers=source.num_layers,
            hidden_size=source.hidden_size,
            layers=plan.statuses,
            tiers=plan.tiers,
            encoding=Encoding(plan.feedback_recorded, tuple(p.layer for p in plan.planes), errors),
            sources=origin,
            files={},
            history=(*source.history, step),
            mapped_slots=source.slot_of_token_V is not None,
            predictors=plan.predictors,
            coding=plan.coding,
            partial=partial_tables,
            combine=source.combine,
            lookup_scale=source.lookup_scale,
            out_of_range=source.out_of_range,
        )
        writer.put_file("README.md", bundle_card(manifest).encode())
        source.require_unchanged()
        published = writer.publish(manifest)
        plan = replace(plan, table_bytes=published.table_bytes)
    return BundleReport(
        command=command,
        source=source.path,
        path=destination,
        identity=published.identity,
        layers=layer_reports(plan, errors),
        table_bytes=published.table_bytes,
        bundle_bytes=published.bundle_bytes,
        bits_per_value=published.bits_per_value,
        nominal_bits_per_value=nominal_bits_of(plan, source.vocab_size),
        elapsed_s=time.monotonic() - started,
        partial=published.partial,
        resumed=writer.resumed,
        warnings=plan.warnings,
    )


def dry_run(
    source: TableSource,
    plan: EncodePlan,
    *,
    command: str,
    weights_V: npt.NDArray[np.uint64] | None = None,
    calibration: Calibration | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> BundleReport:
    """The report `write_bundle` would give, bytes predicted as `foresee` does, nothing written."""
    if plan.bands is not None:
        silent = progress or SilentProgress()
        with block_pool((resources or Resources()).threads) as pool:
            plan = foresee(source, plan, weights_V, calibration, pool, silent).plan
    values = source.vocab_size * source.num_layers * source.hidden_size
    return BundleReport(
        command=command,
        source=source.path,
        path=None,
        identity=None,
        layers=layer_reports(plan, ()),
        table_bytes=plan.table_bytes,
        bundle_bytes=None,
        bits_per_value=8 * plan.table_bytes / values,
        nominal_bits_per_value=nominal_bits_of(plan, source.vocab_size),
        elapsed_s=0.0,
        partial=partial_of(source),
        warnings=plan.warnings,
    )


def _counts_digest(counts_V: npt.NDArray[np.uint64] | None) -> str | None:
    return None if counts_V is None else digests.array_digest("U64", counts_V.shape, [counts_V])


def _token_of_slot(source: TableSource) -> npt.NDArray[np.int64]:
    if source.slot_of_token_V is None:
        return np.arange(source.vocab_size)
    return np.argsort(source.slot_of_token_V)


def _copied_coders(
    plan: EncodePlan, stored: Mapping[str, tuple[str, npt.NDArray[Any]]]
) -> tuple[RowCoder, ...]:
    """Coders of copied planes: their source's models, the classes of the planes that stay."""
    if plan.coding is None:
        return ()
    arrays = {name: array for name, (_, array) in stored.items()}
    models = models_of(arrays)
    coders = []
    for tier in plan.tiers:
        names = [shared_name(p.layer, f"classes.{tier.index}") for p in tier.planes]
        classes = [arrays[name] for name in names if name in arrays]
        coders.append(tier_coder(models, classes, plan.coding))
    return tuple(coders)


def _require_same_fit(
    source: TableSource,
    writer: BundleWriter,
    plan: EncodePlan,
    stored: Mapping[str, tuple[str, npt.NDArray[Any]]],
) -> None:
    """Start over where finished shards were encoded with another fit.

    A fit is made again after a crash, and on another machine it may round otherwise.
    """
    arrays = {
        name: digests.array_digest(dtype, array.shape, [array])
        for name, (dtype, array) in stored.items()
    }
    fit = digests.json_digest({"planes": plan.to_json(), "arrays": arrays})
    if writer.note("bands") not in (None, fit):
        writer.start_over()
        _write_side_files(source, writer, plan)
    writer.remember("bands", fit)


def _stored_bases(
    source: TableSource, plan: EncodePlan, shared: Shared
) -> dict[int, dict[str, tuple[str, npt.NDArray[Any]]]]:
    """Fitted bases, and the shared arrays of copied planes as the source has them."""
    layers = {}
    for plane in plan.planes:
        if plane.copy:
            layers[plane.layer] = dict(source.stored_shared(plane.layer))
        else:
            layers[plane.layer] = {
                name: ("F16", tensor.numpy()) for name, tensor in shared[plane.layer].items()
            }
    return layers


def _write_side_files(source: TableSource, writer: BundleWriter, plan: EncodePlan) -> None:
    """Everything but records, bases, checksums, card and manifest."""
    for name, content in sorted(source.root_files().items()):
        writer.put_file(name, content)
    source.write_backbone(writer.path("backbone.safetensors"))
    if source.num_rows < source.vocab_size:
        source.write_ffn(writer.path(FFN_FILE), ffn_layers(plan.statuses))
    slots_V = stored_slots(source)
    if slots_V is not None:
        writer.put_tensors("tables/slots.safetensors", {"slots": ("U32", slots_V)})
    if source.token_counts_V is not None:
        counts = {"token_counts": ("U64", source.token_counts_V)}
        writer.put_tensors("token_counts.safetensors", counts)


def _layer_errors(
    source: TableSource, plan: EncodePlan, sums: Sequence[ErrorSums]
) -> tuple[LayerErrors, ...]:
    """Measured in this step, or the source's own where this step changed nothing.

    A plane's error stays true as long as its bytes are copied; the running sum's until the first
    layer whose plane is encoded or left out.
    """
    step = len(source.history)
    known = {errors.layer: errors for errors in source.errors}
    planes = {p.layer: p for p in plan.planes}
    result = []
    changed = False
    for layer, before in enumerate(source.statuses):
        old = known.get(layer, LayerErrors(layer))
        plane = planes.get(layer)
        had_plane = before.status == "kept"
        new = had_plane if plane is None else not plane.copy
        changed = changed or new
        relative = rounded(sums[layer].relative) if new else old.relative
        running = rounded(sums[layer].running_sum) if changed else old.running_sum
        errors = LayerErrors(
            layer,
            relative,
            None if relative is None else step if new else old.relative_step,
            running,
            None if running is None else step if changed else old.running_sum_step,
        )
        if errors.known:
            result.append(errors)
    return tuple(result)
