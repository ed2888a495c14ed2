"""Streamed Gram and top eigenvectors against a full float64 SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tolkit.compress.gram import BLOCK_ROWS, GramAccumulator, top_basis
from tolkit.errors import NonFiniteError, UsageError
from tolkit.parallel import block_pool, one_intra_op_thread, usable_cpus


def gram_of(
    rows_ND: torch.Tensor,
    weights_N: torch.Tensor | None = None,
    product_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    accumulator = GramAccumulator(rows_ND.shape[1], product_dtype=product_dtype)
    accumulator.add(rows_ND, weights_N)
    return accumulator.gram_DD()


def rows_with_spectrum(singular_D: torch.Tensor, num_rows: int) -> torch.Tensor:
    """float64 [N, D] with exactly these singular values."""
    generator = torch.Generator().manual_seed(0)
    width = len(singular_D)
    left = torch.randn((num_rows, width), generator=generator, dtype=torch.float64)
    right = torch.randn((width, width), generator=generator, dtype=torch.float64)
    return (torch.linalg.qr(left)[0] * singular_D) @ torch.linalg.qr(right)[0]


def truncation_error(rows_ND: torch.Tensor, basis_RD: torch.Tensor) -> float:
    basis_RD = basis_RD.double()
    rows_ND = rows_ND.double()
    return float((rows_ND - (rows_ND @ basis_RD.T) @ basis_RD).norm())


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 5, 95, 96, 97, 300, 1100])
@pytest.mark.parametrize("weighted", [False, True])
def test_gram_equals_the_sum_of_outer_products(
    width: int, weighted: bool, product_dtype: torch.dtype
) -> None:
    num_rows = 150 if width > 1000 else BLOCK_ROWS + 50
    generator = torch.Generator().manual_seed(width)
    rows_ND = torch.randn((num_rows, width), generator=generator)
    weights_N = torch.rand(num_rows, generator=generator, dtype=torch.float64) * 9
    gram_DD = gram_of(rows_ND, weights_N if weighted else None, product_dtype)
    exact_DD = np.zeros((width, width))
    for row_D, weight in zip(rows_ND.double().numpy(), weights_N.tolist(), strict=True):
        exact_DD += np.outer(row_D, row_D) * (weight if weighted else 1.0)
    assert gram_DD.dtype == torch.float64
    assert torch.equal(gram_DD, gram_DD.T)
    error = np.abs(gram_DD.numpy() - exact_DD).max() / np.abs(exact_DD).max()
    assert error < (1e-6 if product_dtype == torch.float32 else 1e-13)


def test_sums_are_float64_over_many_blocks() -> None:
    """A large block first, then ones a float32 sum would lose entirely."""
    accumulator = GramAccumulator(2)
    accumulator.add(torch.full((1, 2), 1e4))
    for _ in range(50):
        accumulator.add(torch.ones((1, 2)))
    assert accumulator.gram_DD().tolist() == [[1e8 + 50, 1e8 + 50]] * 2


def test_threads_and_aligned_batches_do_not_change_a_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    rows_ND = torch.randn((2 * BLOCK_ROWS + 77, 260), generator=generator)
    weights_N = torch.rand(len(rows_ND), generator=generator, dtype=torch.float64)
    alone_DD = gram_of(rows_ND, weights_N)
    for num_threads in (1, 2, 5):
        with block_pool(num_threads) as blocks:
            pool = blocks.executor
            accumulator = GramAccumulator(260, pool=pool)
            for start in range(0, len(rows_ND), BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                accumulator.add(rows_ND[block], weights_N[block])
            assert torch.equal(accumulator.gram_DD(), alone_DD)


def test_intra_op_threads_do_not_change_the_basis() -> None:
    gram_DD = gram_of(torch.randn((600, 256), generator=torch.Generator().manual_seed(2)))
    before = torch.get_num_threads()
    try:
        bases = []
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            bases.append(top_basis(gram_DD, 100))
            assert torch.get_num_threads() == num_threads
        assert torch.equal(bases[0].basis_RD, bases[1].basis_RD)
        assert torch.equal(bases[0].energies_D, bases[1].energies_D)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rank", [1, 2, 31, 64])
def test_basis_is_orthonormal_signed_and_as_good_as_svd(rank: int) -> None:
    generator = torch.Generator().manual_seed(3)
    rows_ND = torch.randn((500, 64), generator=generator) * torch.logspace(0, -2, 64)
    basis = top_basis(gram_of(rows_ND), rank)
    assert basis.basis_RD.shape == (rank, 64)
    assert basis.basis_RD.dtype == torch.float32 and basis.basis_RD.is_contiguous()
    identity = basis.basis_RD.double() @ basis.basis_RD.double().T
    assert torch.allclose(identity, torch.eye(rank, dtype=torch.float64), atol=1e-6)
    for row_D in basis.basis_RD:
        assert row_D[row_D.abs().argmax()] > 0

    singular_D = torch.linalg.svdvals(rows_ND.double())
    assert torch.allclose(basis.energies_D.sqrt(), singular_D, rtol=1e-5)
    assert basis.total_energy == pytest.approx(float(rows_ND.double().square().sum()), rel=1e-6)
    assert basis.explained_energy == pytest.approx(
        float(singular_D[:rank].square().sum()), rel=1e-6
    )
    best = float(singular_D[rank:].square().sum().sqrt())
    assert truncation_error(rows_ND, basis.basis_RD) == pytest.approx(best, rel=1e-5, abs=1e-4)


def test_weighted_basis_is_the_svd_of_weighted_rows() -> None:
    generator = torch.Generator().manual_seed(4)
    rows_ND = torch.randn((400, 30), generator=generator)
    weights_N = torch.rand(400, generator=generator, dtype=torch.float64) ** 4
    basis_RD = top_basis(gram_of(rows_ND, weights_N), 5).basis_RD.double()
    _, _, right_DD = torch.linalg.svd(rows_ND.double() * weights_N.sqrt()[:, None])
    overlap = (basis_RD @ right_DD[:5].T).abs()
    assert torch.allclose(overlap, torch.eye(5, dtype=torch.float64), atol=1e-4)


# (decades the spectrum falls over, rank of 256, precision of products, agreement reached)
STEEP = [
    (1, 128, torch.float32, 1e-6),
    (3, 128, torch.float32, 1e-6),
    (3, 192, torch.float32, 1e-4),
    (4, 128, torch.float32, 1e-4),
    (4, 192, torch.float32, 1e-3),
    (5, 128, torch.float32, 1e-4),
    (4, 255, torch.float64, 1e-4),
    (5, 192, torch.float64, 1e-4),
    (6, 192, torch.float64, 1e-4),
]


@pytest.mark.parametrize(("decades", "rank", "product_dtype", "agreement"), STEEP)
def test_truncation_error_on_steep_spectra(
    decades: int, rank: int, product_dtype: torch.dtype, agreement: float
) -> None:
    singular_D = torch.logspace(0, -decades, 256, dtype=torch.float64)
    rows_ND = rows_with_spectrum(singular_D, 1500).float()
    best = float(torch.linalg.svdvals(rows_ND.double())[rank:].square().sum().sqrt())
    basis = top_basis(gram_of(rows_ND, product_dtype=product_dtype), rank)
    assert truncation_error(rows_ND, basis.basis_RD) <= best * (1 + agreement)


@pytest.mark.parametrize("decades", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("rank", [64, 128, 192, 250])
def test_float32_products_cost_less_than_rounding_the_basis(decades: int, rank: int) -> None:
    singular_D = torch.logspace(0, -decades, 256, dtype=torch.float64)
    rows_ND = rows_with_spectrum(singular_D, 1500).float()
    exact = top_basis(gram_of(rows_ND, product_dtype=torch.float64), rank)
    fast = top_basis(gram_of(rows_ND), rank)
    rounded_error = truncation_error(rows_ND, exact.basis_RD.half())
    assert truncation_error(rows_ND, fast.basis_RD) <= rounded_error


def test_rank_deficient_rows_get_a_complete_basis() -> None:
    generator = torch.Generator().manual_seed(5)
    rows_ND = torch.randn((200, 3), generator=generator) @ torch.randn((3, 40), generator=generator)
    basis = top_basis(gram_of(rows_ND), 10)
    identity = basis.basis_RD.double() @ basis.basis_RD.double().T
    assert torch.allclose(identity, torch.eye(10, dtype=torch.float64), atol=1e-6)
    assert truncation_error(rows_ND, basis.basis_RD) < 1e-5 * float(rows_ND.norm())
    assert float(basis.energies_D.min()) >= 0


def test_zero_rows_and_constant_columns() -> None:
    zero = top_basis(gram_of(torch.zeros((10, 8))), 8)
    assert torch.isfinite(zero.basis_RD).all() and zero.total_energy == 0.0
    constant = top_basis(gram_of(torch.full((10, 4), 2.0)), 1)
    assert torch.allclose(constant.basis_RD, torch.full((1, 4), 0.5))
    assert constant.explained_energy == pytest.approx(160.0)


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_a_rank_outside_the_width_is_refused(rank: int) -> None:
    with pytest.raises(UsageError, match=r"rank: expected 1\.\.4"):
        top_basis(torch.eye(4, dtype=torch.float64), rank)


def test_a_gram_that_overflowed_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="Gram"):
        top_basis(gram_of(torch.full((4, 4), 1e30)), 2)


def test_thread_helpers() -> None:
    before = torch.get_num_threads()
    with block_pool(2) as pool:
        assert pool.map(lambda _: torch.get_num_threads(), range(4)) == [1] * 4
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with one_intra_op_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    assert usable_cpus() >= 1
