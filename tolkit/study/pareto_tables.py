"""Tables at hand while a frontier is measured: the model's own, and what became of it.

V vocabulary, L layers, D hidden, n distinct token ids, N rows of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.compress.gram import BLOCK_ROWS, GramAccumulator, top_basis
from tolkit.evaluate.runnable import full_float32
from tolkit.model import LayerFfn, RowSource, checkpoint_tensors
from tolkit.parallel import block_pool
from tolkit.sources import CheckpointSource, PlaneReader, TableSource, open_source
from tolkit.study.context import Context
from tolkit.study.pareto_bound import GaussianBound
from tolkit.study.peers import Peer
from tolkit_formats import files

__all__ = ["Bench", "Errors", "SpooledTable"]


class SpooledTable:
    """A table float32 [L, V, D] in a scratch file, rows by token id; a row source.

    Args:
        layers: the model's layers that have a table; the others have no plane.
        num_layers: of the model.
    """

    def __init__(
        self, path: Path, layers: Sequence[int], num_layers: int, vocab_size: int, width: int
    ) -> None:
        self.path = path
        self.layers = tuple(layers)
        self._num_layers = num_layers
        self._planes = files.scratch_array(path, np.float32, (len(layers), vocab_size, width))

    def plane(self, layer: int) -> Tensor:
        """The plane [V, D] itself, backed by the file; writing to it writes there."""
        return torch.from_numpy(self._planes[self.layers.index(layer)])

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """See RowSource."""
        ids = ids_n.cpu()
        planes: list[Tensor | None] = [None] * self._num_layers
        for layer in self.layers:
            planes[layer] = self.plane(layer).index_select(0, ids)
        return planes

    def remove(self) -> None:
        """Delete the file; rows cannot be fetched any more."""
        del self._planes
        files.unlink(self.path)


@dataclass(frozen=True)
class Errors:
    """How far a table is off, rows weighted, as shares of the table's variance.

    Attributes:
        table: sum over layers of |decoded - own|^2. What a plain coder makes small.
        running_sum: sum over layers of |errors of this layer and all before it|^2. What feedback
            over depth makes small: the residual stream sees sums.
    Both are None where the table has no variance. A plain coder's errors of the layers are
    independent, so its running sum is off by (L + 1) / 2 times as much as its table.
    """

    table: float | None
    running_sum: float | None


class Bench:
    """The model's own table with its spectra; made when first asked for, kept in the work folder.

    Disk: 4 V L D bytes, and as much again for each decoded table that waits to be evaluated.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._source = open_source(context.spec.model)
        statuses = self._source.statuses
        self.layers = [i for i, status in enumerate(statuses) if status.status == "kept"]
        self.vocab_size = self._source.vocab_size
        self.width = self._source.hidden_size

    @property
    def values(self) -> int:
        """V x L x D of all layers: what bits per value are relative to."""
        return self.vocab_size * self._source.num_layers * self.width

    @cached_property
    def weights_V(self) -> npt.NDArray[np.float64] | None:
        """Row weights (count + 1)^0.5, 1 on average; None where counts are not known."""
        counts_V = self._source.token_counts_V
        if counts_V is None:
            return None
        weights_V = np.sqrt(counts_V.astype(np.float64) + 1)
        return np.asarray(weights_V / weights_V.mean())

    @cached_property
    def own(self) -> SpooledTable:
        """The model's own table."""
        table, slots_V = self.empty("own"), self._source.slot_of_token_V
        token_at_V = torch.arange(self.vocab_size)
        if slots_V is not None:
            token_at_V = torch.from_numpy(np.argsort(slots_V))
        device, progress = self._context.machine.device, self._context.progress
        threads = self._context.spec.threads if device.type == "cpu" else 1
        with (
            progress.task("table", len(self.layers) * self.vocab_size, "rows") as task,
            block_pool(threads) as pool,
            full_float32(),
        ):
            for layer in self.layers:
                read = _reader(self._source, layer, device, token_at_V)
                plane_VD = table.plane(layer)

                def spool(first: int, read: PlaneReader = read, to_VD: Tensor = plane_VD) -> None:
                    stop = min(first + BLOCK_ROWS, self.vocab_size)
                    to_VD[token_at_V[first:stop]] = read(first, stop).cpu()

                pool.map(spool, range(0, self.vocab_size, BLOCK_ROWS))
                task.advance(self.vocab_size)
        return table

    @cached_property
    def bound(self) -> GaussianBound:
        """Of the model's own table."""
        weights_V = None if self.weights_V is None else torch.from_numpy(self.weights_V)
        spectra = [_variances(self.own.plane(layer), weights_V) for layer in self.layers]
        coded = len(self.layers) / self._source.num_layers
        return GaussianBound(np.concatenate(spectra), self.weights_V, coded)

    def empty(self, name: str) -> SpooledTable:
        """A table to be filled, of the shape of the model's own."""
        path = self._context.work / f"{name}.table"
        return SpooledTable(path, self.layers, self._source.num_layers, self.vocab_size, self.width)

    def stored(self, peer: Peer) -> tuple[SpooledTable, int]:
        """All planes as `peer` gives them back, and the bytes it stores; one plane at a time."""
        table, size_bytes = self.empty(peer.name), 0
        with self._context.progress.task(peer.name, len(self.layers), "planes") as task:
            for layer in self.layers:
                stored = peer.round_trip(self.own.plane(layer))
                table.plane(layer).copy_(stored.plane_VD)
                size_bytes += stored.size_bytes
                task.advance(1)
        return table, size_bytes

    def errors(self, rows: RowSource, device: torch.device) -> Errors:
        """How far these rows of all tokens are from the model's own; ids are given on `device`."""
        table = running_sum = 0.0
        for first in range(0, self.vocab_size, BLOCK_ROWS):
            ids_N = torch.arange(first, min(first + BLOCK_ROWS, self.vocab_size))
            weights_N = torch.ones(len(ids_N), dtype=torch.float64)
            if self.weights_V is not None:
                weights_N = torch.from_numpy(self.weights_V[first : first + BLOCK_ROWS])
            lost_ND = torch.zeros((len(ids_N), self.width))
            with torch.no_grad():
                theirs, ours = rows.fetch(ids_N.to(device)), self.own.fetch(ids_N)
                for layer in self.layers:
                    error_ND = _plane(theirs[layer], lost_ND) - _plane(ours[layer], lost_ND)
                    lost_ND += error_ND
                    table += _energy(error_ND, weights_N)
                    running_sum += _energy(lost_ND, weights_N)
        total = self.bound.variance * self.vocab_size * len(self.layers) * self.width
        if total == 0:
            return Errors(None, None)
        return Errors(table / total, running_sum / total)


def _reader(
    source: TableSource, layer: int, device: torch.device, token_at_V: Tensor
) -> PlaneReader:
    """Rows of a layer by slot; a checkpoint's FFN runs on the device."""
    if device.type == "cpu" or not isinstance(source, CheckpointSource):
        return source.plane(layer)
    ffn = LayerFfn(checkpoint_tensors(source.path), layer, device=device)
    return lambda first, stop: ffn(token_at_V[first:stop])


def _plane(plane_ND: Tensor | None, like_ND: Tensor) -> Tensor:
    """On the CPU in float32; zeros for a layer without a plane."""
    if plane_ND is None:
        return torch.zeros_like(like_ND)
    return plane_ND.to(device="cpu", dtype=torch.float32)


def _energy(rows_ND: Tensor, weights_N: Tensor) -> float:
    """Weighted sum of squares."""
    return float(weights_N @ rows_ND.double().square().sum(1))


def _variances(plane_VD: Tensor, weights_V: Tensor | None) -> npt.NDArray[np.float64]:
    """Variances along the principal directions of a plane: float64 [D], falling."""
    gram = GramAccumulator(plane_VD.shape[1], product_dtype=torch.float64)
    gram.add(plane_VD, weights_V)
    if weights_V is None:
        weights_V = torch.ones(len(plane_VD), dtype=torch.float64)
    mean_D = torch.zeros(plane_VD.shape[1], dtype=torch.float64)
    for first in range(0, len(plane_VD), BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        mean_D += weights_V[rows] @ plane_VD[rows].double()
    total = float(weights_V.sum())
    mean_D /= total
    covariance_DD = gram.gram_DD() / total - torch.outer(mean_D, mean_D)
    energies_D = top_basis(covariance_DD, 1).energies_D.numpy()
    # What is left of directions that do not vary is rounding.
    floor = 1e-12 * float(gram.gram_DD().diagonal().max()) / total
    return np.where(energies_D > floor, energies_D, 0.0)
