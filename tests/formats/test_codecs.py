"""The numpy half of the codecs: layout, decoding byte by byte, parameters, `check`."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from _bands import bands

from tolkit_formats.codecs import CODECS, Codec, FourBit, Int8, Raw, Svd, codec_from_json
from tolkit_formats.codecs.fourbit import CODE_ORDER, CODEBOOKS, DECISION_BOUNDS
from tolkit_formats.errors import BundleError, UnsupportedVersionError

WIDTHS = (64, 128, 100, 1, 2, 63, 65, 1600)
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


def padded(size_bytes: int) -> int:
    return size_bytes + -size_bytes % 4


def random_plane(codec: Codec, num_rows: int) -> np.ndarray:
    """Bytes an encoder could have written: finite scales, codes of the codebook, zero padding."""
    rng = np.random.default_rng(codec.width)
    shape = (num_rows, codec.width)
    if isinstance(codec, Raw):
        dtype = {"f32": "<f4", "f16": "<f2", "bf16": "<f4"}[codec.dtype]
        payload = rng.normal(size=shape).astype(dtype).view(np.uint8)
        if codec.dtype == "bf16":
            payload = np.ascontiguousarray(payload.view("<u2")[:, 1::2]).view(np.uint8)
        segments = [payload]
    elif isinstance(codec, Int8):
        scales = rng.random((num_rows, 1)).astype("<f2").view(np.uint8)
        codes = rng.integers(-127, 128, shape, dtype=np.int8).view(np.uint8)
        segments = [scales, codes]
    else:
        assert isinstance(codec, FourBit)
        num_groups = -(-codec.width // codec.group_size)
        scales = rng.random((num_rows, num_groups)).astype("<f4").view(np.uint8)
        lowest = 1 if codec.name == "int4" else 0
        codes = rng.integers(lowest, 16, shape, dtype=np.uint8)
        codes = np.pad(codes, ((0, 0), (0, codec.width % 2)))
        segments = [scales, (codes[:, ::2] << 4) | codes[:, 1::2]]
    return np.concatenate(
        [np.pad(part, ((0, 0), (0, -part.shape[1] % 4))) for part in segments], axis=1
    )


def naive_decode(record: bytes, codec: Codec) -> list[float]:
    """One row by the layout's words, a value at a time."""
    values = []
    for i in range(codec.width):
        if isinstance(codec, Raw):
            if codec.dtype == "bf16":
                (value,) = struct.unpack("<f", b"\0\0" + record[2 * i : 2 * i + 2])
            else:
                letter, size = {"f32": ("<f", 4), "f16": ("<e", 2)}[codec.dtype]
                (value,) = struct.unpack(letter, record[size * i : size * i + size])
        elif isinstance(codec, Int8):
            (scale,) = struct.unpack("<e", record[:2])
            (code,) = struct.unpack("<b", record[4 + i : 5 + i])
            value = f32(scale * code)
        else:
            assert isinstance(codec, FourBit)
            group = i // codec.group_size
            (absmax,) = struct.unpack("<f", record[4 * group : 4 * group + 4])
            byte = record[4 * -(-codec.width // codec.group_size) + i // 2]
            code = byte % 16 if i % 2 else byte // 16
            value = f32(float(CODEBOOKS[codec.name][code]) * absmax)
        values.append(value)
    return values


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("params", PARAMS, ids=IDS)
def test_decoding_equals_a_naive_loop(params: dict[str, object], width: int) -> None:
    codec = codec_from_json(params, width)
    plane_NB = random_plane(codec, 5)
    assert plane_NB.shape[1] == sum(codec.segments())
    codec.check(plane_NB)
    rows_ND = codec.decode(plane_NB, {})
    naive_ND = [naive_decode(row.tobytes(), codec) for row in plane_NB]
    assert rows_ND.dtype == np.float32
    assert np.array_equal(rows_ND.view(np.uint32), np.array(naive_ND, np.float32).view(np.uint32))


@pytest.mark.parametrize("params", PARAMS, ids=IDS)
def test_decoding_reads_column_slices_of_records_and_read_only_bytes(
    params: dict[str, object],
) -> None:
    codec = codec_from_json(params, 101)
    plane_NB = random_plane(codec, 6)
    records = np.full((6, plane_NB.shape[1] + 23), 255, np.uint8)
    inside_NB = records[:, 12 : 12 + plane_NB.shape[1]]
    inside_NB[:] = plane_NB
    records.flags.writeable = False
    inside_NB = records[:, 12 : 12 + plane_NB.shape[1]]
    rows_ND = codec.decode(inside_NB, {})
    assert np.array_equal(rows_ND, codec.decode(plane_NB, {}))
    assert rows_ND.flags.c_contiguous and rows_ND.flags.writeable
    codec.check(inside_NB)
    assert codec.decode(inside_NB[:0], {}).shape == (0, 101)


@pytest.mark.parametrize(
    ("params", "width", "expected"),
    [
        ({"name": "raw", "dtype": "f32"}, 5, (0, 20)),
        ({"name": "raw", "dtype": "f16"}, 5, (0, 12)),
        ({"name": "raw", "dtype": "bf16"}, 6, (0, 12)),
        ({"name": "int8"}, 5, (4, 8)),
        ({"name": "int4", "group_size": 64}, 65, (8, 36)),
        ({"name": "nf4", "group_size": 64}, 2048, (128, 1024)),
        ({"name": "fp4", "group_size": 4096}, 1, (4, 4)),
        ({"name": "svd", "rank": 3, "inner": {"name": "int8"}}, 64, (4, 4)),
    ],
)
def test_segment_sizes(params: dict[str, object], width: int, expected: tuple[int, int]) -> None:
    codec = codec_from_json(params, width)
    assert codec.segments() == expected
    assert codec.to_json() == params
    assert codec_from_json(codec.to_json(), width) == codec
    assert codec.name == params["name"] and codec.width == width


def test_svd_expands_the_inner_codec_in_the_basis() -> None:
    codec = codec_from_json({"name": "svd", "rank": 3, "inner": {"name": "int8"}}, 7)
    assert isinstance(codec, Svd)
    assert codec.rank == 3
    assert codec.shared_shapes() == {"basis": ("F16", (3, 7))}
    basis_RD = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float16)
    plane_NB = random_plane(codec.inner, 4)
    naive_ND = [
        [
            sum(coefficient * float(basis_RD[r, d]) for r, coefficient in enumerate(coefficients))
            for d in range(7)
        ]
        for coefficients in (naive_decode(row.tobytes(), codec.inner) for row in plane_NB)
    ]
    rows_ND = codec.decode(plane_NB, {"basis": basis_RD})
    assert rows_ND.dtype == np.float32
    assert np.allclose(rows_ND, naive_ND, rtol=0, atol=1e-6 * np.abs(naive_ND).max())
    codec.check(plane_NB)


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"name": "zip"}, UnsupportedVersionError, "codec zip: unknown"),
        ({"name": 4}, BundleError, "codec, name"),
        ({}, BundleError, "codec, name"),
        ([], BundleError, "expected an object"),
        ({"name": "raw"}, BundleError, "codec raw, dtype"),
        ({"name": "raw", "dtype": "f64"}, BundleError, "codec raw, dtype"),
        ({"name": "raw", "dtype": "f32", "x": 1}, BundleError, "codec raw, x: unknown"),
        ({"name": "int8", "group_size": 64}, BundleError, "codec int8, group_size: unknown"),
        ({"name": "nf4"}, BundleError, "codec nf4, group_size"),
        ({"name": "nf4", "group_size": 48}, BundleError, "codec nf4, group_size"),
        ({"name": "nf4", "group_size": 64.0}, BundleError, "codec nf4, group_size"),
        ({"name": "nf4", "group_size": "64"}, BundleError, "codec nf4, group_size"),
        ({"name": "svd", "rank": 0, "inner": {"name": "int8"}}, BundleError, "codec svd, rank"),
        ({"name": "svd", "rank": 65, "inner": {"name": "int8"}}, BundleError, "codec svd, rank"),
        ({"name": "svd", "rank": True, "inner": {"name": "int8"}}, BundleError, "codec svd, rank"),
        ({"name": "svd", "rank": 2}, BundleError, "codec svd, inner"),
        ({"name": "svd", "rank": 2, "inner": "int8"}, BundleError, "codec svd, inner"),
        (
            {"name": "svd", "rank": 2, "inner": {"name": "svd", "rank": 1, "inner": {}}},
            BundleError,
            "codec svd, inner",
        ),
        ({"name": "svd", "rank": 2, "inner": {"name": "raw"}}, BundleError, "codec raw, dtype"),
    ],
)
def test_wrong_parameters_are_named(params: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        codec_from_json(params, 64)  # type: ignore[arg-type]  # the mistake under test


def put(plane_NB: np.ndarray, row: int, start: int, data: bytes) -> np.ndarray:
    spoiled_NB = plane_NB.copy()
    spoiled_NB[row, start : start + len(data)] = np.frombuffer(data, np.uint8)
    return spoiled_NB


NAN16, NAN32 = struct.pack("<e", float("nan")), struct.pack("<f", float("nan"))
INF16, INF32 = struct.pack("<e", float("inf")), struct.pack("<f", float("inf"))


@pytest.mark.parametrize(
    ("codec", "start", "data", "words"),
    [
        (Raw(5, "f32"), 4, NAN32, "row 2, column 1"),
        (Raw(5, "f16"), 8, INF16, "row 2, column 4"),
        (Raw(5, "bf16"), 0, b"\x80\x7f", "row 2, column 0"),
        (Raw(5, "f16"), 10, b"\1", "padding"),
        (Raw(5, "bf16"), 11, b"\1", "padding"),
        (Int8(5), 0, NAN16, "scale"),
        (Int8(5), 0, INF16, "scale"),
        (Int8(5), 0, struct.pack("<e", -1.0), "scale"),
        (Int8(5), 0, struct.pack("<e", -0.0), "scale"),
        (Int8(5), 2, b"\1", "scale: padding"),
        (Int8(5), 8, b"\x80", "-128"),
        (Int8(5), 9, b"\1", "codes: padding"),
        (FourBit("nf4", 65), 4, NAN32, "absmax"),
        (FourBit("nf4", 65), 0, INF32, "absmax"),
        (FourBit("fp4", 65), 4, struct.pack("<f", -1.0), "absmax"),
        (FourBit("fp4", 65), 8 + 32, b"\x01", "codes: padding"),
        (FourBit("nf4", 65), 8 + 33, b"\x01", "codes: padding"),
        (FourBit("nf4", 65), 8 + 35, b"\x10", "codes: padding"),
        (FourBit("int4", 65), 8, b"\x0f", "code 0"),
        (FourBit("int4", 65), 9, b"\xf0", "code 0"),
        (FourBit("int4", 65), 8 + 32, b"\x00", "code 0"),
        (Svd(9, Int8(5)), 8, b"\x80", "-128"),
    ],
)
def test_check_names_what_no_encoder_writes(
    codec: Codec, start: int, data: bytes, words: str
) -> None:
    inner = codec.inner if isinstance(codec, Svd) else codec
    plane_NB = random_plane(inner, 4)
    codec.check(plane_NB)
    with pytest.raises(BundleError, match=f"row 2.*{words}" if "row" not in words else words):
        codec.check(put(plane_NB, 2, start, data))


def test_the_registry_builds_every_codec_under_its_own_name() -> None:
    samples = {**{str(p["name"]): p for p in PARAMS}}
    samples["svd"] = {"name": "svd", "rank": 2, "inner": {"name": "int8"}}
    samples["bands"] = bands([[2, 4]])
    hadamard = {"basis": "", "exponent": 0}
    samples["steps"] = {"name": "steps", "tier": 0, "tiers": 1, "count": 0, **hadamard}
    assert sorted(CODECS) == sorted(samples)
    for name, params in samples.items():
        assert codec_from_json(params, 64).name == name


def test_constants_a_reader_in_another_language_needs() -> None:
    for name in ("int4", "nf4", "fp4"):
        codebook, order = CODEBOOKS[name], CODE_ORDER[name]
        assert sorted(order) == list(range(16))
        assert (np.diff(codebook[list(order)]) >= 0).all()
    for name, bounds in DECISION_BOUNDS.items():
        values = CODEBOOKS[name][list(CODE_ORDER[name])]
        middles = (values[:-1] + values[1:]) / np.float32(2)
        # The smallest float32 above the middle of two neighbours: a tie takes the lower value.
        assert np.array_equal(bounds, np.nextafter(middles, np.float32(np.inf)))
    assert np.array_equal(CODEBOOKS["int4"] * 7, np.arange(-8, 8, dtype=np.float32))
