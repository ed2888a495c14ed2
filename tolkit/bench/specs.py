"""What a user can ask of the benchmarks, checked before anything is made or read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tolkit.bench.generated import CODECS
from tolkit.bench.policies import SIMULATED
from tolkit.bench.shapes import ARCHITECTURES
from tolkit.errors import UsageError
from tolkit.model import ModelConfig
from tolkit.model.presets import PRESETS
from tolkit.runtime import TABLE_PLACES

__all__ = ["BATCHES", "POLICIES", "STATES", "DecodeSpec", "LookupSpec", "ReplaySpec"]

STATES = ("cold", "warm")
POLICIES = ("seeded", "lru", *SIMULATED)
BATCHES = (1, 64, 1024, 4096)


@dataclass(frozen=True)
class DecodeSpec:
    """One comparison of models that decode a text each, token by token.

    Attributes:
        inputs: checkpoints and bundles with weights of their own.
        preset: shape of the random models; None: that of `like`, the first input, or ``tiny``.
        like: a model whose shape they have.
        architectures: random models, of `tolkit.bench.shapes.ARCHITECTURES`; empty: all, or none
            beside inputs.
        tables: where rows of each model with tables lie, one variant each.
        layers, vocab_size: of the preset, where not its own.
        context: positions filled when a round ends; the keys and values before are made up.
        tokens: decoded in a round. rounds: of each variant, interleaved; one more is not counted.
        dtype: of weights and activations.
        codec: of generated tables.
        max_table_bytes: of the row cache, for tables on disk; None: a hundredth of the weights,
            but room for 64 records.
        cold: put the records out of the page cache before each round.
        threads: of torch; None: its own choice.
        work: folder for generated tables, kept; None: a temporary one.
    """

    inputs: tuple[Path, ...] = ()
    preset: str | None = None
    like: ModelConfig | None = None
    architectures: tuple[str, ...] = ()
    tables: tuple[str, ...] = ("disk",)
    layers: int | None = None
    vocab_size: int | None = None
    context: int = 256
    tokens: int = 16
    rounds: int = 5
    dtype: str = "bfloat16"
    device: str = "auto"
    codec: str = "nf4"
    max_table_bytes: int | None = None
    cold: bool = False
    threads: int | None = None
    work: Path | None = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise UsageError(f"preset: expected one of {', '.join(PRESETS)}, got {self.preset!r}")
        _require_known("arch", self.architectures, ARCHITECTURES)
        _require_known("tables", self.tables, TABLE_PLACES)
        _require_known("codec", (self.codec,), tuple(CODECS))
        for name in ("layers", "vocab_size", "tokens", "rounds", "threads"):
            _require_at_least(name, getattr(self, name), 1)
        if not self.tables:
            raise UsageError("tables: names no place", hint=f"give {', '.join(TABLE_PLACES)}")
        if self.context <= self.tokens:
            raise UsageError(
                f"context: {self.context} positions have no room for {self.tokens} tokens after "
                "the first",
                hint=f"give --context {self.tokens + 1} or more, or fewer --tokens",
            )


@dataclass(frozen=True)
class LookupSpec:
    """Look-ups of random tokens in one bundle.

    Attributes:
        batches: distinct tokens a call; empty: those of `BATCHES` the bundle has rows for.
        tables: places to look up from; for disk, in each of `states`.
        states: ``cold`` (records put out of the page cache before each call, no row cache) and
            ``warm`` (all records in the page cache, where they have room).
        repeats: calls of each kind; medians are given.
        max_table_bytes: of the row cache, for tables on disk and warm.
    """

    bundle: Path
    batches: tuple[int, ...] = ()
    tables: tuple[str, ...] = TABLE_PLACES
    states: tuple[str, ...] = STATES
    repeats: int = 9
    dtype: str = "float32"
    device: str = "auto"
    max_table_bytes: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        _require_known("tables", self.tables, TABLE_PLACES)
        _require_known("state", self.states, STATES)
        for name in ("repeats", "threads"):
            _require_at_least(name, getattr(self, name), 1)
        if min(self.batches, default=1) < 1:
            raise UsageError(f"batch: expected numbers of at least 1, got {list(self.batches)}")


@dataclass(frozen=True)
class ReplaySpec:
    """A text's tokens, one after the other, against row caches.

    Attributes:
        data: text, as `tolkit.data.read_documents` takes it.
        cache_bytes: sizes of the cache, the runtime's bookkeeping counted.
        policies: of `POLICIES`; ``seeded`` and ``lru`` are run, the others simulated. Empty: what
            is run, ``seeded`` only where token counts are known.
        states: of the page cache before a run.
        limit_tokens: only about the first so many tokens.
        read_latency_s, read_bytes_per_s: of the disk to predict for.
        step_s: what a token takes besides its row.
    """

    bundle: Path
    data: tuple[str, ...]
    cache_bytes: tuple[int, ...] = (1 << 20, 16 << 20, 256 << 20)
    policies: tuple[str, ...] = ()
    states: tuple[str, ...] = ("warm",)
    limit_tokens: int | None = None
    read_latency_s: float = 100e-6
    read_bytes_per_s: float = 2e9
    step_s: float = 0.0

    def __post_init__(self) -> None:
        _require_known("policy", self.policies, POLICIES)
        _require_known("state", self.states, STATES)
        _require_at_least("limit_tokens", self.limit_tokens, 1)
        for name in ("data", "cache_bytes", "states"):
            if not getattr(self, name):
                raise UsageError(f"{name}: there is none")
        if self.read_latency_s < 0 or self.step_s < 0:
            raise UsageError("read_latency_s, step_s: expected at least 0")
        if self.read_bytes_per_s <= 0:
            raise UsageError(f"read_bytes_per_s: expected above 0, got {self.read_bytes_per_s:g}")


def _require_known(name: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    for word in given:
        if word not in known:
            raise UsageError(f"{name}: expected {', '.join(known)}, got {word!r}")
    if len(set(given)) != len(given):
        raise UsageError(f"{name}: {','.join(given)} names one twice")


def _require_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UsageError(f"{name}: expected at least {least}, got {value}")
