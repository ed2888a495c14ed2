"""What a user asks of training, and the recipe each preset fills in.

V vocabulary, D hidden size, K inner size of an FFN, T positions of a window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from tolkit.errors import MismatchError, UsageError
from tolkit.model import PRESETS, ModelConfig, preset

__all__ = [
    "RECIPES",
    "Recipe",
    "TrainSpec",
    "check_init",
    "default_vocab_size",
    "model_config",
    "recipe_of",
]


@dataclass(frozen=True)
class TrainSpec:
    """One training run. None means: what the preset's recipe says (see RECIPES).

    out: checkpoint folder to create; ``OUT.partial`` beside it holds the unfinished run, and the
        same spec continues from it.
    text, valid_text: sources as in `tolkit.data.read_documents`. Without valid_text, "stdlib"
        splits itself and other text gives its last 2 % (at most 65,536 tokens).
    arch: memory, flex or dense; beta: 1, 2 or 3, flex only.
    preset: tiny, 250m, 750m or 1b; layers, hidden_size, heads, vocab_size, memory_size (K of
        the token FFN, or of a dense model's FFN) replace its numbers.
    tokenizer: folder or tokenizer.json; None trains one of vocab_size ids on the text.
    init: checkpoint to go on from; it fixes the model and the tokenizer.
    steps, tokens, minutes: the budget, at most one. Minutes become a number of steps by timing
        a few before the first, so the learning-rate curve is known from the start.
    sequence: T. batch: windows of an optimiser step. micro_batch: windows of a forward pass.
    learning_rate: peak; it falls to final_ratio of it along a cosine after warmup_steps.
    dtype: auto, float32 or bfloat16 (matrix products only). device: auto, cpu, cuda.
    eval_every, save_every: steps; save_every 0 saves every two minutes.
    cache_dir: kept folder for encoded text; None keeps it with the unfinished run.
    force: replace OUT. restart: discard an unfinished run.
    """

    out: Path
    text: tuple[str, ...] = ("stdlib",)
    valid_text: tuple[str, ...] = ()
    arch: str | None = None
    preset: str = "tiny"
    beta: int | None = None
    layers: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    vocab_size: int | None = None
    memory_size: int | None = None
    tie: bool = True
    tokenizer: Path | None = None
    init: Path | None = None
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    sequence: int | None = None
    batch: int | None = None
    micro_batch: int | None = None
    learning_rate: float | None = None
    final_ratio: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.1
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


def recipe_of(spec: TrainSpec) -> Recipe:
    """The recipe of `spec`: its preset's numbers, replaced by those given.

    Raises:
        UsageError: more than one budget, none where the preset has none, or a number out of range.
    """
    base = RECIPES.get(spec.preset)
    if base is None:
        raise UsageError(f"preset: expected one of {', '.join(RECIPES)}, got {spec.preset!r}")
    sequence = _given(spec.sequence, base.sequence)
    batch = _given(spec.batch, base.batch)
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
                f"budget: preset {spec.preset} has no default length",
                hint="give --tokens, --steps or --minutes",
            )
    recipe = Recipe(
        sequence=sequence,
        batch=batch,
        micro_batch=min(batch, _given(spec.micro_batch, base.micro_batch)),
        learning_rate=spec.learning_rate if spec.learning_rate is not None else base.learning_rate,
        warmup_steps=_given(spec.warmup_steps, base.warmup_steps),
        steps=steps,
        eval_every=_given(spec.eval_every, base.eval_every),
    )
    _check(recipe, spec)
    return recipe


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _check(recipe: Recipe, spec: TrainSpec) -> None:
    at_least = {
        "sequence": (recipe.sequence, 1),
        "batch": (recipe.batch, 1),
        "micro_batch": (recipe.micro_batch, 1),
        "warmup_steps": (recipe.warmup_steps, 0),
        "eval_every": (recipe.eval_every, 0),
        "save_every": (spec.save_every, 0),
        "weight_decay": (spec.weight_decay, 0),
        "z_loss": (spec.z_loss, 0),
        "final_ratio": (spec.final_ratio, 0),
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


def default_vocab_size(spec: TrainSpec) -> int:
    """V of a tokenizer trained for the preset."""
    return PRESETS[spec.preset].vocab_size


def model_config(spec: TrainSpec, vocab_size: int, sequence: int) -> ModelConfig:
    """Shape of a new model of `vocab_size` ids that reads windows of `sequence`.

    Raises:
        UsageError: numbers that do not make a model.
    """
    for name in ("layers", "hidden_size", "heads", "memory_size"):
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")
    arch = spec.arch or "memory"
    if spec.beta is not None and arch != "flex":
        raise UsageError(f"beta: only a flex model has one, arch is {arch}")
    beta = 3 if spec.beta is None else spec.beta
    config = preset(spec.preset, arch, beta, vocab_size, spec.tie)
    width = _given(spec.hidden_size, config.hidden_size)
    heads = _heads(spec, config, width)
    if width % (2 * heads):
        raise UsageError(
            f"hidden_size: expected a multiple of twice the heads ({heads}), got {width}"
        )
    context, memory = config.intermediate_size, config.memory_intermediate_size
    if width != config.hidden_size:
        whole = _inner_size(8 * width / 3)
        context = {"memory": 0, "dense": whole}.get(arch, round(beta * width / 3))
        memory = {"memory": whole, "dense": 0}.get(arch, _inner_size((8 - beta) * width / 3))
    if spec.memory_size is not None:
        if arch == "dense":
            context = spec.memory_size
        else:
            memory = spec.memory_size
    return replace(
        config,
        hidden_size=width,
        num_hidden_layers=_given(spec.layers, config.num_hidden_layers),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=context,
        memory_intermediate_size=memory,
        max_position_embeddings=max(config.max_position_embeddings, sequence),
    )


def _heads(spec: TrainSpec, config: ModelConfig, width: int) -> int:
    """Heads given, or as many as keep the preset's head width, or the nearest that divides D."""
    if spec.heads is not None:
        return spec.heads
    wanted = max(1, round(width / config.head_dim))
    fitting = [h for h in range(1, width + 1) if width % (2 * h) == 0]
    if not fitting:
        raise UsageError(f"hidden_size: expected an even number, got {width}")
    return min(fitting, key=lambda h: (abs(h - wanted), h))


def _inner_size(value: float) -> int:
    """Rounded up to a multiple of 8."""
    return 8 * math.ceil(value / 8)


def check_init(spec: TrainSpec, config: ModelConfig) -> None:
    """MismatchError when `spec` asks for another model than the init checkpoint holds."""
    ffn = config.intermediate_size if config.architecture == "dense" else None
    held: dict[str, object] = {
        "arch": config.architecture,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "memory_size": config.memory_intermediate_size if ffn is None else ffn,
    }
    for name, value in held.items():
        asked = getattr(spec, name)
        if asked is not None and asked != value:
            raise MismatchError(
                f"{name}: {asked} asked for, the init checkpoint {spec.init} has {value}",
                hint=f"leave --{name.replace('_', '-')} out, the checkpoint fixes it",
            )
