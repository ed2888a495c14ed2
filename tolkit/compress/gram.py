"""The best rank-R basis of a plane: a streamed Gram matrix and its top eigenvectors.

N rows in a batch, D values a row, R rank.
The right singular vectors of a plane are the eigenvectors of its Gram matrix, whose size does not
depend on the number of rows; truncating to the first R of them is the best rank-R approximation
(Eckart-Young).

Precision: products of 1,024-row blocks are taken in `product_dtype` and summed in float64. float32
products take 0.4 of the time and blur singular values below about 1e-4 of the largest one: where
the truncated energy is above 1e-4 of the total, the truncation error is within 1e-3 of the best,
and in every spectrum tried rounding the basis to f16 costs more. float64 products resolve singular
values down to 1e-8 of the largest. The eigenvectors are found in float64, on one thread: LAPACK's
bits depend on its number of threads.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from tolkit.errors import NonFiniteError, UsageError
from tolkit.parallel import one_intra_op_thread

__all__ = ["BLOCK_ROWS", "Basis", "CrossAccumulator", "GramAccumulator", "top_basis"]

BLOCK_ROWS = 1024
_TILE_ROWS = 96
_TILE_COLUMNS = 1024


class GramAccumulator:
    """Sums rows^T @ diag(weights) @ rows over batches of rows.

    The bits of the sum depend on the rows, on the batches they came in where those are not
    multiples of BLOCK_ROWS, and on `product_dtype`; never on the number of threads.
    Holds one float64 [D, D] and, while adding, a block's copy and a tile a thread.

    Args:
        width: D.
        pool: of `tolkit.parallel.BlockPool`, for tiles side by side; None runs them one by one.
        product_dtype: float32 or float64, the precision of a block's products.
        device: where the rows will be.
    """

    def __init__(
        self,
        width: int,
        *,
        pool: Executor | None = None,
        product_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._pool = pool
        self._product_dtype = product_dtype
        self._upper_DD = torch.zeros((width, width), dtype=torch.float64, device=device)
        self._tiles = _upper_tiles(width)

    def add(self, rows_ND: Tensor, weights_N: Tensor | None = None) -> None:
        """Add float32 [N, D] rows, each counted `weights_N` (>= 0) times; None counts once."""
        for start in range(0, len(rows_ND), BLOCK_ROWS):
            block_nD = rows_ND[start : start + BLOCK_ROWS].to(self._product_dtype)
            if weights_N is not None:
                root_n = weights_N[start : start + BLOCK_ROWS].double().sqrt()
                block_nD = block_nD * root_n.to(self._product_dtype)[:, None]
            self._add_block(block_nD)

    def gram_DD(self) -> Tensor:
        """The sum so far: symmetric float64 [D, D], a copy."""
        gram_DD = self._upper_DD.triu()
        gram_DD += gram_DD.triu(1).T
        return gram_DD

    def _add_block(self, block_nD: Tensor) -> None:
        def add_tile(tile: tuple[slice, slice]) -> None:
            self._upper_DD[tile] += block_nD[:, tile[0]].T @ block_nD[:, tile[1]]

        if self._pool is not None:
            for _ in self._pool.map(add_tile, self._tiles):
                pass
            return
        with one_intra_op_thread():
            for tile in self._tiles:
                add_tile(tile)


class CrossAccumulator:
    """Sums left^T @ diag(weights) @ right over batches of rows, as `GramAccumulator` does.

    Holds one float64 [C, D] for rows of C and D values.
    """

    def __init__(self, left_width: int, right_width: int, *, pool: Executor | None = None) -> None:
        self._pool = pool
        self._sum_CD = torch.zeros((left_width, right_width), dtype=torch.float64)

    def add(self, left_NC: Tensor, right_ND: Tensor, weights_N: Tensor) -> None:
        """Add float32 rows, each pair counted `weights_N` (>= 0) times."""
        for start in range(0, len(left_NC), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            left_nC = left_NC[rows] * weights_N[rows].float()[:, None]
            self._add_block(left_nC, right_ND[rows])

    def sum_CD(self) -> Tensor:
        """The sum so far: float64 [C, D]."""
        return self._sum_CD

    def _add_block(self, left_nC: Tensor, right_nD: Tensor) -> None:
        def add_strip(top: int) -> None:
            strip = slice(top, top + _TILE_ROWS)
            self._sum_CD[strip] += left_nC[:, strip].T @ right_nD

        strips = range(0, len(self._sum_CD), _TILE_ROWS)
        if self._pool is not None:
            for _ in self._pool.map(add_strip, strips):
                pass
            return
        with one_intra_op_thread():
            for top in strips:
                add_strip(top)


@dataclass(frozen=True)
class Basis:
    """The top of a plane's spectrum.

    Attributes:
        basis_RD: float32 [R, D], orthonormal rows by falling energy; in each row the entry of
            largest magnitude is positive.
        energies_D: float64 [D], all eigenvalues of the Gram matrix, falling, none negative: the
            squares of the plane's singular values.
    """

    basis_RD: Tensor
    energies_D: Tensor

    @property
    def explained_energy(self) -> float:
        """What the R kept directions hold of `total_energy`."""
        return float(self.energies_D[: len(self.basis_RD)].sum())

    @property
    def total_energy(self) -> float:
        """Sum of squares of all (weighted) values."""
        return float(self.energies_D.sum())


def top_basis(gram_DD: Tensor, rank: int) -> Basis:
    """The `rank` leading eigenvectors of a Gram matrix.

    Needs about four matrices of the size of `gram_DD` while it runs.

    Args:
        gram_DD: float64 [D, D], symmetric, positive semi-definite up to rounding.
        rank: 1..D; beyond the matrix's own rank the basis is completed by arbitrary orthonormal
            rows.

    Raises:
        UsageError: `rank` is out of range.
        NonFiniteError: the matrix has NaN or infinite entries.
    """
    width = len(gram_DD)
    if not 1 <= rank <= width:
        raise UsageError(f"rank: expected 1..{width}, got {rank}")
    if not bool(torch.isfinite(gram_DD).all()):
        raise NonFiniteError("Gram matrix: expected finite entries, got NaN or infinity")
    with one_intra_op_thread():
        energies_D, vectors_DD = torch.linalg.eigh(gram_DD)
    basis_RD = vectors_DD.T[width - rank :].float().flip(0)
    peak_R1 = basis_RD.abs().argmax(dim=1, keepdim=True)
    basis_RD *= basis_RD.gather(1, peak_R1).sign()
    return Basis(basis_RD.contiguous(), energies_D.flip(0).clamp(min=0))


def _upper_tiles(width: int) -> list[tuple[slice, slice]]:
    """Tiles that cover the upper triangle of [D, D], the largest first.

    Flat strips: of the shapes tried, the least work below the diagonal at full matmul speed.
    """
    tiles = []
    for top in range(0, width, _TILE_ROWS):
        down = slice(top, min(top + _TILE_ROWS, width))
        for left in range(top, width, _TILE_COLUMNS):
            tiles.append((down, slice(left, min(left + _TILE_COLUMNS, width))))
    return sorted(tiles, key=_tile_area, reverse=True)


def _tile_area(tile: tuple[slice, slice]) -> int:
    down, across = tile
    return int((down.stop - down.start) * (across.stop - across.start))
