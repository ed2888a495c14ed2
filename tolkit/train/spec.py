"""What a user asks of training, and the recipe each preset fills in.

V vocabulary, D hidden size, K inner size of an FFN, T positions of a window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from tolkit.errors import UsageError

__all__ = ["HEALING", "RECIPES", "TUNING", "Recipe", "TrainSpec", "or_default", "recipe_of"]

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class TrainSpec:
    """One training run. None means: what the recipe says (RECIPES; HEALING, TUNING).

    out: checkpoint folder to create, or the bundle when a bundle is healed; ``OUT.partial``
        beside it holds the unfinished run, and the same spec continues from it.
    text, valid_text: sources as in `tolkit.data.read_documents`. Without valid_text, "stdlib"
        splits itself and other text gives its last 2 % (at most 65,536 tokens).
    arch: memory, flex or dense; beta: 1, 2 or 3, flex only.
    preset: tiny (when None), 250m, 750m or 1b; layers, hidden_size, heads, vocab_size, memory_size
        (K of the token FFN, or of a dense model's FFN) replace its numbers.
    tokenizer: folder or tokenizer.json; None trains one of vocab_size ids on the text.
    init: checkpoint or bundle to go on from; it fixes the model and the tokenizer.
    freeze_tables: train around the tables of `init`, no value of which changes: a bundle's as
        stored, a checkpoint's through its embedding, memory norms and FFNs, which stay as they are.
    freeze_embeddings: leave the embedding (and a tied head) as it is in `init`.
    tune_tables: train what the rows of `init`, a bundle of codec bands or steps, share (means,
        scales, codebooks, bases, predictors); its records and its backbone stay as they are.
    distill: checkpoint or bundle whose next-token probabilities are learned from, KL(it || model);
        distill_weight: share of that in the loss, above 0, 1 when None; cross-entropy is the rest.
    steps, tokens, minutes: the budget, at most one. Minutes become a number of steps by timing
        a few before the first, so the learning-rate curve is known from the start.
    sequence: T. batch: windows of an optimiser step. micro_batch: windows of a forward pass.
    learning_rate: peak; it falls to final_ratio of it along a cosine after warmup_steps.
    weight_decay: AdamW's, of matrices.
    dtype: auto, float32 or bfloat16 (matrix products only). device: auto, cpu, cuda.
    eval_every, save_every: steps; save_every 0 saves every two minutes.
    cache_dir: kept folder for encoded text; None keeps it with the unfinished run.
    force: replace OUT. restart: discard an unfinished run.
    """

    out: Path
    text: tuple[str, ...] = ("stdlib",)
    valid_text: tuple[str, ...] = ()
    arch: str | None = None
    preset: str | None = None
    beta: int | None = None
    layers: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    vocab_size: int | None = None
    memory_size: int | None = None
    tie: bool = True
    tokenizer: Path | None = None
    init: Path | None = None
    freeze_tables: bool = False
    freeze_embeddings: bool = False
    tune_tables: bool = False
    distill: Path | None = None
    distill_weight: float | None = None
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    sequence: int | None = None
    batch: int | None = None
    micro_batch: int | None = None
    learning_rate: float | None = None
    final_ratio: float | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    clip_norm: float = 1.0
    z_loss: float = 1e-6
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    eval_every: int | None = None
    save_every: int = 0
    cache_dir: Path | None = None
    force: bool = False
    restart: bool = False

    @property
    def preset_name(self) -> str:
        """The preset asked for, or tiny."""
        return "tiny" if self.preset is None else self.preset


@dataclass(frozen=True)
class Recipe:
    """Numbers of a run after defaults. steps None: the budget is in minutes."""

    sequence: int
    batch: int
    micro_batch: int
    learning_rate: float
    warmup_steps: int
    steps: int | None
    eval_every: int
    final_ratio: float = 0.1
    weight_decay: float = 0.1


# tiny: tuned on two cores (tests/bench/train_speed.py); the others follow the paper's Table 3,
# which leaves the batch open: 512 windows of 2048 are about a million tokens.
_PAPER = Recipe(2048, 512, 4, 1e-4, 5000, None, 1000)
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "tiny": Recipe(128, 16, 16, 3e-3, 50, 500, 125),
        "250m": _PAPER,
        "750m": _PAPER,
        "1b": _PAPER,
    }
)
# With frozen tables: weights that work already are moved a little, so nothing pulls them to zero.
# Measured in tests/bench/reports/2026-11-21-healing.md.
HEALING = Recipe(256, 8, 8, 3e-4, 20, 300, 0, final_ratio=0.0, weight_decay=0.0)
# Every number moves by about as many per cent a step as the rate has hundredths (tuned_layer.py).
TUNING = Recipe(256, 8, 8, 1e-2, 10, 200, 0, final_ratio=0.0, weight_decay=0.0)


def recipe_of(spec: TrainSpec) -> Recipe:
    """The recipe of `spec`: its preset's numbers, or HEALING's, replaced by those given.

    Raises:
        UsageError: more than one budget, none where the preset has none, a number out of range, or
            options that need another one.
    """
    _check_start(spec)
    base = RECIPES.get(spec.preset_name)
    if base is None:
        raise UsageError(f"preset: expected one of {', '.join(RECIPES)}, got {spec.preset!r}")
    if spec.freeze_tables or spec.tune_tables:
        base = HEALING if spec.freeze_tables else TUNING
    sequence = or_default(spec.sequence, base.sequence)
    batch = or_default(spec.batch, base.batch)
    budgets = {"steps": spec.steps, "tokens": spec.tokens, "minutes": spec.minutes}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) > 1:
        raise UsageError(f"budget: {' and '.join(given)} given, expected one of them")
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise UsageError(f"{name}: expected a positive number, got {value}")
    steps = spec.steps
    if spec.tokens is not None and sequence > 0 and batch > 0:
        steps = math.ceil(spec.tokens / (sequence * batch))
    if not given:
        steps = base.steps
        if steps is None:
            raise UsageError(
                f"budget: preset {spec.preset_name} has no default length",
                hint="give --tokens, --steps or --minutes",
            )
    recipe = Recipe(
        sequence=sequence,
        batch=batch,
        micro_batch=min(batch, or_default(spec.micro_batch, base.micro_batch)),
        learning_rate=or_default(spec.learning_rate, base.learning_rate),
        warmup_steps=or_default(spec.warmup_steps, base.warmup_steps),
        steps=steps,
        eval_every=or_default(spec.eval_every, base.eval_every),
        final_ratio=or_default(spec.final_ratio, base.final_ratio),
        weight_decay=or_default(spec.weight_decay, base.weight_decay),
    )
    _check(recipe, spec)
    return recipe


def or_default(value: _Number | None, default: _Number) -> _Number:
    """`value`, or `default` where none was given."""
    return default if value is None else value


def _check_start(spec: TrainSpec) -> None:
    """UsageError for options that mean nothing without another one."""
    for name in ("freeze_tables", "freeze_embeddings", "tune_tables"):
        if getattr(spec, name) and spec.init is None:
            raise UsageError(
                f"{name}: a new model has nothing to keep as it is, expected --init too",
                hint="name the bundle or checkpoint to go on from with --init",
            )
    if spec.tune_tables and spec.freeze_tables:
        raise UsageError(
            "tune_tables: freeze_tables given too, which leaves the tables as they are",
            hint="give one of them; to run both, --tune-tables comes first",
        )
    if spec.distill_weight is not None:
        if spec.distill is None:
            raise UsageError("distill_weight: expected --distill too, the model to learn from")
        if not 0 < spec.distill_weight <= 1:
            raise UsageError(
                f"distill_weight: expected above 0 and at most 1, got {spec.distill_weight}"
            )


def _check(recipe: Recipe, spec: TrainSpec) -> None:
    at_least = {
        "sequence": (recipe.sequence, 1),
        "batch": (recipe.batch, 1),
        "micro_batch": (recipe.micro_batch, 1),
        "warmup_steps": (recipe.warmup_steps, 0),
        "eval_every": (recipe.eval_every, 0),
        "save_every": (spec.save_every, 0),
        "weight_decay": (recipe.weight_decay, 0),
        "z_loss": (spec.z_loss, 0),
        "final_ratio": (recipe.final_ratio, 0),
        "seed": (spec.seed, 0),
    }
    for name, (value, smallest) in at_least.items():
        if not smallest <= value < math.inf:
            raise UsageError(f"{name}: expected at least {smallest}, got {value}")
    for name, value in (("learning_rate", recipe.learning_rate), ("clip_norm", spec.clip_norm)):
        if not 0 < value < math.inf:
            raise UsageError(f"{name}: expected a positive number, got {value}")
    if recipe.batch % recipe.micro_batch:
        raise UsageError(
            f"micro_batch: expected a divisor of the batch of {recipe.batch}, "
            f"got {recipe.micro_batch}"
        )
