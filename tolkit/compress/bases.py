"""Fitting the bases of low-rank planes, layer by layer, with the carry spilled to disk.

V vocabulary, D hidden, R rank, N rows of a block.

The basis of a plane is fitted to its table plus the carry of the planes before it (weighted by
token counts where known): its Gram matrix is summed in float64 over blocks and its leading
eigenvectors kept (Gram + eigh). Under feedback targets and carries lie in f16 V x D files in the
work folder; those and the basis of each finished layer survive a crash.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.compress.encode import Shared, block_target, encode_block, row_blocks
from tolkit.compress.gram import GramAccumulator, top_basis
from tolkit.compress.plan import EncodePlan, PlanePlan
from tolkit.errors import NonFiniteError
from tolkit.parallel import BlockPool
from tolkit.progress import Progress, Task
from tolkit.sources import TableSource
from tolkit_formats.codecs import Svd
from tolkit_formats.digests import file_digest
from tolkit_formats.files import replace, scratch_array, unlink
from tolkit_formats.limits import BLOCK_ROWS
from tolkit_formats.tensorfile import TensorFile, write_tensors
from tolkit_formats.writer import BundleWriter

__all__ = ["fit_bases", "forget_damaged", "row_weights"]

_F16_MAX = 65504.0
_F32_MAX = 3.4028234663852886e38
_TARGET = "target.tmp"
_FITTED = "fitted"


def row_weights(counts_V: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Weight of each token's row in a covariance, (count + 1)^0.5: float64 [V]."""
    return np.sqrt(counts_V.astype(np.float64) + 1.0)


def fit_bases(
    source: TableSource,
    plan: EncodePlan,
    weights_V: npt.NDArray[np.float64] | None,
    writer: BundleWriter,
    pool: BlockPool,
    progress: Progress,
) -> Shared:
    """Bases of all planes that need one: layer -> {"basis": float16 [R, D]}; {} for the others.

    Args:
        weights_V: row weights by slot, or None for equal ones.

    Memory: one float64 D x D Gram and its eigenvectors, one block a thread; disk: two f16 V x D
    files under feedback. Finished layers are taken from the work folder when resuming.
    """
    shared: dict[int, dict[str, Tensor]] = {p.layer: {} for p in plan.planes}
    fitted = [p for p in plan.planes if isinstance(p.codec, Svd) and not p.copy]
    if not fitted:
        return shared
    fitter = _Fitter(source, plan, weights_V, writer, pool)
    needed = [p for p in plan.planes if p.layer <= fitted[-1].layer and not p.copy]
    if not plan.feedback:
        needed = fitted
    with progress.task("fit bases", len(needed) * source.num_rows, "rows") as task:
        for plane in needed:
            task.note(f"layer {plane.layer}")
            shared[plane.layer] = fitter.layer(plane, last=plane is needed[-1], task=task)
    fitter.close()
    return shared


def forget_damaged(writer: BundleWriter) -> None:
    """Start over unless the files an interrupted run noted are still what they were.

    All of it: rows may have been encoded with a basis that is gone.
    """
    noted: list[dict[str, Any]] = writer.note(_FITTED) or []
    known = [(_basis_path(writer, step["layer"]), step["basis"]) for step in noted if step["basis"]]
    if noted and noted[-1]["carry"]:
        known.append((_carry_path(writer, noted[-1]["layer"]), noted[-1]["carry"]))
    if any(not path.is_file() or file_digest(path) != sha256 for path, sha256 in known):
        writer.start_over()


def _basis_path(writer: BundleWriter, layer: int) -> Path:
    return writer.work / f"basis-{layer:04d}.safetensors"


def _carry_path(writer: BundleWriter, layer: int) -> Path:
    return writer.work / f"carry-{layer:04d}.f16"


class _Fitter:
    """Walks the layers once; owns the spill files."""

    def __init__(
        self,
        source: TableSource,
        plan: EncodePlan,
        weights_V: npt.NDArray[np.float64] | None,
        writer: BundleWriter,
        pool: BlockPool,
    ) -> None:
        self.source, self.plan, self.writer, self.pool = source, plan, writer, pool
        self.weights_V = None if weights_V is None else torch.from_numpy(weights_V)
        self.shape = (source.num_rows, source.hidden_size)
        self.carry: npt.NDArray[np.float16] | None = None
        self.carry_path: Path | None = None
        self.done: list[dict[str, Any]] = list(writer.note(_FITTED) or [])

    def layer(self, plane: PlanePlan, *, last: bool, task: Task) -> dict[str, Tensor]:
        """Fit one plane (if it has a basis) and move the carry past it."""
        stored, carry_path = (
            _basis_path(self.writer, plane.layer),
            _carry_path(self.writer, plane.layer),
        )
        if plane.layer in [step["layer"] for step in self.done]:
            task.advance(self.shape[0])
            if plane.layer == self.done[-1]["layer"] and self.done[-1]["carry"]:
                self._adopt(carry_path)
            return self._read(plane, stored)
        feedback = self.plan.feedback and not last
        shared, targets = self._fit(plane, keep_targets=feedback, task=task)
        if shared:
            basis = shared["basis"].numpy()
            write_tensors(stored, {"basis": ("F16", basis)})
        before = self.carry_path
        if feedback:
            assert targets is not None
            self._pass_carry(plane, targets, shared, carry_path)
        self.done.append(
            {
                "layer": plane.layer,
                "basis": file_digest(stored) if shared else None,
                "carry": file_digest(carry_path) if feedback else None,
            }
        )
        self.writer.remember(_FITTED, self.done)
        if feedback and before is not None:
            unlink(before)
        return shared

    def _read(self, plane: PlanePlan, stored: Path) -> dict[str, Tensor]:
        if not isinstance(plane.codec, Svd):
            return {}
        basis = TensorFile(stored).expect("basis", "F16", (plane.codec.rank, self.shape[1]))
        return {"basis": torch.from_numpy(np.array(basis))}

    def _fit(
        self, plane: PlanePlan, *, keep_targets: bool, task: Task
    ) -> tuple[dict[str, Tensor], npt.NDArray[np.float16] | None]:
        """Gram over all blocks -> basis; targets spilled when the carry will need them."""
        wants_basis = isinstance(plane.codec, Svd)
        gram = GramAccumulator(self.shape[1], pool=self.pool.executor) if wants_basis else None
        spill = (
            scratch_array(self.writer.work / _TARGET, np.float16, self.shape)
            if keep_targets
            else None
        )
        waiting: list[tuple[int, Tensor]] = []  # runs of rows until they make a whole block
        for group in row_blocks(0, self.shape[0], self.pool.threads):
            tables = block_target(self.source, plane, group, self.pool)
            for (first, stop), target_ND in zip(group, tables, strict=True):
                if self.carry is not None:
                    target_ND += torch.from_numpy(self.carry[first:stop].astype(np.float32))
                if spill is not None:
                    self._spill(spill, first, target_ND, plane.layer)
                if gram is None:
                    continue
                self._require_within(target_ND, _F32_MAX, first, plane.layer, "the table")
                waiting.append((first, target_ND))
                if stop % BLOCK_ROWS == 0 or stop == self.shape[0]:
                    self._add(gram, waiting)
                    waiting = []
            task.advance(group[-1][1] - group[0][0])
        if gram is None:
            return {}, spill
        assert isinstance(plane.codec, Svd)
        try:
            basis_RD = top_basis(gram.gram_DD(), plane.codec.rank).basis_RD
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{self.source.path}: layer {plane.layer}: {error.message}, its rows are too large",
                hint="check the weights",
            ) from error
        return {"basis": basis_RD.to(torch.float16)}, spill

    def _add(self, gram: GramAccumulator, runs: list[tuple[int, Tensor]]) -> None:
        """Count one block in; a block a time, or summing D x D would take longer than products."""
        start = runs[0][0]
        rows_ND = torch.cat([run_ND for _, run_ND in runs])
        weights_V = self.weights_V
        gram.add(rows_ND, None if weights_V is None else weights_V[start : start + len(rows_ND)])

    def _pass_carry(
        self,
        plane: PlanePlan,
        targets: npt.NDArray[np.float16],
        shared: dict[str, Tensor],
        carry_path: Path,
    ) -> None:
        unfinished = carry_path.with_suffix(".tmp")
        carry = scratch_array(unfinished, np.float16, self.shape)

        def step(span: tuple[int, int]) -> None:
            first, stop = span
            target_ND = torch.from_numpy(targets[first:stop].astype(np.float32))
            _, carried_ND, _ = encode_block(
                self.source, plane, target_ND, None, shared, feedback=True, first_slot=first
            )
            self._spill(carry, first, carried_ND, plane.layer)

        for group in row_blocks(0, self.shape[0], self.pool.threads):
            self.pool.map(step, group)
        carry.flush()
        replace(unfinished, carry_path)
        self._adopt(carry_path)

    def _spill(
        self, spill: npt.NDArray[np.float16], first: int, values_ND: Tensor, layer: int
    ) -> None:
        hint = "add --no-feedback"
        self._require_within(values_ND, _F16_MAX, first, layer, "table plus carry", hint)
        spill[first : first + len(values_ND)] = values_ND.to(torch.float16).numpy()

    def _require_within(
        self, values_ND: Tensor, limit: float, first: int, layer: int, what: str, hint: str = ""
    ) -> None:
        """NonFiniteError naming layer and token of a value beyond `limit` (or NaN)."""
        if float(values_ND.abs().max()) <= limit:
            return
        row, column = (int(i) for i in (~(values_ND.abs() <= limit)).nonzero()[0])
        raise NonFiniteError(
            f"{self.source.path}: layer {layer}, token {self.source.token_at(first + row)}: {what} "
            f"is {float(values_ND[row, column]):g} in column {column}, expected at most {limit:g}",
            hint=hint or "check the weights",
        )

    def _adopt(self, path: Path) -> None:
        """The carry is now this file."""
        self.carry = np.memmap(path, np.float16, "r", shape=self.shape)
        self.carry_path = path

    def close(self) -> None:
        """Remove the spill files; the fitted bases stay until the bundle is published."""
        self.carry = None
        for path in (self.carry_path, self.writer.work / _TARGET):
            if path is not None:
                unlink(path)
