"""Numbers as people read them."""

from __future__ import annotations

import pytest

from tolkit_cli._units import (
    amount_text,
    bytes_text,
    count_text,
    duration_text,
    number_text,
    percent_text,
)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (bytes_text(12_600_000_000), "12.60 GB"),
        (bytes_text(999), "999 B"),
        (bytes_text(1000), "1.00 kB"),
        (count_text(81_920), "81,920"),
        (count_text(1_900_000), "1.90 M"),
        (count_text(0.9), "0.9"),
        (count_text(2.0), "2"),
        (amount_text(1, "step"), "1 step"),
        (amount_text(2, "step"), "2 steps"),
        (amount_text(5, "rows"), "5 rows"),
        (amount_text(2048, "B"), "2.05 kB"),
        (duration_text(4.24), "4.2 s"),
        (duration_text(75), "1:15"),
        (duration_text(3725), "1:02:05"),
        (number_text(0), "0.0000"),
        (number_text(1.23456), "1.2346"),
        (number_text(3.2e-7), "3.20e-07"),
        (number_text(-7.88e7), "-7.88e+07"),
        (percent_text(0.01234), "1.234 %"),
        (percent_text(0.01234, 2, signed=True), "+1.23 %"),
        (percent_text(-0.5, 1, signed=True), "-50.0 %"),
        (percent_text(-1e-9, signed=True), "0.000 %"),
    ],
)
def test_numbers_read_well(got: str, want: str) -> None:
    assert got == want
