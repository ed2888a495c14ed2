"""`tol demo`: everything once, on a small model and text that every machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tolkit_cli._command import command
from tolkit_cli._options import OUTPUT, WHAT, ForceOption, ThreadsOption, option
from tolkit_cli._output import Column, Output
from tolkit_cli._units import bytes_text, number_text, percent_text

__all__ = ["demo"]

FolderOption = Annotated[
    Path, option(OUTPUT, "-o", "--out", metavar="DIR", help="A folder for everything it makes.")
]
MinutesOption = Annotated[
    float, option(WHAT, "--minutes", metavar="M", min=0.01, help="Time for training.")
]
TokensOption = Annotated[
    int, option(WHAT, "--tokens", metavar="N", min=1, help="Held-out tokens to measure on.")
]
SeedOption = Annotated[int, option(WHAT, "--seed", metavar="N", help="Of the training.")]

_COLUMNS = (
    Column("tables", "tables", right=False),
    Column("bytes", "size", bytes_text),
    Column("bits_per_value", "bits/value", lambda value: f"{value:.3f}"),
    Column("ppl_increase", "perplexity", lambda value: percent_text(value, signed=True)),
    Column("ppl_increase_se", "+/- s.e.", percent_text),
    Column("kl_mean_nats", "KL nats", number_text),
    Column("top1_agreement", "top-1", lambda value: percent_text(value, 2)),
)


@command(
    "demo",
    stage="Start",
    examples=["tol demo", "tol demo -o runs/demo --minutes 0.1 --force"],
    next_step="tol train on your own text.",
)
def demo(
    out: Output,
    path: FolderOption = Path("tol-demo"),
    minutes: MinutesOption = 1.25,
    limit_tokens: TokensOption = 60_000,
    seed: SeedOption = 0,
    force: ForceOption = False,
    threads: ThreadsOption = 0,
) -> None:
    """Do all of it on a small model, in about three minutes.

    Trains a MemoryLLM (tiny preset) on the sources and manual of this Python, builds its tables,
    compresses and thins them in ten ways, and prints what each way costs in bytes and in
    quality, measured against the checkpoint's own FFN path on held-out text. Needs no network.

    Writes a checkpoint, the bundles (130 MB in all) and, where the plots extra is installed, a
    picture of quality against size.
    """
    from tolkit.demo import DemoSpec, run_demo

    spec = DemoSpec(
        out=path,
        minutes=minutes,
        limit_tokens=limit_tokens,
        seed=seed,
        threads=threads or None,
        force=force,
    )
    with out.timing("demo"):
        report = run_demo(spec, out.progress())
    shape = (report.vocab_size, report.num_layers, report.hidden_size)
    out.field("metrics", "shape", shape, "tables", "{:,} x {} x {} values".format(*shape))
    tokens = report.valid_tokens
    out.field("metrics", "tokens", tokens, "measured on", f"{tokens:,} held-out tokens")
    ppl = f"{report.reference_ppl:.2f} +/- {report.reference_ppl_se:.2f} on the FFN path"
    out.field("metrics", "ppl_token", report.reference_ppl, "perplexity", ppl)
    out.text()
    out.table("rows", _COLUMNS, [row.to_json() for row in report.rows])
    out.text()
    for name, file in report.files.items():
        out.field("outputs", name, file)
    smallest = min(report.rows, key=lambda row: row.bytes)
    out.hint(f"look inside one with: tol inspect {smallest.path}")
    out.quiet_value(path)
