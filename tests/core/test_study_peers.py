"""Other libraries' formats: what they store, byte for byte, and what they give back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tolkit.compress.codecs import encoder_for
from tolkit.compress.spec import named_codec
from tolkit.study.pareto_methods import bits_at_1b, ffn_bits_at_1b
from tolkit.study.peers import PEERS, Peer, Stored, base, installed_version
from tolkit.study.peers.torchao import TorchaoPeer

ROWS, WIDTH = 512, 256

BITS = {
    "bnb-int8": (8, 32 / 256),
    "bnb-nf4": (4, 32 / 64),
    "bnb-nf4-dq": (4, 8 / 64 + 32 / (64 * 256)),
    "bnb-fp4": (4, 32 / 64),
    "bnb-fp4-dq": (4, 8 / 64 + 32 / (64 * 256)),
    "gguf-q8_0": (8, 16 / 32),
    "gguf-q5_1": (5, 32 / 32),
    "gguf-q5_0": (5, 16 / 32),
    "gguf-q4_1": (4, 32 / 32),
    "gguf-q4_0": (4, 16 / 32),
    "gguf-mxfp4": (4, 8 / 32),
    "hqq-8": (8, 32 / 64),
    "hqq-4": (4, 32 / 64),
    "hqq-3": (3, 0.2 + 32 / 64),
    "hqq-2": (2, 32 / 64),
    "torchao-int8": (8, 16 / WIDTH),
    "torchao-int4": (4, 16 / 32),
    "torchao-int4-zp": (4, 24 / 32),
    "torchao-int2-zp": (2, 24 / 32),
}
"""Bits of a code, and of scales, zero points and unused bits a value at a width of 256."""

ERRORS = {8: (0.004, 0.012), 5: (0.03, 0.05), 4: (0.07, 0.13), 3: (0.15, 0.22), 2: (0.35, 0.5)}
"""Relative error of normal values by the bits of a code: lowest and highest."""


def need(peer: Peer) -> None:
    if installed_version(peer.package) is None:
        pytest.skip(f"{peer.package} is not installed")


def normal(rows: int = ROWS, width: int = WIDTH) -> Tensor:
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(1))


def error(stored: Stored, plane_VD: Tensor) -> float:
    return float((stored.plane_VD - plane_VD).norm() / plane_VD.norm())


def test_every_peer_is_listed_once() -> None:
    assert [peer.name for peer in PEERS] == list(BITS)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_bytes_and_errors(peer: Peer) -> None:
    need(peer)
    plane_VD = normal()
    before_VD = plane_VD.clone()
    stored = peer.round_trip(plane_VD)
    assert torch.equal(plane_VD, before_VD)
    assert stored.plane_VD.dtype == torch.float32
    assert stored.plane_VD.shape == plane_VD.shape
    # Ten codes of three bits do not divide the number of groups.
    slack = 2e-3 if peer.name == "hqq-3" else 1e-12
    assert 8 * stored.row_bytes / plane_VD.numel() == pytest.approx(sum(BITS[peer.name]), rel=slack)
    low, high = ERRORS[BITS[peer.name][0]]
    assert low < error(stored, plane_VD) < high


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_corners(peer: Peer) -> None:
    """A constant column, a constant row and a row of zeros; a plane of zeros."""
    need(peer)
    plane_VD = normal(37)
    plane_VD[:, 3], plane_VD[5], plane_VD[6] = 0.7, -0.3, 0.0
    stored = peer.round_trip(plane_VD)
    assert torch.isfinite(stored.plane_VD).all()
    # The double-quantised absmax of a group of zeros may become a small number.
    assert stored.plane_VD[6].abs().max() <= (0.02 if peer.name.endswith("-dq") else 0)
    assert (stored.plane_VD[5] + 0.3).abs().max() < 0.08
    assert error(stored, plane_VD) < ERRORS[BITS[peer.name][0]][1] * 1.2
    zeros_VD = torch.zeros((4, WIDTH))
    assert not peer.round_trip(zeros_VD).plane_VD.any()


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_blocks_of_rows_change_nothing(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    need(peer)
    plane_VD = normal(23, 64)
    whole = peer.round_trip(plane_VD)
    monkeypatch.setattr(base, "BLOCK_ROWS", 8)
    parts = peer.round_trip(plane_VD)
    if peer.package == "hqq":  # whose optimiser looks at the mean error of what it is given
        assert error(parts, plane_VD) == pytest.approx(error(whole, plane_VD), rel=0.02)
        return
    assert torch.equal(whole.plane_VD, parts.plane_VD)
    assert whole.size_bytes == parts.size_bytes


def test_double_quantised_codebooks_count_once_a_matrix() -> None:
    (peer,) = (peer for peer in PEERS if peer.name == "bnb-nf4-dq")
    for rows in (8, 64):
        assert peer.round_trip(normal(rows)).shared_bytes == 4 * (16 + 256 + 1)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4"])
def test_gguf_bytes_are_the_length_of_its_array(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    (peer,) = (peer for peer in PEERS if peer.name == f"gguf-{kind.lower()}")
    plane_VD = normal(96)
    qtype = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(plane_VD.numpy(), qtype)
    stored = peer.round_trip(plane_VD)
    assert stored.size_bytes == len(packed.tobytes())
    assert np.array_equal(stored.plane_VD.numpy(), gguf.quants.dequantize(packed, qtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_our_own_four_bits_are_those_of_bitsandbytes(kind: str) -> None:
    (peer,) = (peer for peer in PEERS if peer.name == f"bnb-{kind}")
    plane_VD = normal()
    _, ours_VD = encoder_for(named_codec(kind, WIDTH)).encode(plane_VD, {})
    assert torch.equal(ours_VD, peer.round_trip(plane_VD).plane_VD)


@pytest.mark.parametrize(
    ("codec", "peer"),
    [("int8", TorchaoPeer("", 8, None)), ("int4", TorchaoPeer("", 4, 64))],
    ids=["int8", "int4"],
)
def test_our_own_integers_are_as_good_as_torchao(codec: str, peer: TorchaoPeer) -> None:
    """Same codes and scales but for where the range ends: +-absmax, or half a step less."""
    need(peer)
    plane_VD = normal()
    _, ours_VD = encoder_for(named_codec(codec, WIDTH)).encode(plane_VD, {})
    ours = float((ours_VD - plane_VD).norm() / plane_VD.norm())
    assert ours == pytest.approx(error(peer.round_trip(plane_VD), plane_VD), rel=0.08)


def test_widths_that_do_not_fit_are_named() -> None:
    problems = {peer.package: peer.misfit(48) for peer in PEERS}
    assert problems["bitsandbytes"] is None
    assert problems["gguf"] == "rows of 48 values are no multiple of 32"
    assert problems["hqq"] == "rows of 48 values are no multiple of 64"
    assert TorchaoPeer("", 8, None).misfit(48) is None


def test_sizes_at_the_1b_shape() -> None:
    by_name = {peer.name: peer for peer in PEERS}
    assert bits_at_1b(by_name["bnb-nf4"]) == pytest.approx(4.5, abs=1e-4)
    assert bits_at_1b(by_name["bnb-nf4-dq"]) == pytest.approx(4.127, abs=1e-3)
    # 3 x 5464 x 2048 weights in nf4 stand for 128,256 x 2048 values.
    assert ffn_bits_at_1b() == pytest.approx(0.5277, abs=1e-4)


def test_what_is_not_there_has_no_version() -> None:
    assert installed_version("bitsandbytes")
    assert installed_version("no_such_library") is None
