"""The kernels against torch, case by case, on a CUDA device or in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/_kernels.py FOLDER     one JSON object on stdout

A process of its own, since triton reads that variable when it is imported.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from _bands import write_bands
from _coded import write_coded
from _drawn_tables import DrawnBundle, shapes_of_codecs
from _nano import ALL_CODECS, FP4, INT4, INT8, NF4, RAW_BF16, RAW_F16, RAW_F32, svd, write_nano

from tolkit.runtime.device_tables import DeviceTables
from tolkit_formats import open_bundle
from tolkit_formats.reader import Bundle

GOLDEN = Path(__file__).parent / "golden"
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
SVDS = (
    svd(4, RAW_F16), svd(19, RAW_F16), svd(1, NF4), svd(24, NF4), svd(7, INT8), svd(3, INT4),
    svd(2, RAW_BF16), svd(5, RAW_F32), svd(6, FP4), NF4,
)  # fmt: skip
FOUR_BIT = (NF4, INT4, FP4, {"name": "nf4", "group_size": 32}, {"name": "fp4", "group_size": 128})


def _drawn(label: str) -> Callable[[Path], DrawnBundle]:
    codec = shapes_of_codecs(40)[label]
    return lambda folder: DrawnBundle(codec, vocab_size=30, num_layers=2)


def _nano(*codecs: Any, width: int, counts: bool = True) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "nano.tol"
        write_nano(path, codecs, vocab_size=70, hidden_size=width, counts=counts)
        return path

    return write


WRITERS: dict[str, Callable[[Path], Path | DrawnBundle]] = {
    "every codec": _nano(*ALL_CODECS, width=24),
    "odd width": _nano(*ALL_CODECS, width=65),
    "slot is id": _nano(INT8, RAW_F16, width=24, counts=False),
    "short groups": _nano(*FOUR_BIT, width=200),
    "one value a row": _nano(RAW_F32, INT8, NF4, width=1),
    "two chunks": _nano(RAW_F16, INT8, NF4, width=1100),
    "ranks": _nano(*SVDS, width=24),
    "three tiers, rotation, predictors": lambda folder: write_bands(folder / "b.tol").path,
    "symbols": lambda folder: write_coded(folder / "c.tol").path,
    "two symbols": _drawn("steps in two symbols"),
    "two symbols rotated": _drawn("steps hadamard"),
    "symbols rotated": lambda folder: write_coded(folder / "c.tol", hadamard=True).path,
}
for golden in sorted(GOLDEN.glob("v1.*/*.tol")):
    WRITERS[f"golden {golden.stem}"] = lambda folder, path=golden: path
EXACT = {
    "slot is id", "short groups", "one value a row", "two chunks", "golden fp4", "golden int4",
    "golden int8", "golden nf4", "golden raw-bf16", "golden raw-f16", "golden raw-f32",
    "golden mapped-folded-dropped",
}  # fmt: skip
"""Cases without a product: kernels give torch's bits."""

TALL = {"ranks", "three tiers, rotation, predictors", "symbols"}
"""Cases that the interpreter is given the block sizes of many rows for."""


def figures(
    made: Path | DrawnBundle, device: torch.device, dtype: torch.dtype, counts: Sequence[int]
) -> dict[str, Any]:
    """How far the kernels are from torch on one bundle, asked for so many rows.

    Returns:
        equal: all bits are torch's; worst: largest error over the row's norm; missing: ids out of
        range gave NaN and only those.
    """
    bundle = open_bundle(made) if isinstance(made, Path) else cast(Bundle, made)
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, bundle.vocab_size, max(counts))).to(
        device
    )
    oracle = DeviceTables(bundle, device, FLOAT32, kernels=False).rows(ids)
    tables = DeviceTables(bundle, device, dtype, kernels=True)
    equal, worst = True, 0.0
    for n in counts:
        got, want = tables.rows(ids[:n]), oracle[:n]
        assert got.dtype == dtype and got.shape == want.shape
        if n:
            norm = want.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            worst = max(worst, float(((got.float() - want).abs() / norm).max()))
            equal = equal and torch.equal(got, want.to(dtype))
    wrong = ids[:4].clone()
    wrong[1], wrong[3] = -1, bundle.vocab_size
    rows = tables.rows(wrong, check=False)
    missing = rows.isnan().flatten(1)
    clean = not missing[[0, 2]].any() and bool(missing[[1, 3]].all())
    return {"equal": equal, "worst": worst, "missing": clean}


def run_case(name: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """Figures of a case in every dtype: dtype -> `figures`. The interpreter is given less."""
    made = WRITERS[name](folder)
    few = (0, 5) if name in EXACT else (1, 17)
    counts: dict[torch.dtype, Sequence[int]] = {FLOAT32: few, BFLOAT16: (5,), FLOAT16: (5,)}
    if device.type == "cuda":
        counts = dict.fromkeys(counts, (0, 1, 17, 70, 4096))
    elif name in TALL:
        counts[FLOAT32] = (65,)
    elif name.startswith("golden"):
        counts = {FLOAT32: few}
    return {str(dtype): figures(made, device, dtype, of_it) for dtype, of_it in counts.items()}


def require(name: str, result: dict[str, Any], *, interpreted: bool) -> None:
    """AssertionError unless a case's figures are what they must be.

    Products are TF32 on a device where rows are of half precision. The interpreter cuts bfloat16
    off where a device rounds.
    """
    assert "error" not in result, result["error"]
    assert all(of_dtype["missing"] for of_dtype in result.values())
    if name in EXACT:
        cut_off = {str(BFLOAT16)} if interpreted else set()
        assert all(f["equal"] for dtype, f in result.items() if dtype not in cut_off), result
    product, cut = (0.0, 2.0**-7) if interpreted else (2e-3, 2.0**-8)
    bounds = {FLOAT32: 1e-6, FLOAT16: 2.0**-11 + product, BFLOAT16: cut + product}
    for dtype, bound in bounds.items():
        if str(dtype) in result:
            assert result[str(dtype)]["worst"] <= bound + 1e-6, (dtype, result)


def main() -> None:
    device = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") else "cuda")
    results: dict[str, Any] = {}
    for i, name in enumerate(WRITERS):
        folder = Path(sys.argv[1]) / str(i)
        folder.mkdir()
        try:
            results[name] = run_case(name, folder, device)
        except Exception:
            results[name] = {"error": traceback.format_exc(limit=-8)[-4000:]}
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
