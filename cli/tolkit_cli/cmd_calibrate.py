"""`tol calibrate`: how much an error of each table matters to a model's answers."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from tolkit_cli._command import command
from tolkit_cli._eval_options import ModelArgument, WindowOption
from tolkit_cli._options import (
    INPUT,
    RESOURCES,
    TEXT_HELP,
    WHAT,
    DeviceOption,
    ForceOption,
    OutOption,
    option,
)
from tolkit_cli._output import Column, Output
from tolkit_cli._units import duration_text

__all__ = ["calibrate"]

TextOption = Annotated[
    list[str],
    option(INPUT, "--data", metavar="TEXT", help=f"{TEXT_HELP} Repeatable."),
]
TokensOption = Annotated[
    int,
    option(
        WHAT,
        "--tokens",
        metavar="N",
        min=1,
        help="Positions to measure at, at most; windows spread evenly over the text.",
    ),
]
SeedOption = Annotated[
    int,
    option(WHAT, "--seed", metavar="N", min=0, help="Of the labels drawn from the model."),
]
GradientDtypeOption = Annotated[
    Literal["float32", "bfloat16"],
    option(RESOURCES, "--dtype", metavar="NAME", help="float32 or bfloat16, of the passes."),
]

_COLUMNS = (
    Column("layer", "layer"),
    Column("mean_diagonal", "mean diagonal", lambda value: f"{value:.4e}"),
    Column("effective_rank", "effective rank", lambda value: f"{value:.1f}"),
)


@command(
    "calibrate",
    stage="Make",
    examples=[
        "tol calibrate ckpt --data stdlib:valid -o metric.safetensors",
        "tol calibrate full.tol --data stdlib:valid -o metric.safetensors --seed 1 --force",
    ],
    next_step="tol compress, which can spend its bits where errors matter.",
)
def calibrate(
    out: Output,
    model: ModelArgument,
    data: TextOption,
    path: OutOption,
    tokens: TokensOption = 50_000,
    seed: SeedOption = 0,
    window: WindowOption = None,
    dtype: GradientDtypeOption = "float32",
    device: DeviceOption = "auto",
    force: ForceOption = False,
) -> None:
    """Measure how much an error of each table matters.

    Reads text, draws a label from the model's own prediction at every position, and writes the
    mean outer product of the gradients that reach the block behind each table (a local Fisher
    metric): L matrices of D x D values, 4 x L x D x D bytes, 403 MB for a 1B model.

    Takes one forward and one backward pass over --tokens positions and, in memory, twice the
    file and what the passes keep of 2048 tokens (16384 on CUDA) or one window. The same seed,
    text and number of threads give the same bytes; other threads move the last bits.
    """
    from tolkit.calibrate import CalibrationSpec, save_metric
    from tolkit.calibrate import calibrate as measure
    from tolkit.data import read_documents
    from tolkit.errors import OutputExistsError, UsageError
    from tolkit.tables import load_runnable

    if path.exists() and not force:
        raise OutputExistsError(
            f"{path}: already exists", hint="choose another name, or add --force"
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"--out: {path} cannot be a file, expected a name in a folder that exists")
    out.record("inputs", model=model, data=data)
    spec = CalibrationSpec(tokens=tokens, seed=seed, window=window, dtype=dtype, device=device)
    with out.timing("load"):
        runnable = load_runnable(model)
    started_s = time.perf_counter()
    with out.timing("calibrate"):
        measured = measure(runnable, read_documents(data), spec, out.progress())
    save_metric(path, measured)
    elapsed_s = time.perf_counter() - started_s

    rows = [
        {
            "layer": layer,
            "mean_diagonal": measured.mean_diagonal(layer),
            "effective_rank": measured.effective_rank(layer),
        }
        for layer in range(len(measured.grams))
    ]
    for row in rows:
        if row["mean_diagonal"] == 0:
            out.warn(f"layer {row['layer']}: no error of its table changes the model's answers")
    used = f"{measured.tokens:,} in {measured.n_windows:,} windows of {measured.window}"
    out.field("outputs", "metric", path)
    out.field("metrics", "tokens", measured.tokens, text=used)
    out.record("metrics", windows=measured.n_windows, window=measured.window, seed=seed)
    out.field("metrics", "elapsed_s", round(elapsed_s, 3), "time", duration_text(elapsed_s))
    out.text()
    out.table("layers", _COLUMNS, rows)
    out.quiet_value(path)
