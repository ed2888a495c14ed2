"""The demo's picture: a PNG that shows every result, also where divergences are zero."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from tolkit.demo_plot import draw_quality, plots_installed

pytest.importorskip("matplotlib", reason="the plots extra is not installed")


@dataclass(frozen=True)
class Row:
    tables: str
    group: str
    careful: bool
    bits_per_value: float
    kl_mean_nats: float
    kl_mean_nats_se: float


ROWS = [
    Row("f16", "raw", True, 16.1, 3e-8, 1e-9),
    Row("nf4", "bits", True, 4.6, 7e-5, 2e-6),
    Row("nf4, no feedback", "bits", False, 4.6, 3e-4, 3e-6),
    Row("rank 50%", "rank", True, 8.5, 1e-5, 1e-6),
    Row("2 layers dropped", "drop", False, 12.1, 0.04, 0.001),
]


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height in pixels."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_a_picture_of_stated_size_with_equal_bytes_for_equal_rows() -> None:
    assert plots_installed()
    first = draw_quality(ROWS)
    assert size_of(first) == (1040, 650)
    assert draw_quality(ROWS) == first
    assert draw_quality(ROWS[:-1]) != first


def test_an_exact_result_still_fits_on_a_log_axis() -> None:
    exact = Row("f32", "raw", True, 32.0, 0.0, 0.0)
    assert size_of(draw_quality([exact, *ROWS])) == (1040, 650)
