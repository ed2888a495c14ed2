"""Gates against bundles broken on purpose: every broken one is stopped, every harmless one passes.

Each case changes the table rows a candidate serves; the gates are those of a cautious pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _eval_fakes import documents_of, pico_pair

from tolkit.evaluate import (
    EvalResult,
    append_quality,
    check_gates,
    evaluate,
    load_baseline,
    parse_gate,
    quality_record,
    windows_of,
)
from tolkit.model import FfnRows
from tolkit.progress import SilentProgress

GATES = [parse_gate(text) for text in ("ppl_increase<=1%", "kl_mean<=0.002", "top1_agreement>=97%")]
BASELINE_GATES = [
    parse_gate(text)
    for text in ("ppl_token<=baseline+1%", "kl_mean<=baseline+0.002", "top1_agreement>=baseline-3%")
]
Table = torch.Tensor  # [L, V, D]
Change = Callable[[Table], Table]


def changed(layer: int, change: Change) -> Change:
    """Apply `change` to one plane."""

    def whole(table_LVD: Table) -> Table:
        planes = list(table_LVD)
        planes[layer] = change(planes[layer])
        return torch.stack(planes)

    return whole


def rows_of(table_LVD: Table, picks: slice, value: Change) -> Table:
    result = table_LVD.clone()
    result[:, picks] = value(result[:, picks])
    return result


def noise_like(plane: Table) -> Table:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(plane.shape, generator=generator) * plane.std()


BROKEN: dict[str, Change] = {
    "layer 0 zeroed": changed(0, torch.zeros_like),
    "last layer zeroed": changed(1, torch.zeros_like),
    "two layers swapped": lambda t: t.flip(0),
    "token ids shifted by one": lambda t: t.roll(1, dims=1),
    "signs flipped in one layer": changed(0, torch.neg),
    "scales doubled": lambda t: 2 * t,
    "scales of one layer halved": changed(1, lambda p: p / 2),
    "a block of rows from another table": lambda t: rows_of(t, slice(60, 90), noise_like),
    "a block of rows of the next tokens": lambda t: rows_of(
        t, slice(60, 90), lambda rows: rows.roll(1, dims=1)
    ),
    "half of the columns lost": lambda t: torch.cat([t[..., :16], 0 * t[..., 16:]], -1),
    "columns reversed": lambda t: t.flip(-1),
    "one row not a number": lambda t: rows_of(t, slice(70, 71), lambda rows: rows * torch.nan),
}
HARMLESS: dict[str, Change] = {
    "exact": lambda t: t,
    "rounded to half precision": lambda t: t.half().float(),
    "noise of a thousandth": lambda t: t + 0.001 * noise_like(t),
}


class TableRows:
    """Rows served from a whole table [L, V, D]."""

    def __init__(self, table_LVD: Table) -> None:
        self.table_LVD = table_LVD

    def fetch(self, ids_n: torch.Tensor) -> list[torch.Tensor | None]:
        return list(self.table_LVD[:, ids_n])


def measured(name: str, change: Change) -> EvalResult:
    reference, candidate = pico_pair()
    vocabulary = torch.arange(reference.model.config.vocab_size)
    with torch.no_grad():
        table_LVD = torch.stack([p for p in FfnRows(reference.model).fetch(vocabulary)])
        mutant = replace(candidate, rows=TableRows(change(table_LVD)))
    windows = windows_of(documents_of(500, 300), reference.tokenizer, 32)
    (result,) = evaluate(
        [mutant], reference, windows, device="cpu", progress=SilentProgress(), labels=[name]
    )
    return result


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the record of the exact tables, the baseline."""
    folder = tmp_path_factory.mktemp("release.tol")
    record = quality_record(measured("exact", lambda t: t))
    assert append_quality(folder, record, SilentProgress())
    return folder


def outcomes(name: str, change: Change, release: Path) -> list[bool]:
    """Whether the absolute gates, and those against the baseline, let it pass."""
    result = measured(name, change)
    absolute = check_gates(result, GATES)
    relative = check_gates(result, BASELINE_GATES, baseline=load_baseline(release))
    return [all(verdict.ok for verdict in verdicts) for verdicts in (absolute, relative)]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle_is_stopped(name: str, release: Path) -> None:
    assert outcomes(name, BROKEN[name], release) == [False, False]


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_bundle_passes(name: str, release: Path) -> None:
    assert outcomes(name, HARMLESS[name], release) == [True, True]
