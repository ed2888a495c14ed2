"""Encoders against naive loops: raw, int8, int4, nf4, fp4, svd; errors; threads.

Oracles work value by value in Python floats, rounding to float32 and float16 through `struct`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tolkit.compress.codecs import encoder_for
from tolkit.errors import NonFiniteError
from tolkit.parallel import block_pool
from tolkit_formats.codecs import Codec, FourBit, Int8, Raw, Svd, codec_from_json
from tolkit_formats.codecs.fourbit import CODE_ORDER, CODEBOOKS

WIDTHS = (64, 128, 100, 1, 63, 65, 1600)
PARAMS = (
    {"name": "raw", "dtype": "f32"},
    {"name": "raw", "dtype": "f16"},
    {"name": "raw", "dtype": "bf16"},
    {"name": "int8"},
    {"name": "int4", "group_size": 64},
    {"name": "nf4", "group_size": 64},
    {"name": "fp4", "group_size": 32},
)
IDS = ("raw f32", "raw f16", "raw bf16", "int8", "int4", "nf4", "fp4")


def f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def f16(value: float) -> float:
    return float(struct.unpack("<e", struct.pack("<e", value))[0])


def pad(segment: bytes) -> bytes:
    return segment + bytes(-len(segment) % 4)


def naive_int8(row: Sequence[float]) -> bytes:
    absmax = max(abs(value) for value in row)
    scale = f16(f32(absmax / 127))
    if absmax > 0 and (scale == 0 or round(f32(absmax / scale)) > 127):
        (bits,) = struct.unpack("<H", struct.pack("<e", scale))
        (scale,) = struct.unpack("<e", struct.pack("<H", bits + 1))
    codes = [round(f32(value / scale)) if scale else 0 for value in row]
    return pad(struct.pack("<e", scale)) + pad(struct.pack(f"<{len(codes)}b", *codes))


def naive_four_bit(row: Sequence[float], name: str, group_size: int) -> bytes:
    codebook = [float(value) for value in CODEBOOKS[name]]
    order = CODE_ORDER[name]
    middles = [f32(f32(codebook[a] + codebook[b]) / 2) for a, b in pairwise(order)]
    scales, codes = [], []
    for start in range(0, len(row), group_size):
        group = row[start : start + group_size]
        absmax = max(abs(value) for value in group)
        inverse = f32(1 / max(absmax, f32(1e-38)))
        scales.append(absmax)
        for value in group:
            scaled = f32(value * inverse)
            if name == "int4":
                codes.append(round(f32(scaled * 7)) + 8)
            else:
                codes.append(order[sum(scaled > middle for middle in middles)])
    codes += [0] * (len(codes) % 2)
    packed = bytes(
        16 * first + second for first, second in zip(codes[::2], codes[1::2], strict=True)
    )
    return struct.pack(f"<{len(scales)}f", *scales) + pad(packed)


def naive_raw(row: Sequence[float], dtype: str) -> bytes:
    if dtype == "f32":
        return struct.pack(f"<{len(row)}f", *row)
    if dtype == "f16":
        return pad(struct.pack(f"<{len(row)}e", *row))
    halves = []
    for value in row:
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        upper, lower = bits >> 16, bits & 0xFFFF
        halves.append(upper + (lower > 0x8000 or (lower == 0x8000 and upper % 2 == 1)))
    return pad(struct.pack(f"<{len(halves)}H", *halves))


def naive_plane(rows_ND: torch.Tensor, codec: Codec) -> np.ndarray:
    planes = []
    for row in rows_ND.tolist():
        if isinstance(codec, Int8):
            planes.append(naive_int8(row))
        elif isinstance(codec, FourBit):
            planes.append(naive_four_bit(row, codec.name, codec.group_size))
        else:
            assert isinstance(codec, Raw)
            planes.append(naive_raw(row, codec.dtype))
    return np.frombuffer(b"".join(planes), np.uint8).reshape(len(planes), -1)


def error_bound(rows_ND: np.ndarray, codec: Codec) -> np.ndarray:
    """The largest error each value may have: half the widest gap between decoded values."""
    size_ND = np.abs(rows_ND.astype(np.float64))
    if isinstance(codec, Raw):
        relative, absolute = {
            "f32": (0.0, 0.0),
            "f16": (2.0**-11, 2.0**-25),
            "bf16": (2.0**-8, 2.0**-134),
        }[codec.dtype]
        return np.maximum(size_ND * relative, absolute)
    if isinstance(codec, Int8):
        # Half a step, the step itself up to one part in 2**11 or one subnormal f16 too wide.
        step_N1 = size_ND.max(axis=1, keepdims=True) / 127 * (1 + 2.0**-10) + 2.0**-24
        return np.broadcast_to(step_N1 * (0.5 + 1e-4), size_ND.shape)
    assert isinstance(codec, FourBit)
    values = np.sort(CODEBOOKS[codec.name][1 if codec.name == "int4" else 0 :].astype(np.float64))
    half_gap = np.diff(values).max() / 2 * (1 + 1e-5)
    bound_ND = np.empty_like(size_ND)
    for start in range(0, codec.width, codec.group_size):
        group = slice(start, start + codec.group_size)
        absmax_N1 = size_ND[:, group].max(axis=1, keepdims=True)
        # Below MIN_ABSMAX a group is flushed towards zero.
        bound_ND[:, group] = np.where(absmax_N1 < 1.2e-38, absmax_N1, absmax_N1 * half_gap)
    return bound_ND


def assert_bits_equal(left_ND: np.ndarray, right_ND: np.ndarray) -> None:
    assert left_ND.dtype == right_ND.dtype == np.float32
    assert np.array_equal(left_ND.view(np.uint32), right_ND.view(np.uint32))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("params", PARAMS, ids=IDS)
def test_bytes_equal_a_naive_loop(params: dict[str, object], width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows_ND = torch.randn((9, width), generator=generator)
    rows_ND *= 10.0 ** torch.linspace(-4, 3, 9)[:, None]
    rows_ND[4] = 0.0
    rows_ND[5] = -1.5
    codec = codec_from_json(params, width)
    before = rows_ND.clone()
    plane_NB, decoded_ND = encoder_for(codec).encode(rows_ND, {})
    assert torch.equal(rows_ND, before), "the target was changed"
    assert np.array_equal(plane_NB.numpy(), naive_plane(rows_ND, codec))
    assert_bits_equal(decoded_ND.numpy(), codec.decode(plane_NB.numpy(), {}))
    codec.check(plane_NB.numpy())


finite_rows = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=140).map(
        lambda shape: (1 + shape[0] % 3, shape[1])
    ),
    elements=st.floats(-60000, 60000, width=32) | st.floats(-(2.0**-14), 2.0**-14, width=32),
)


@settings(max_examples=60, deadline=None)
@given(rows_ND=finite_rows, params=st.sampled_from(PARAMS))
def test_round_trip_of_any_rows(rows_ND: np.ndarray, params: dict[str, object]) -> None:
    codec = codec_from_json(params, rows_ND.shape[1])
    plane_NB, decoded_ND = encoder_for(codec).encode(torch.from_numpy(rows_ND), {})
    codec.check(plane_NB.numpy())
    assert np.array_equal(plane_NB.numpy(), naive_plane(torch.from_numpy(rows_ND), codec))
    assert_bits_equal(decoded_ND.numpy(), codec.decode(plane_NB.numpy(), {}))
    error_ND = np.abs(decoded_ND.numpy().astype(np.float64) - rows_ND)
    assert (error_ND <= error_bound(rows_ND, codec)).all()


@pytest.mark.parametrize("params", PARAMS[3:], ids=IDS[3:])
def test_encoding_what_was_decoded_keeps_the_values(params: dict[str, object]) -> None:
    rows_ND = torch.randn((8, 200), generator=torch.Generator().manual_seed(1))
    encoder = encoder_for(codec_from_json(params, 200))
    _, once_ND = encoder.encode(rows_ND, {})
    _, twice_ND = encoder.encode(once_ND, {})
    # int8's scale is rounded to f16, so its second pass may move by one part in 2**10.
    tolerance = 1e-3 if params["name"] == "int8" else 1e-6
    assert torch.allclose(once_ND, twice_ND, rtol=tolerance, atol=0)


def test_int8_scales_that_f16_holds_only_as_subnormals() -> None:
    """Tiny rows: rounding the scale to nearest would overflow the codes, so it is rounded up."""
    sizes = torch.logspace(-12, -2, 400)[:, None]
    rows_ND = sizes * torch.tensor([[1.0, -1.0, 0.5, 0.1]])
    codec = Int8(4)
    plane_NB, _ = encoder_for(codec).encode(rows_ND, {})
    assert np.array_equal(plane_NB.numpy(), naive_plane(rows_ND, codec))
    codes_ND = plane_NB[:, 4:8].contiguous().view(torch.int8)
    assert int(codes_ND.min()) >= -127
    scale_N = plane_NB[:, :2].contiguous().view(torch.float16)[:, 0].float()
    assert (scale_N > rows_ND[:, 0] / 127 * (1 + 2.0**-11)).any(), "no scale was rounded up"


@pytest.mark.parametrize("params", PARAMS, ids=IDS)
def test_no_rows_give_no_bytes(params: dict[str, object]) -> None:
    codec = codec_from_json(params, 70)
    plane_NB, decoded_ND = encoder_for(codec).encode(torch.empty((0, 70)), {})
    assert plane_NB.shape == (0, sum(codec.segments()))
    assert decoded_ND.shape == codec.decode(plane_NB.numpy(), {}).shape == (0, 70)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", PARAMS, ids=IDS)
def test_non_finite_values_are_named(params: dict[str, object], bad: float) -> None:
    rows_ND = torch.ones((2000, 100))
    rows_ND[1900, 77] = bad
    rows_ND[1950, 3] = bad
    with pytest.raises(NonFiniteError, match="row 1900, column 77") as caught:
        encoder_for(codec_from_json(params, 100)).encode(rows_ND, {})
    assert (caught.value.row, caught.value.column) == (1900, 77)


@pytest.mark.parametrize(
    ("codec", "value"),
    [
        (Raw(5, "f16"), 65505.0),
        (Raw(5, "f16"), -1e9),
        (Raw(5, "bf16"), 3.4e38),
        (Int8(5), 127 * 65520.0),
        (Int8(5), -1e38),
    ],
)
def test_values_a_codec_cannot_hold_are_named(codec: Codec, value: float) -> None:
    rows_ND = torch.ones((3, 5))
    rows_ND[1, 4] = value
    with pytest.raises(NonFiniteError, match="row 1, column 4"):
        encoder_for(codec).encode(rows_ND, {})


@pytest.mark.parametrize(
    ("codec", "value"),
    [(Raw(5, "f16"), -65504.0), (Raw(5, "bf16"), 3.38e38), (Int8(5), 127 * 65500.0)],
)
def test_the_largest_values_a_codec_holds(codec: Codec, value: float) -> None:
    rows_ND = torch.ones((3, 5))
    rows_ND[1, 4] = value
    _, decoded_ND = encoder_for(codec).encode(rows_ND, {})
    assert math.isclose(float(decoded_ND[1, 4]), value, rel_tol=2.0**-8)


@pytest.mark.parametrize("params", PARAMS, ids=IDS)
def test_threads_and_batches_do_not_change_a_bit(params: dict[str, object]) -> None:
    rows_ND = torch.randn((300, 1000), generator=torch.Generator().manual_seed(2))
    encoder = encoder_for(codec_from_json(params, 1000))
    whole_NB, _ = encoder.encode(rows_ND, {})
    with block_pool(3) as pool:
        parts = pool.map(lambda part: encoder.encode(part, {})[0], rows_ND.split(37))
        assert torch.equal(torch.cat(list(parts)), whole_NB)


def orthonormal_basis(rank: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    square = torch.randn((width, width), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square)[0][:rank].half()


@pytest.mark.parametrize("rank", [1, 20, 100])
@pytest.mark.parametrize("inner", PARAMS, ids=IDS)
def test_svd_encodes_the_coefficients_and_expands_them(inner: dict[str, object], rank: int) -> None:
    width = 100
    basis_RD = orthonormal_basis(rank, width)
    rows_ND = torch.randn((40, width), generator=torch.Generator().manual_seed(3))
    codec = codec_from_json({"name": "svd", "rank": rank, "inner": inner}, width)
    assert isinstance(codec, Svd)
    plane_NB, decoded_ND = encoder_for(codec).encode(rows_ND, {"basis": basis_RD})
    codec.check(plane_NB.numpy())

    exact_NR = rows_ND.double() @ basis_RD.double().T
    coeffs_NR = torch.from_numpy(codec.inner.decode(plane_NB.numpy(), {}))
    bound_NR = error_bound(exact_NR.numpy(), codec.inner) + 1e-5
    assert (np.abs(coeffs_NR.double().numpy() - exact_NR.numpy()) <= bound_NR).all()

    expanded_ND = coeffs_NR.double() @ basis_RD.double()
    norm_N = rows_ND.double().norm(dim=1)
    numpy_ND = codec.decode(plane_NB.numpy(), {"basis": basis_RD.numpy()})
    for rows in (decoded_ND.double(), torch.from_numpy(numpy_ND).double()):
        assert ((rows - expanded_ND).norm(dim=1) <= 1e-6 * norm_N).all()
    widened = codec.decode(plane_NB.numpy(), {"basis": basis_RD.float().numpy()})
    assert np.array_equal(widened, numpy_ND)


def test_svd_of_full_rank_gives_the_rows_back() -> None:
    basis_RD = orthonormal_basis(64, 64)
    rows_ND = torch.randn((30, 64), generator=torch.Generator().manual_seed(4))
    codec = Svd(64, Raw(64, "f32"))
    _, decoded_ND = encoder_for(codec).encode(rows_ND, {"basis": basis_RD})
    error_N = (decoded_ND - rows_ND).norm(dim=1) / rows_ND.norm(dim=1)
    assert float(error_N.max()) < 2e-3, "more than rounding the basis to f16 explains"


def test_svd_names_the_value_not_the_coefficient() -> None:
    encoder = encoder_for(Svd(8, Int8(2)))
    rows_ND = torch.ones((5, 8))
    rows_ND[3, 6] = math.nan
    with pytest.raises(NonFiniteError, match="row 3, column 6"):
        encoder.encode(rows_ND, {"basis": orthonormal_basis(2, 8)})


def test_svd_names_coefficients_the_inner_codec_cannot_hold() -> None:
    encoder = encoder_for(Svd(8, Raw(2, "f16")))
    rows_ND = torch.ones((5, 8))
    rows_ND[3] = 1e6
    with pytest.raises(NonFiniteError, match="svd coefficients: row 3") as caught:
        encoder.encode(rows_ND, {"basis": orthonormal_basis(2, 8)})
    assert (caught.value.row, caught.value.column) == (3, None)
