"""`diff`: how two bundles differ, in layout, in origin and in the values a reader gets.

Letters: N sampled tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tolkit_formats.codecs import codec_label
from tolkit_formats.errors import MismatchError
from tolkit_formats.layer_errors import ErrorSums, stood_for
from tolkit_formats.reader import Bundle

__all__ = ["BundleDiff", "LayerDiff", "diff"]

_ROWS = 128  # decoded at a time: 25 MB of float32 a bundle at the 1B shape


@dataclass(frozen=True)
class LayerDiff:
    """One original layer in both bundles.

    The errors are `layer_errors.LayerErrors`, a taken as right: of b's plane against a's tables
    of all layers it stands for, and of the sums up to this layer. None where a's are zero.
    """

    layer: int
    stored_a: str
    stored_b: str
    relative_error: float | None
    running_sum_error: float | None


@dataclass(frozen=True)
class BundleDiff:
    """Everything `diff` compared: of partial tables the tokens that have a record in both.

    `equal` means that readers get the same bits.
    """

    same_identity: bool
    same_sources: bool
    equal: bool
    num_rows: int
    table_bytes_a: int
    table_bytes_b: int
    layers: tuple[LayerDiff, ...]


def diff(
    a: Bundle,
    b: Bundle,
    *,
    max_rows: int | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> BundleDiff:
    """Compare two bundles of one shape, row by row.

    Args:
        a: the bundle taken as right.
        b: the other one.
        max_rows: compare at most this many evenly spaced tokens; None compares all.
        on_rows: called with the number of tokens just compared.

    Raises:
        MismatchError: V, L or D differ.
        BundleError: a record is damaged.
    """
    shape_a, shape_b = ((x.vocab_size, x.num_layers, x.hidden_size) for x in (a, b))
    if shape_a != shape_b:
        raise MismatchError(
            f"{b.path}: is {list(shape_b)} (tokens, layers, width), {a.path} is {list(shape_a)}"
        )
    vocab_size, num_layers, hidden_size = shape_a
    count = vocab_size if max_rows is None else min(max_rows, vocab_size)
    ids = np.unique(np.linspace(0, vocab_size - 1, count).astype(np.int64))
    sums = [ErrorSums() for _ in range(num_layers)]
    same_sources = a.manifest.sources == b.manifest.sources
    in_a, in_b = a.has_record(ids), b.has_record(ids)
    equal = a.layer_ids == b.layer_ids and np.array_equal(in_a, in_b)
    if not in_a.all():  # the rows of the others are functions of the sources
        equal = equal and same_sources and a.manifest.layers == b.manifest.layers
    if on_rows is not None:
        on_rows(int((~(in_a & in_b)).sum()))
    ids = ids[in_a & in_b]
    for start in range(0, len(ids), _ROWS):
        part = ids[start : start + _ROWS]
        rows_a, rows_b = a.rows(part), b.rows(part)
        equal = equal and np.array_equal(rows_a, rows_b)
        sum_a = np.zeros((len(part), hidden_size), np.float32)
        sum_off = np.zeros_like(sum_a)
        for layer in range(num_layers):
            plane_a, plane_b = _plane(a, rows_a, layer), _plane(b, rows_b, layer)
            table = np.zeros_like(plane_a)
            for member in stood_for(b.manifest.layers, layer):
                table += _plane(a, rows_a, member)
            sum_a += plane_a
            sum_off += plane_b - plane_a
            parts = (table, plane_b - table, sum_a, sum_off)
            sums[layer].add(ErrorSums(*(_squares(part) for part in parts)))
        if on_rows is not None:
            on_rows(len(part))
    layers = tuple(
        LayerDiff(
            layer,
            _stored(a, layer),
            _stored(b, layer),
            sums[layer].relative,
            sums[layer].running_sum,
        )
        for layer in range(num_layers)
    )
    return BundleDiff(
        same_identity=a.identity == b.identity,
        same_sources=same_sources,
        equal=equal,
        num_rows=len(ids),
        table_bytes_a=a.table_bytes,
        table_bytes_b=b.table_bytes,
        layers=layers,
    )


def _plane(
    bundle: Bundle, rows: np.ndarray[tuple[int, ...], np.dtype[np.float32]], layer: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if layer not in bundle.layer_ids:
        return np.zeros((len(rows), bundle.hidden_size), np.float32)
    return rows[:, bundle.layer_ids.index(layer)]


def _squares(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    """A row in float32, rows in float64."""
    rows = np.einsum("nd,nd->n", values, values)
    return float(rows.sum(dtype=np.float64))


def _stored(bundle: Bundle, layer: int) -> str:
    status = bundle.manifest.layers[layer]
    if status.status == "kept":
        return codec_label(bundle.plane_codec(layer))
    return f"folded into {status.into}" if status.into is not None else "dropped"
