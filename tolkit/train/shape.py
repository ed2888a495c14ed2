"""The shape a run trains: a preset with its numbers replaced, or what an init model fixes.

V vocabulary, D hidden size, K inner size of an FFN.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tolkit.errors import UsageError
from tolkit.model import PRESETS, ModelConfig, preset
from tolkit.train.spec import TrainSpec, or_default

__all__ = ["check_init", "default_vocab_size", "model_config"]


def default_vocab_size(spec: TrainSpec) -> int:
    """V of a tokenizer trained for the preset."""
    return PRESETS[spec.preset_name].vocab_size


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
    config = preset(spec.preset_name, arch, beta, vocab_size, spec.tie)
    width = or_default(spec.hidden_size, config.hidden_size)
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
        num_hidden_layers=or_default(spec.layers, config.num_hidden_layers),
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
    """UsageError when `spec` asks for another model than the one it goes on from."""
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
            raise UsageError(
                f"{name}: {asked} asked for, {spec.init} has {value}",
                hint=f"leave --{name.replace('_', '-')} out, --init fixes it",
            )
    if spec.preset is not None:
        shape = PRESETS[spec.preset]
        asked_shape = (
            or_default(spec.layers, shape.layers),
            or_default(spec.hidden_size, shape.hidden_size),
        )
        if asked_shape != (config.num_hidden_layers, config.hidden_size):
            raise UsageError(
                f"preset: {spec.preset} has {asked_shape[0]} layers of width {asked_shape[1]}, "
                f"{spec.init} has {config.num_hidden_layers} of width {config.hidden_size}",
                hint="leave --preset out, --init fixes the model",
            )
