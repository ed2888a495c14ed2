"""A bundle against the tables it was made from: both errors of every layer, computed anew.

V vocabulary, D hidden, N rows of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.compress.encode import WORK_ROWS
from tolkit.compress.running import squares
from tolkit.errors import BundleError
from tolkit.origin import require_same_sources
from tolkit.progress import Progress, TqdmProgress
from tolkit.sources import TableSource, open_source
from tolkit_formats.layer_errors import ErrorSums, stood_for
from tolkit_formats.reader import Bundle, open_bundle

__all__ = ["TableCheck", "TablesReport", "verify_tables"]

_RUN_ROWS = 16  # of a sample: neighbours in slot order, one product of a block serves them
# What another machine's rounding may change in a figure.
_RELATIVE_ROUNDING = 1e-3
_ABSOLUTE_ROUNDING = 3e-6


@dataclass(frozen=True)
class TableCheck:
    """Errors of one original layer against the reference, as tolkit_formats.layer_errors has it."""

    layer: int
    relative_error: float | None
    running_sum_error: float | None


@dataclass(frozen=True)
class TablesReport:
    """What `verify_tables` found.

    Attributes:
        num_rows: tokens compared: of partial tables those that have a record.
        num_agreeing: recorded figures that were computed anew and agree; 0 for a sample.
    """

    path: Path
    reference: Path
    num_rows: int
    num_agreeing: int
    layers: tuple[TableCheck, ...]


def verify_tables(
    path: str | Path,
    reference: str | Path,
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> TablesReport:
    """Compare a bundle's rows with the tables of what it was made from.

    Figures of the manifest that are relative to `reference` must come out again; others (of a
    step that read another bundle) are not compared. Memory: WORK_ROWS rows of all layers, twice,
    and one layer's FFN.

    Args:
        reference: the checkpoint, or a bundle of the same checkpoint.
        max_rows: look at this many tokens, spread evenly over the slots in short runs, and
            compare no recorded figure; None looks at all.

    Raises:
        MismatchError: other weights, tokenizer or config.
        BundleError: a record is damaged, or a recorded error is not what it is.
    """
    bundle = open_bundle(path)
    source = open_source(reference)
    require_same_sources(
        bundle.manifest.sources,
        source.sources(),
        where=f"{reference}: is not what {path} was made from",
        hint="give the checkpoint tol build read, or a bundle made from it",
    )
    progress = progress or TqdmProgress()
    sums = [ErrorSums() for _ in range(bundle.num_layers)]
    whole = max_rows is None or max_rows >= bundle.vocab_size
    spans = list(_spans(bundle.vocab_size, None if whole else max_rows))
    num_rows = 0
    slots_V = source.slot_of_token_V
    token_of_slot_V = np.arange(source.vocab_size) if slots_V is None else np.argsort(slots_V)
    planned = sum(stop - first for group in spans for first, stop in group)
    with progress.task("compare", planned, "rows") as task:
        for group in spans:
            tokens_N = np.concatenate([token_of_slot_V[first:stop] for first, stop in group])
            num_rows += _count(bundle, source, group, tokens_N, sums)
            task.advance(len(tokens_N))
    found = tuple(TableCheck(i, s.relative, s.running_sum) for i, s in enumerate(sums))
    agreeing = _require_recorded(bundle, source, found) if whole else 0
    return TablesReport(bundle.path, source.path, num_rows, agreeing, found)


def _spans(vocab_size: int, max_rows: int | None) -> Iterator[list[tuple[int, int]]]:
    """Runs of slots to read together, at most WORK_ROWS rows at a time."""
    if max_rows is None:
        for first in range(0, vocab_size, WORK_ROWS):
            yield [(first, min(first + WORK_ROWS, vocab_size))]
        return
    count = -(-max_rows // _RUN_ROWS)
    length = -(-max_rows // count)
    firsts = np.linspace(0, vocab_size - length, count).astype(np.int64).tolist()
    runs = [(first, first + length) for first in firsts]
    # Runs overlap where nearly all tokens are asked for: each is counted once.
    runs = [(max(a, end), b) for (a, b), (_, end) in zip(runs, [(0, 0), *runs], strict=False)]
    runs = [(a, b) for a, b in runs if a < b]
    for i in range(0, len(runs), WORK_ROWS // _RUN_ROWS):
        yield runs[i : i + WORK_ROWS // _RUN_ROWS]


def _count(
    bundle: Bundle,
    source: TableSource,
    spans: list[tuple[int, int]],
    tokens_N: npt.NDArray[np.int64],
    sums: list[ErrorSums],
) -> int:
    """Add the rows in the reference's slots `spans`, those of `tokens_N`, to every layer's sums.

    Returns:
        how many of them have a record.
    """
    has_record_N = bundle.has_record(tokens_N)
    if not has_record_N.any():
        return 0
    tokens_N = tokens_N[has_record_N]
    here = torch.from_numpy(np.flatnonzero(has_record_N))
    stored_NLD = torch.from_numpy(bundle.rows(tokens_N))
    kept = {layer: i for i, layer in enumerate(bundle.layer_ids)}
    zero_ND = torch.zeros(len(tokens_N), bundle.hidden_size)
    tables: dict[int, Tensor] = {}
    for layer, status in enumerate(source.statuses):
        if status.status == "kept":
            reader = source.plane(layer)
            tables[layer] = torch.cat([reader(*span) for span in spans])[here]
    total_ND, off_ND = zero_ND.clone(), zero_ND.clone()
    for layer, layer_sums in enumerate(sums):
        plane_ND = stored_NLD[:, kept[layer]] if layer in kept else zero_ND
        members = stood_for(bundle.manifest.layers, layer)
        own_ND = sum((tables[i] for i in members if i in tables), zero_ND)
        total_ND += tables.get(layer, zero_ND)
        off_ND += plane_ND - tables.get(layer, zero_ND)
        parts = (own_ND, plane_ND - own_ND, total_ND, off_ND)
        layer_sums.add(ErrorSums(*(squares(part_ND) for part_ND in parts)))
    return len(tokens_N)


def _require_recorded(bundle: Bundle, source: TableSource, found: Sequence[TableCheck]) -> int:
    """How many recorded figures relative to the source's tables agree; BundleError if one does
    not."""
    steps = {i for i, s in enumerate(bundle.manifest.history) if s.parent == source.identity}
    agreeing = 0
    for said in bundle.manifest.encoding.errors:
        check = found[said.layer]
        if said.relative is not None and said.relative_step in steps:
            _require_close(bundle, source, said.layer, "error", check.relative_error, said.relative)
            agreeing += 1
        if said.running_sum is not None and said.running_sum_step in steps:
            what = "error of the running sum"
            is_now = check.running_sum_error
            _require_close(bundle, source, said.layer, what, is_now, said.running_sum)
            agreeing += 1
    return agreeing


def _require_close(
    bundle: Bundle, source: TableSource, layer: int, what: str, is_now: float | None, said: float
) -> None:
    if is_now is not None and abs(is_now - said) <= _ABSOLUTE_ROUNDING + _RELATIVE_ROUNDING * said:
        return
    got = "unknown" if is_now is None else f"{is_now:.6g}"
    raise BundleError(
        f"{bundle.path}: layer {layer}: {what} is {got} against {source.path}, "
        f"expected {said:.6g} as tol.json says",
        hint="the tables are not what their manifest says: make the bundle again",
    )
