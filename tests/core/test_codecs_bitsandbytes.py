"""nf4 and fp4 against bitsandbytes itself: codes, absmax and decoded values, bit for bit.

The oracle is bitsandbytes on the row zero-padded to whole groups and flattened, padded codes cut
off (its kernels are wrong on a 2-D array whose rows are not whole groups).
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from tolkit.compress.codecs import encoder_for
from tolkit_formats.codecs import FourBit
from tolkit_formats.codecs.fourbit import CODE_ORDER, CODEBOOKS, DECISION_BOUNDS

GROUP = 64
WIDTHS = (64, 128, 100, 1, 63, 65, 1600)
NAMES = ("nf4", "fp4")
ROWS = 24


def bnb_plane(rows_ND: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(absmax [N, J], code of each value [N, D], decoded [N, D]) by bitsandbytes."""
    num_rows, width = rows_ND.shape
    padding = -width % GROUP
    flat = torch.nn.functional.pad(rows_ND, (0, padding)).flatten()
    packed, state = bnb.quantize_4bit(
        flat, blocksize=GROUP, quant_type=name, compress_statistics=False
    )
    decoded_ND = bnb.dequantize_4bit(packed, state).view(num_rows, -1)[:, :width]
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1)
    return state.absmax.view(num_rows, -1), codes.view(num_rows, -1)[:, :width], decoded_ND


def our_plane(rows_ND: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same three from our encoder's bytes."""
    width = rows_ND.shape[1]
    codec = FourBit(name, width, GROUP)
    plane_NB, decoded_ND = encoder_for(codec).encode(rows_ND, {})
    codec.check(plane_NB.numpy())
    scale_bytes, _ = codec.segments()
    packed_NH = plane_NB[:, scale_bytes : scale_bytes + (width + 1) // 2]
    codes_ND = torch.stack([packed_NH >> 4, packed_NH & 15], dim=2).flatten(1)[:, :width]
    numpy_ND = codec.decode(plane_NB.numpy(), {})
    assert np.array_equal(numpy_ND.view(np.uint32), decoded_ND.numpy().view(np.uint32))
    return plane_NB[:, :scale_bytes].contiguous().view(torch.float32), codes_ND, decoded_ND


def assert_equal_bits(rows_ND: torch.Tensor, name: str) -> None:
    for what, ours, theirs in zip(
        ("absmax", "codes", "decoded"),
        our_plane(rows_ND, name),
        bnb_plane(rows_ND, name),
        strict=True,
    ):
        if ours.dtype == torch.float32:
            ours, theirs = (part.contiguous().view(torch.int32) for part in (ours, theirs))
        assert torch.equal(ours, theirs), f"{what} of {name} differ"


def rows_of(kind: str, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    normal_ND = torch.randn((ROWS, width), generator=generator)
    uniform_ND = torch.rand((ROWS, width), generator=generator) * 2 - 1
    return {
        "normal": normal_ND,
        "heavy-tailed": normal_ND**7,
        "scales from 1e-38 to 1e38": normal_ND * 10.0 ** torch.linspace(-38, 37, ROWS)[:, None],
        "near the largest float32": uniform_ND * 3.4e38,
        "subnormal": uniform_ND * 1e-38,
        "smallest subnormals": (uniform_ND * 4).round() * 2.0**-149,
        "constant": torch.full((ROWS, width), -0.3),
        "constant columns": torch.linspace(-1, 1, width).repeat(ROWS, 1),
        "zero": torch.zeros((ROWS, width)),
        "negative zero": torch.full((ROWS, width), -0.0),
        "zeros of both signs beside a value": torch.where(uniform_ND > 0.9, normal_ND, 0.0)
        * uniform_ND.sign(),
        "one spike": torch.where(torch.arange(width) == width // 2, 1e6, 1e-6 * uniform_ND),
        "integers": (uniform_ND * 8).round(),
    }[kind]


KINDS = (
    "normal",
    "heavy-tailed",
    "scales from 1e-38 to 1e38",
    "near the largest float32",
    "subnormal",
    "smallest subnormals",
    "constant",
    "constant columns",
    "zero",
    "negative zero",
    "zeros of both signs beside a value",
    "one spike",
    "integers",
)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_bits_equal_bitsandbytes(name: str, kind: str, width: int) -> None:
    assert_equal_bits(rows_of(kind, width), name)


@pytest.mark.parametrize("absmax", [1.0, 2.0**-100, 2.0**90, 0.3, 7.7, 1e-37, 3e38])
@pytest.mark.parametrize("name", NAMES)
def test_every_decision_bound_and_its_neighbours(name: str, absmax: float) -> None:
    """Values on each bound and up to three float32 steps off it, scaled by the group's absmax."""
    near = [(DECISION_BOUNDS[name].astype(np.float64) * absmax).astype(np.float32)]
    for direction in (-np.inf, np.inf):
        step = near[0]
        for _ in range(3):
            step = np.nextafter(step, np.float32(direction))
            near.append(step)
    values = np.concatenate(near)
    values = np.concatenate([values, -values])
    row = torch.from_numpy(np.concatenate([values, np.zeros(-len(values) % 63, np.float32)]))
    groups_J63 = row.view(-1, 63)
    absmax_J1 = torch.full((len(groups_J63), 1), absmax)
    assert_equal_bits(torch.cat([absmax_J1, groups_J63], dim=1), name)
    assert_equal_bits(torch.cat([groups_J63, -absmax_J1], dim=1).flatten()[None], name)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_are_what_bisection_over_float_bits_finds(name: str) -> None:
    rank_of_code = {code: rank for rank, code in enumerate(CODE_ORDER[name])}

    def ranks(values: np.ndarray) -> np.ndarray:
        groups = torch.zeros((len(values), GROUP))
        groups[:, 0] = 1.0
        groups[:, 1] = torch.from_numpy(values)
        packed, _ = bnb.quantize_4bit(groups.flatten(), blocksize=GROUP, quant_type=name)
        codes = (packed.view(len(values), -1)[:, 0] & 15).tolist()
        return np.array([rank_of_code[code] for code in codes])

    def float_of(key: np.ndarray) -> np.ndarray:
        """float32 by its place among all float32, so that keys and values rise together."""
        bits = np.where(key >= 0, key, 0x7FFFFFFF - key)
        return bits.astype(np.uint32).view(np.float32)

    one = 0x3F800000
    low = np.full(15, 0x7FFFFFFF - (one | 0x80000000), dtype=np.int64)
    high = np.full(15, one, dtype=np.int64)
    assert np.array_equal(float_of(low), np.full(15, -1.0, np.float32))
    while (high - low > 1).any():
        middle = (low + high) // 2
        reached = ranks(float_of(middle)) >= np.arange(1, 16)
        high, low = np.where(reached, middle, high), np.where(reached, low, middle)
    assert np.array_equal(float_of(high), DECISION_BOUNDS[name])


@pytest.mark.parametrize("name", NAMES)
def test_codebook_equals_bitsandbytes(name: str) -> None:
    theirs = bnb.get_4bit_type(name, device="cpu").numpy()
    assert np.array_equal(CODEBOOKS[name].view(np.uint32), theirs.view(np.uint32))


def test_a_zero_group_is_code_7_in_nf4_and_code_0_in_fp4() -> None:
    for name, code in (("nf4", 7), ("fp4", 0)):
        absmax_NJ, codes_ND, decoded_ND = our_plane(torch.zeros(1, 64), name)
        assert absmax_NJ.tolist() == [[0.0]]
        assert set(codes_ND.flatten().tolist()) == {code}
        assert not decoded_ND.any()
