"""Quality against size: this toolchain's tables beside other libraries' formats and the bound."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tolkit.calibrate import load_metric
from tolkit.compress import CompressSpec, open_for
from tolkit.compress.fill.bands import floor_bytes
from tolkit.compress.plan import plan_compress
from tolkit.errors import UsageError
from tolkit.evaluate.adjust import require_tables
from tolkit.model import FfnRows, RowSource
from tolkit.sources import open_source
from tolkit.study import pareto_draw
from tolkit.study.bundles import compressed
from tolkit.study.context import Context
from tolkit.study.fields import QUALITY, Field
from tolkit.study.paper import PARETO
from tolkit.study.pareto_ffn import with_stored_ffn
from tolkit.study.pareto_methods import (
    FFN,
    OWN,
    Own,
    bits_at_1b,
    chosen_names,
    ffn_bits_at_1b,
    missing_libraries,
    usable_peers,
)
from tolkit.study.pareto_tables import Bench
from tolkit.study.peers import FFN_PEER, GGUF_READ_ONLY, PEERS, Peer, installed_version
from tolkit.study.store import Point
from tolkit.study.study import TAKES, EvaluatedStudy, Opened, Variant
from tolkit_formats import files

__all__ = ["ParetoStudy"]

_BOUND_BITS = (0.5, 1.0, 2.0, 4.0, 8.0)
_CURVE_BITS = tuple(2 ** (step / 8) for step in range(-32, 37))
_FEEDBACK = "feedback"


class ParetoStudy(EvaluatedStudy):
    """The frontier, with peers and the Gaussian bound."""

    name = "pareto"
    title = "Quality against size"
    about = (
        "Tables stored by this toolchain, with error feedback over depth and plain, and by other "
        "libraries (named in front), each read back and used in place of the model's own; ffn-nf4 "
        "keeps no table but the FFN weights, in nf4, and recomputes rows. Bits/value count "
        "everything stored; the 1B column is the same format at V 128,256, D 2048. Table error "
        "is the squared error of all tables over their variance, sum error that of the running "
        "sum over layers, which feedback keeps small. Gap is bits/value above the Gaussian "
        "rate-distortion bound (reverse water-filling over the tables' spectra) at the table "
        "error, of feedback at the sum error; below zero only what knows more of the rows than "
        "their covariance."
    )
    fields = (
        Field("method", "method", "text"),
        Field("mode", "mode", "text"),
        Field("bytes", "size", "bytes"),
        Field("bits_per_value", "bits/value"),
        Field("bits_at_1b", "at 1B"),
        *QUALITY[1:],
        Field("table_error", "table error", "small"),
        Field("sum_error", "sum error", "small"),
        Field("gap_bits", "gap", "number"),
    )
    paper = PARETO
    takes = TAKES | {"keep", "calibration"}
    at_once = 2

    def fingerprint(self, context: Context) -> Mapping[str, Any]:
        """Row weights and calibration besides: neither belongs to the model's identity."""
        source = open_source(context.spec.model)
        counts_V = source.token_counts_V
        weights = None if counts_V is None else hashlib.sha256(counts_V.tobytes()).hexdigest()
        name = _calibration(context)
        if name is not None:
            load_metric(name, source)  # refused before a result belongs to it
        calibration = None if name is None else _digest(Path(name))
        return {**super().fingerprint(context), "counts": weights, "calibration": calibration}

    def keys(self, context: Context) -> list[str]:
        """Own variants, peers, FFN weights, and the bound at some rates."""
        return [*super().keys(context), *map(_bound_key, _BOUND_BITS)]

    def variants(self, context: Context) -> list[Variant]:
        """All that can be had here of what was asked for."""
        return self._variants(context, Bench(context))

    def measure(self, context: Context, keys: Sequence[str]) -> Iterator[Sequence[Point]]:
        """See Study; variants share the model's own table."""
        bench = Bench(context)
        waiting = [one for one in self._variants(context, bench) if one.key in keys]
        yield from self.evaluated(context, waiting)
        rates = [bits for bits in _BOUND_BITS if _bound_key(bits) in keys]
        if rates:
            curve = [[bits, bench.bound.error_at(bits)] for bits in _CURVE_BITS]
            yield [_bound_point(bench, bits, curve) for bits in rates]

    def notes(self, context: Context, rows: Sequence[Point]) -> Sequence[str]:
        """What is missing and why, and what the others' versions were."""
        versions = dict.fromkeys(row["version"] for row in rows if row.get("version"))
        found = []
        if versions:
            found.append(f"Measured with {', '.join(versions)}.")
        missing = missing_libraries()
        if missing:
            found.append(f"Not installed: {', '.join(missing)} (pip install 'tolkit[peers]').")
        width = open_source(context.spec.model).hidden_size
        for peer in PEERS:
            problem = peer.misfit(width)
            if peer.package not in missing and problem is not None:
                found.append(f"Left out: {peer.name}, {problem}.")
        small = [own.name for own in OWN if not _fits(context, own)]
        if small:
            found.append(f"Left out: {', '.join(small)}, of which shared arrays would take half.")
        if "gguf" not in missing:
            kinds = ", ".join(GGUF_READ_ONLY)
            found.append(f"Left out: {kinds}, which the gguf package reads but does not write.")
        return found

    def appendix(self, rows: Sequence[Point]) -> Mapping[str, str]:
        """The bound at many rates."""
        curve = next(row["curve"] for row in rows if row.get("curve"))
        lines = ["bits_per_value,table_error", *(f"{bits},{error}" for bits, error in curve)]
        return {"bound": "\n".join(lines) + "\n"}

    def draw(self, figure: Any, rows: Sequence[Point]) -> None:
        """KL divergence, and error with the bound, over bits a value."""
        pareto_draw.draw(figure, rows)

    def _variants(self, context: Context, bench: Bench) -> list[Variant]:
        require_tables(context.runnable)
        names = chosen_names(context.spec.values, bench.width)
        found = [
            _own(context, bench, own, mode)
            for own in OWN
            if (names is None or own.name in names) and _fits(context, own)
            for mode in own.modes
        ]
        for peer in usable_peers(bench.width):
            if names is None or peer.name in names:
                found.append(_peer(context, bench, peer))
        if context.runnable.rows is None and (names is None or FFN in names):
            found.append(_ffn(context, bench))
        if not found:
            raise UsageError(
                f"values: {context.spec.values!r} needs FFN weights, "
                f"{context.spec.model} is a bundle"
            )
        return found


def _calibration(context: Context) -> str | None:
    """The file of `tol calibrate` that budgets look at, if one is named."""
    named = context.spec.calibration
    if len(named) > 1:
        raise UsageError(f"calibration: pareto takes one file, got {len(named)}")
    return named[0] if named else None


def _fits(context: Context, own: Own) -> bool:
    """Whether the model is large enough for that size: its shared arrays may take more."""
    if "bits_per_value" not in own.options:
        return True
    spec = CompressSpec(**own.options)
    source, counts_V, _ = open_for(context.spec.model, spec)
    plan = plan_compress(source, spec)
    return floor_bytes(source, plan, counts_V) <= 0.5 * plan.table_bytes


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    for chunk in files.read_chunks(path, 1 << 20):
        found.update(chunk)
    return found.hexdigest()


def _own(context: Context, bench: Bench, own: Own, mode: str) -> Variant:
    facts = {"method": own.name, "family": "ours"}
    options = dict(own.options)
    if "bits_per_value" in options and _calibration(context) is not None:
        options["calibration"] = _calibration(context)
    plain = compressed(context, f"{own.name} {mode}", facts, mode, **options)

    def open_(stack: ExitStack) -> Opened:
        opened = plain.open(stack)
        assert opened.runnable.rows is not None
        bits = opened.facts["bits_per_value"]
        off = _off(context, bench, opened.runnable.rows, bits, mode)
        return dataclasses.replace(opened, facts={**opened.facts, **off})

    return dataclasses.replace(plain, open=open_)


def _peer(context: Context, bench: Bench, peer: Peer) -> Variant:
    facts = {
        "method": peer.name,
        "family": peer.package,
        "mode": "plain",
        "version": f"{peer.package} {installed_version(peer.package)}",
    }

    def open_(stack: ExitStack) -> Opened:
        table, size_bytes = bench.stored(peer)
        stack.callback(table.remove)
        sizes = _sizes(bench, size_bytes, bits_at_1b(peer))
        off = _off(context, bench, table, sizes["bits_per_value"], "plain")
        return Opened(dataclasses.replace(context.runnable, rows=table), {**sizes, **off})

    return Variant(peer.name, facts, open_)


def _ffn(context: Context, bench: Bench) -> Variant:
    facts = {
        "method": FFN,
        "family": FFN,
        "mode": "recomputed",
        "version": f"{FFN_PEER.package} {installed_version(FFN_PEER.package)}",
    }

    def open_(stack: ExitStack) -> Opened:
        runnable, size_bytes = with_stored_ffn(context.runnable, FFN_PEER)
        sizes = _sizes(bench, size_bytes, ffn_bits_at_1b())
        rows = FfnRows(runnable.model)
        off = _off(context, bench, rows, sizes["bits_per_value"], "recomputed")
        return Opened(runnable, {**sizes, **off})

    return Variant(FFN, facts, open_)


def _sizes(bench: Bench, size_bytes: int, at_1b: float) -> dict[str, Any]:
    bits = 8 * size_bytes / bench.values
    return {"bytes": size_bytes, "bits_per_value": bits, "bits_at_1b": at_1b}


def _off(
    context: Context, bench: Bench, rows: RowSource, bits: float, mode: str
) -> dict[str, float | None]:
    """Errors of a variant, and its distance from the bound at the error it keeps small."""
    errors = bench.errors(rows, context.machine.device)
    kept = errors.running_sum if mode == _FEEDBACK else errors.table
    gap = None if kept is None else bits - bench.bound.bits_for(kept)
    return {"table_error": errors.table, "sum_error": errors.running_sum, "gap_bits": gap}


def _bound_key(bits: float) -> str:
    return f"bound {bits:g}"


def _bound_point(bench: Bench, bits: float, curve: list[list[float]]) -> Point:
    return {
        "key": _bound_key(bits),
        "method": "Gaussian bound",
        "family": "bound",
        "mode": "bound",
        "bits_per_value": bits,
        "table_error": bench.bound.error_at(bits),
        "curve": curve,
    }
