"""What decoding costs: the paper's Table 6, for models of the user's shape."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tolkit.bench.decode import DecodeResult, bench_decode
from tolkit.bench.shapes import ARCHITECTURES
from tolkit.bench.specs import DecodeSpec
from tolkit.errors import UsageError
from tolkit.model import ModelConfig, checkpoint_tensors
from tolkit.sources import is_bundle
from tolkit.study.context import Context
from tolkit.study.fields import Field
from tolkit.study.figure import CAREFUL, PAPER, PLAIN, panel
from tolkit.study.paper import TABLE_6
from tolkit.study.spec import words
from tolkit.study.store import Point
from tolkit_formats.digests import json_digest
from tolkit_formats.reader import open_bundle

__all__ = ["DecodeStudy"]

_CONTEXT = 256
_TOKENS = 16
_WORK = "decode-tables"


class DecodeStudy:
    """Table 6."""

    name = "decode"
    title = "Cost of decoding a token"
    about = (
        "Models of this one's shape, weights random, decode one text token by token, tables on "
        "disk. They take turns, so the ratios to dense hold on a busy machine, its milliseconds "
        "do not. Bound: bytes of weights that a token must read, over dense's."
    )
    fields = (
        Field("model", "model", "text"),
        Field("ms_per_token", "ms/token"),
        Field("time_ratio", "time/dense", "small"),
        Field("cpu_ratio", "CPU/dense", "small"),
        Field("bound", "bound", "small"),
        Field("weights_bytes", "weights", "bytes"),
        Field("tables_bytes", "tables held", "bytes"),
        Field("memory_ratio", "memory/dense", "small"),
        Field("table_read_bytes", "rows read/token", "bytes"),
        Field("paper_time_ratio", "paper, time", "small"),
        Field("paper_memory_ratio", "paper, memory", "small"),
    )
    paper = TABLE_6
    takes = frozenset({"values", "threads"})

    def fingerprint(self, context: Context) -> Mapping[str, Any]:
        """The shape and how it is run; times also depend on the machine, which has no name."""
        machine = context.machine
        return {
            "study": self.name,
            "shape": json_digest(_config(context).to_json()),
            "context": _positions(context),
            "device": machine.device.type,
            "dtype": str(machine.dtype).removeprefix("torch."),
            "threads": context.spec.threads or 0,
            "cpus": os.cpu_count() or 0,
        }

    def keys(self, context: Context) -> list[str]:
        """Architectures; dense, which all others are compared with, is always one."""
        chosen = words(context.spec.values) if context.spec.values else ARCHITECTURES
        for architecture in chosen:
            if architecture not in ARCHITECTURES:
                known = ", ".join(ARCHITECTURES)
                raise UsageError(f"values: {architecture!r} is none, expected {known}")
        return [a for a in ARCHITECTURES if a in chosen or a == "dense"]

    def measure(self, context: Context, keys: Sequence[str]) -> Iterator[Sequence[Point]]:
        """All that are missing in one run, beside dense."""
        if not keys:
            return
        spec = context.spec
        architectures = tuple(a for a in ARCHITECTURES if a in keys or a == "dense")
        report = bench_decode(
            DecodeSpec(
                like=_config(context),
                architectures=architectures,
                context=_positions(context),
                tokens=min(_TOKENS, _positions(context) - 1),
                dtype=str(context.machine.dtype).removeprefix("torch."),
                device=spec.device,
                threads=spec.threads,
                work=context.work / _WORK,
            ),
            context.progress,
        )
        yield [_point(result) for result in report.results if result.architecture in keys]

    def appendix(self, rows: Sequence[Point]) -> Mapping[str, str]:
        """Nothing more."""
        return {}

    def notes(self, context: Context, rows: Sequence[Point]) -> Sequence[str]:
        """Conditions that the table does not show."""
        machine = context.machine
        dtype = str(machine.dtype).removeprefix("torch.")
        return (
            f"{machine.device.type}, {dtype}, {_positions(context):,} positions filled, "
            f"{rows[0]['rounds']} rounds",
            "Memory counts weights and what may be held of tables, not keys and values.",
        )

    def draw(self, figure: Any, rows: Sequence[Point]) -> None:
        """Time and memory over dense, the bound and the paper's figures beside."""
        columns = (
            ("time of a token / dense", "time_ratio", "paper_time_ratio", "bound"),
            ("memory / dense", "memory_ratio", "paper_memory_ratio", None),
        )
        places = range(len(rows))
        for number, (title, own, theirs, bound) in enumerate(columns, start=1):
            axes = panel(figure, "", title, (1, 2, number))
            shown = [(own, CAREFUL, "measured"), (theirs, PAPER, "the paper, one A100")]
            if bound is not None:
                shown.insert(1, (bound, PLAIN, "bound: weights read"))
            for key, style, label in shown:
                points = {**style, "linestyle": "none"}
                axes.plot(places, [row[key] for row in rows], **points, label=label)
            axes.set_xticks(places, [row["model"] for row in rows])
            axes.set_ylim(bottom=0)
            axes.legend(loc="lower left")


def _config(context: Context) -> ModelConfig:
    path = context.spec.model
    if is_bundle(path):
        return ModelConfig.from_json(open_bundle(path).config(), f"{path}/config.json")
    return checkpoint_tensors(path).config


def _positions(context: Context) -> int:
    """Of the window asked for, else 256 or what the model has."""
    return context.spec.window or min(_CONTEXT, _config(context).max_position_embeddings)


def _point(result: DecodeResult) -> Point:
    memory, ms = ([float(cell) for cell in row[1:]] for row in TABLE_6.rows)
    place = ARCHITECTURES.index(result.architecture)
    return {
        "key": result.architecture,
        "model": result.architecture,
        "ms_per_token": result.ms_per_token,
        "time_ratio": result.ratio,
        "cpu_ratio": result.cpu_ratio,
        "bound": result.bound,
        "weights_bytes": result.weights_bytes,
        "tables_bytes": result.tables_bytes,
        "memory_ratio": result.memory_ratio,
        "table_read_bytes": result.table_read_bytes,
        "rounds": len(result.rounds_ms),
        "paper_time_ratio": ms[place] / ms[0],
        "paper_memory_ratio": memory[place] / memory[0],
    }
