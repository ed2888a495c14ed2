"""Codec bands and predictors, the numpy half: decoding, parameters, what `check` refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from _bands import (
    Shared,
    bands,
    draw_codes,
    draw_shared,
    draw_signed,
    packed_bits,
    slow_row,
    slow_signed,
    slow_unit,
    sylvester,
    widths_of,
)

from tolkit_formats.codecs import Bands, check_shared, codec_from_json, codec_label, prepared
from tolkit_formats.errors import BundleError
from tolkit_formats.hadamard import hadamard, hadamard_size
from tolkit_formats.predictor import Predictor, unit_rows

N = 5
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"all of {b} bits": (11, bands([[11, b]], basis=[[11, 8]])) for b in range(1, 9)},
    "every width at once": (9, bands([[1, b] for b in range(9)], basis=[[9, 4]])),
    "gaps within": (13, bands([[2, 0], [3, 5], [4, 0], [1, 1]], basis=[[13, 6]])),
    "rank below D": (13, bands([[3, 7], [2, 2]], basis=[[1, 8], [2, 3], [2, 2]])),
    "fewer codes than rank": (16, bands([[2, 3]], basis=[[6, 5]])),
    "D 1": (1, bands([[1, 3]], basis=[[1, 2]])),
    "no codes, basis of another tier": (6, bands([], codebooks=[4], basis=[[2, 4]])),
    "only a mean": (6, bands([])),
    "exponents": (8, bands([[8, 4]], basis=[[8, 8]], exponent=-7)),
    "exponent up": (8, bands([[8, 4]], exponent=11)),
    "tier 2": (8, bands([[8, 3]], tier=2, codebooks=[1, 3, 8], basis=[[8, 8]])),
    **{f"Hadamard D {d}": (d, bands([[1, 2], [d - 1, 4]][:d])) for d in (1, 7, 12, 64)},
}
each = pytest.mark.parametrize("name", CASES)


def case(name: str) -> tuple[Bands, dict[str, Any], Shared, np.ndarray]:
    width, params = CASES[name]
    rng = np.random.default_rng(len(name))
    codec = codec_from_json(params, width)
    assert isinstance(codec, Bands)
    shared = draw_shared(rng, [params], width)
    data = draw_codes(rng, params, N, width)
    return codec, params, shared, np.frombuffer(data, np.uint8).reshape(N, -1)


def arrays(shared: Shared) -> dict[str, np.ndarray]:
    return {name: array for name, (_, array) in shared.items()}


@each
def test_decoding_equals_a_loop_over_bits(name: str) -> None:
    codec, params, shared, plane_NB = case(name)
    assert codec.segments() == (0, plane_NB.shape[1])
    assert {n: (d, a.shape) for n, (d, a) in shared.items()} == codec.shared_shapes()
    want = np.array([slow_row(params, shared, r.tobytes(), codec.width) for r in plane_NB])
    got = codec.decode(plane_NB, arrays(shared))
    assert got.dtype == np.float32 and got.shape == want.shape and got.flags.c_contiguous
    assert (np.abs(got - want) <= 1e-6 * np.linalg.norm(want, axis=1, keepdims=True)).all()
    codec.check(plane_NB)
    codec.check_shared(arrays(shared))
    # What `prepared` expands is only a faster way to the same bits.
    ready = prepared(codec, arrays(shared))
    assert np.array_equal(codec.decode(plane_NB, ready), got)
    assert all(array.dtype == np.float32 for array in ready.values())
    assert codec.decode(plane_NB[:0], ready).shape == (0, codec.width)


@each
def test_parameters_survive_the_manifest(name: str) -> None:
    width, params = CASES[name]
    codec = codec_from_json(params, width)
    assert codec.to_json() == params and codec_from_json(codec.to_json(), width) == codec
    assert codec.name == "bands" and codec.width == width
    assert codec_label(codec) == ("bands" if params["basis"] else "bands hadamard")


def test_columns_of_read_only_records() -> None:
    codec, _, shared, plane_NB = case("every width at once")
    records = np.full((N, plane_NB.shape[1] + 9), 255, np.uint8)
    records[:, 4 : 4 + plane_NB.shape[1]] = plane_NB
    records.flags.writeable = False
    inside_NB = records[:, 4 : 4 + plane_NB.shape[1]]
    codec.check(inside_NB)
    got = codec.decode(inside_NB, arrays(shared))
    assert np.array_equal(got, codec.decode(plane_NB, arrays(shared))) and got.flags.writeable


def test_a_mean_alone_is_not_shared_between_calls() -> None:
    codec, _, shared, plane_NB = case("only a mean")
    ready = prepared(codec, arrays(shared))
    codec.decode(plane_NB, ready)[:] = 7
    assert not (codec.decode(plane_NB, ready) == 7).any()


@pytest.mark.parametrize("width", [1, 7, 12, 64])
def test_the_rotation_is_sylvesters_in_blocks(width: int) -> None:
    size = hadamard_size(width)
    assert size == {1: 1, 7: 1, 12: 4, 64: 64}[width]
    block = np.kron(np.eye(width // size), sylvester(size))
    rows = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
    turned = hadamard(rows)
    assert turned.dtype == np.float32 and np.allclose(turned, rows @ block, rtol=0, atol=1e-6)
    assert np.allclose(hadamard(turned), rows, rtol=0, atol=1e-6)
    assert rows.flags.writeable and hadamard(rows[:0]).shape == (0, width)


GOOD = bands([[3, 5], [2, 0], [4, 3]], codebooks=[1, 3, 5], basis=[[9, 8]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tier": -1}, "tier: expected an integer in 0..255"),
        ({"tier": 256}, "tier"),
        ({"tier": True}, "tier"),
        ({"tier": None}, "tier"),
        ({"runs": None}, "runs: expected runs such as"),
        ({"runs": [[3, 5]]}, "runs: expected runs"),
        ({"runs": "3x5  4x3"}, "runs: expected runs"),
        ({"runs": " 3x5"}, "runs: expected runs"),
        ({"runs": "3x5 "}, "runs: expected runs"),
        ({"runs": "3x5\n"}, "runs: expected runs"),
        ({"runs": "3X5"}, "runs: expected runs"),
        ({"runs": "3x5,4x3"}, "runs: expected runs"),
        ({"runs": "3"}, "runs: expected runs"),
        ({"runs": "03x5"}, "runs: expected runs"),
        ({"runs": "0x5"}, "runs: expected runs"),
        ({"runs": "-3x5"}, "runs: expected runs"),
        ({"runs": "3x-1"}, "runs: expected runs"),
        ({"runs": "3x10"}, "runs: expected runs"),
        ({"runs": "\u0663x5"}, "runs: expected runs"),
        ({"runs": "123456x5"}, "runs: expected runs"),
        ({"runs": "3x5" + " 1x0" * 50_000}, "runs: counts sum to more than 12"),
        ({"runs": "x" * 50_000}, "runs: expected runs"),
        ({"runs": "3x9"}, "runs: expected 0..8 bits, got 3x9"),
        ({"runs": "13x5"}, "runs: counts sum to more than 12"),
        ({"runs": "12x5 12x5"}, "runs: counts sum to more than 12"),
        ({"runs": "10x5"}, "runs: more coefficients than 9 basis rows"),
        ({"runs": "3x4"}, "runs: no codebook for a width of 4 bits"),
        ({"codebooks": None}, "codebooks: expected a list"),
        ({"codebooks": [3, 1, 5]}, "codebooks: expected ascending"),
        ({"codebooks": [1, 3, 3, 5]}, "codebooks: expected ascending"),
        ({"codebooks": [0, 1, 3, 5]}, "codebooks: expected an integer in 1..8"),
        ({"codebooks": [1, 3, 5, 9]}, "codebooks"),
        ({"codebooks": [1, 3, 5.0]}, "codebooks"),
        ({"codebooks": list(range(9))}, "codebooks"),
        ({"basis": "9x1"}, "basis: expected 2..8 bits, got 9x1"),
        ({"basis": "9x9"}, "basis: expected 2..8 bits"),
        ({"basis": "13x8"}, "basis: counts sum to more than 12"),
        ({"basis": "9x8 4x8"}, "basis: counts sum to more than 12"),
        ({"basis": 8}, "basis: expected runs"),
        ({"exponent": 121}, "exponent: expected an integer in -120..120"),
        ({"exponent": -121}, "exponent"),
        ({"exponent": 0.0}, "exponent"),
        ({"colour": 1}, "bands, colour: unknown"),
    ],
)
def test_wrong_parameters_are_named(change: dict[str, Any], words: str) -> None:
    codec_from_json(GOOD, 12)
    with pytest.raises(BundleError, match=words) as caught:
        codec_from_json({**GOOD, **change}, 12)
    assert caught.value.message.startswith("codec bands, ") and len(caught.value.message) < 200


@pytest.mark.parametrize("field", ["tier", "runs", "codebooks", "basis", "exponent"])
def test_missing_parameters_are_named(field: str) -> None:
    with pytest.raises(BundleError, match=f"codec bands, {field}"):
        codec_from_json({k: v for k, v in GOOD.items() if k != field}, 12)


def test_svd_holds_no_codec_with_shared_arrays() -> None:
    with pytest.raises(BundleError, match="codec svd, inner"):
        codec_from_json({"name": "svd", "rank": 9, "inner": bands([[9, 2]])}, 12)


def test_check_refuses_bits_no_encoder_writes() -> None:
    codec, params, _, plane_NB = case("every width at once")  # 36 bits: 4 spare, 3 bytes padding
    assert sum(widths_of(params["runs"], 9)) == 36 and plane_NB.shape[1] == 8
    for at, bit in ((4, 1), (4, 8), (5, 128), (7, 1)):
        spoiled = plane_NB.copy()
        spoiled[2, at] |= bit
        with pytest.raises(BundleError, match="row 2, bands codes: padding"):
            codec.check(spoiled)
    allowed = plane_NB.copy()
    allowed[2, 4] |= 16
    codec.check(allowed)


def put(name: str, at: int, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(shared: dict[str, np.ndarray]) -> None:
        shared[name] = shared[name].copy()
        shared[name][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("mean", 3, np.nan), "mean: holds NaN"),
        (put("mean", 0, -np.inf), "mean: holds NaN"),
        (put("scales.0", 1, np.nan), "scales.0: expected finite numbers >= 0, got nan at 1"),
        (put("scales.0", 7, np.inf), "scales.0"),
        (put("scales.0", 0, -1.0), "scales.0"),
        (put("scales.0", 0, -0.0), "scales.0"),
        (put("basis_scales", 8, np.nan), "basis_scales"),
        (put("basis_scales", 0, -1.0), "basis_scales"),
        (put("codebooks", 0, np.nan), "codebooks: of 1 bits"),
        (put("codebooks", 2, 9.0), "codebooks: of 2 bits"),
        (put("codebooks", -1, np.inf), "codebooks: of 8 bits"),
        (put("basis", 0, 0xF7), "basis: code 15 is outside 0..14"),
        (put("basis", 4, 0x01), "row 0, basis: padding"),
    ],
)
def test_shared_arrays_no_encoder_writes(
    change: Callable[[dict[str, np.ndarray]], None], words: str
) -> None:
    codec, _, shared, _ = case("every width at once")  # basis of 4 bits, 9 values: half a byte
    spoiled = arrays(shared)
    codec.check_shared(spoiled)
    change(spoiled)
    with pytest.raises(BundleError, match=words):
        check_shared(codec, spoiled)


def test_values_beyond_binary32_are_refused() -> None:
    width, params = CASES["exponent up"]
    _, _, shared, _ = case("exponent up")
    large = arrays(shared)
    large["scales.0"] = np.full(8, 60_000, np.float16)
    codec_from_json({**params, "exponent": 60}, width).check_shared(large)  # type: ignore[attr-defined]
    with pytest.raises(BundleError, match="do not fit binary32"):
        check_shared(codec_from_json({**params, "exponent": 120}, width), large)


# Predictors.


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [1, 5, 8])
def test_predictor_weights(bits: int, width: int) -> None:
    predictor = Predictor(width, bits, -4)
    packed, numbers = draw_signed(np.random.default_rng(bits), [[width, bits]], max(width, 2))
    if width == 1:
        packed = b"".join(packed_bits([n + (1 << bits - 1) - 1], [bits]) for n in numbers[:, 0])
        numbers = numbers[:, :1]
    scales = np.linspace(0.1, 1, width).astype(np.float16)
    shared = {"predictor": np.frombuffer(packed, np.uint8), "predictor_scales": scales}
    assert {n: (a.shape, a.dtype.name) for n, a in shared.items()} == {
        name: (shape, {"U8": "uint8", "F16": "float16"}[dtype])
        for name, (dtype, shape) in predictor.shared_shapes().items()
    }
    want = slow_signed(packed, [[width, bits]], width) * scales.astype(float)[:, None] / 16
    assert np.allclose(predictor.weights_DD(shared), want, rtol=1e-6)
    assert np.array_equal(want * 16 / scales.astype(float)[:, None], numbers)
    predictor.check_shared(shared)
    assert Predictor.from_json(predictor.to_json(), width) == predictor


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"bits": 1, "exponent": 0}, "predictor, bits"),
        ({"bits": 9, "exponent": 0}, "predictor, bits"),
        ({"bits": True, "exponent": 0}, "predictor, bits"),
        ({"exponent": 0}, "predictor, bits"),
        ({"bits": 3}, "predictor, exponent"),
        ({"bits": 3, "exponent": 121}, "predictor, exponent"),
        ({"bits": 3, "exponent": 0, "rank": 2}, "predictor, rank: unknown"),
    ],
)
def test_wrong_predictors_are_named(params: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        Predictor.from_json(params, 8)


@pytest.mark.parametrize(
    ("name", "at", "value", "words"),
    [
        ("predictor", 0, 0b11100000, "predictor: code 7 is outside 0..6"),
        ("predictor", 1, 1, "row 0, predictor: padding"),
        ("predictor_scales", 2, np.inf, "predictor_scales"),
        ("predictor_scales", 2, -0.0, "predictor_scales"),
        ("predictor_scales", 2, np.nan, "predictor_scales"),
    ],
)
def test_predictors_no_encoder_writes(name: str, at: int, value: float, words: str) -> None:
    predictor = Predictor(5, 3, 110)
    packed, _ = draw_signed(np.random.default_rng(0), [[5, 3]], 5)
    shared = {
        "predictor": np.frombuffer(packed, np.uint8).copy(),
        "predictor_scales": np.full(5, 0.1, np.float16),
    }
    predictor.check_shared(shared)
    shared[name][at] = value
    with pytest.raises(BundleError, match=words):
        predictor.check_shared(shared)


def test_predictions_beyond_binary32_are_refused() -> None:
    packed, _ = draw_signed(np.random.default_rng(0), [[5, 3]], 5)
    scales = np.full(5, 60_000, np.float16)
    shared = {"predictor": np.frombuffer(packed, np.uint8), "predictor_scales": scales}
    with pytest.raises(BundleError, match=r"predictor: .*do not fit binary32"):
        Predictor(5, 3, 120).check_shared(shared)


def test_unit_rows() -> None:
    rows = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32) * 1e-3
    rows[2] = 0
    rows[3] *= 1e6
    unit = unit_rows(rows)
    assert unit.dtype == np.float32 and np.isfinite(unit).all()
    assert np.allclose(unit, slow_unit(rows), rtol=1e-5, atol=0)
    assert not unit[2].any() and np.mean(unit[3] ** 2) == pytest.approx(1)
