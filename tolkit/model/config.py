"""What a decoder is made of: the frozen settings behind `config.json`.

V vocabulary, L layers, D hidden size, K inner size of an FFN.
Key names are Hugging Face's where they exist; a dense model is a plain Llama configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tolkit.errors import CheckpointError
from tolkit_formats.limits import MAX_HIDDEN_SIZE, MAX_INTEGER, MAX_LAYERS, MAX_VOCAB_SIZE

__all__ = ["Architecture", "ContextInput", "ContextKind", "ModelConfig"]

Architecture = Literal["dense", "memory", "flex"]
ContextKind = Literal["swiglu", "linear"]
ContextInput = Literal["post_attention", "residual"]

_MODEL_TYPES = ("memoryllm", "llama")
_MAX_INNER_SIZE = 1 << 20


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one decoder.

    `intermediate_size` is the inner size of the FFN that reads the residual stream (the dense
    FFN, or FFN-C of a flex model; 0 for memory models). `memory_intermediate_size` is K of the
    FFN that reads only the token embedding (0 for dense models).
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    memory_intermediate_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    context_mlp_type: ContextKind = "swiglu"
    context_mlp_input: ContextInput = "post_attention"
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head, D / heads."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_tables(self) -> bool:
        """Whether the model has a token-indexed FFN in every layer."""
        return self.architecture != "dense"

    @property
    def has_context_mlp(self) -> bool:
        """Whether a block holds an FFN on the residual stream (dense FFN or FFN-C)."""
        return self.architecture != "memory"

    @classmethod
    def from_json(cls, values: Mapping[str, object], where: str = "config.json") -> ModelConfig:
        """Read the keys of a `config.json`; keys tolkit does not know are ignored.

        Args:
            values: the parsed JSON object.
            where: what to call it in errors.

        Raises:
            CheckpointError: a missing or impossible value, or a Llama feature tolkit does not run.
        """
        return _Reader(values, where).config()

    def to_json(self) -> dict[str, object]:
        """The `config.json` object of this model, keys in a fixed order."""
        shared: dict[str, object] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "intermediate_size": self.intermediate_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
        }
        if self.architecture == "dense":
            return {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                **shared,
                "head_dim": self.head_dim,
                "hidden_act": "silu",
                "attention_bias": False,
                "mlp_bias": False,
                "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            }
        own: dict[str, object] = {
            "architectures": ["MemoryLLMForCausalLM"],
            "model_type": "memoryllm",
            "architecture_kind": self.architecture,
            **shared,
            "memory_intermediate_size": self.memory_intermediate_size,
        }
        if self.architecture == "flex":
            own["context_mlp_type"] = self.context_mlp_type
            own["context_mlp_input"] = self.context_mlp_input
        return own


class _Reader:
    """Typed look-ups in an untrusted JSON object, each failure naming file and key."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, problem: str, hint: str = "") -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}", hint=hint)

    def integer(self, key: str, maximum: int, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.fail(f"{key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(f"{key} must be an integer of at least 1, got {value!r}")
        if value > maximum:
            raise self.fail(f"{key} must be an integer of at most {maximum}, got {value}")
        return value

    def positive(self, key: str, default: float) -> float:
        return self._positive(key, self.values.get(key), default)

    def _positive(self, key: str, value: object, default: float) -> float:
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool):
            if math.isfinite(value) and value > 0:
                return float(value)
        raise self.fail(f"{key} must be a positive finite number, got {value!r}")

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(f"{key} must be true or false, got {value!r}")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None) -> str:
        value = self.values.get(key, default)
        if value not in allowed:
            raise self.fail(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
        return str(value)

    def token(self, key: str, vocab_size: int) -> int | None:
        value = self.values.get(key)
        if isinstance(value, list) and value:  # Llama 3 lists several ends; the first is the text's
            value = value[0]
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fail(f"{key} must be a token id, got {value!r}")
        if value >= vocab_size:
            raise self.fail(f"{key} {value} is outside the vocabulary of {vocab_size}")
        return value

    def rope_theta(self) -> float:
        nested = self.values.get("rope_parameters")
        scaling = self.values.get("rope_scaling")
        for block in (nested, scaling):
            if block is None:
                continue
            if not isinstance(block, dict):
                raise self.fail(f"rope_parameters must be an object, got {block!r}")
            kind = block.get("rope_type", block.get("type", "default"))
            if kind != "default":
                raise self.fail(f"rope type {kind!r} is not supported, expected 'default'")
        flat = self.positive("rope_theta", 0.0)
        nested_theta = nested.get("rope_theta") if isinstance(nested, dict) else None
        inner = self._positive("rope_parameters.rope_theta", nested_theta, 0.0)
        if flat and inner and flat != inner:
            raise self.fail(f"rope_theta {flat} and rope_parameters.rope_theta {inner} disagree")
        return flat or inner or 10000.0

    def config(self) -> ModelConfig:
        model_type = self.values.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise self.fail(
                f"model_type {model_type!r} is not supported, expected "
                + " or ".join(repr(name) for name in _MODEL_TYPES)
            )
        if self.values.get("quantization_config") is not None:
            raise self.fail(
                "quantization_config: quantised weights are not read, expected f32, f16 or bf16",
                hint="use the checkpoint the quantised one was made from",
            )
        for key in ("attention_bias", "mlp_bias"):
            if self.flag(key, False):
                raise self.fail(f"{key} is true: models with biases are not supported")
        activation = self.values.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise self.fail(f"hidden_act {activation!r} is not supported, expected 'silu'")
        kind = "dense"
        if model_type == "memoryllm":
            kind = self.choice("architecture_kind", ("memory", "flex"), None)
        hidden = self.integer("hidden_size", MAX_HIDDEN_SIZE)
        heads = self.integer("num_attention_heads", hidden)
        kv_heads = self.integer("num_key_value_heads", heads, heads)
        if hidden % heads or hidden // heads % 2:
            raise self.fail(f"hidden_size {hidden} over {heads} heads must be an even whole number")
        if heads % kv_heads:
            raise self.fail(f"num_attention_heads {heads} is not a multiple of {kv_heads} kv heads")
        head_dim = self.values.get("head_dim")
        if head_dim is not None and head_dim != hidden // heads:
            raise self.fail(
                f"head_dim must be hidden_size / heads = {hidden // heads}, got {head_dim!r}"
            )
        vocab_size = self.integer("vocab_size", MAX_VOCAB_SIZE)
        return ModelConfig(
            architecture=kind,  # type: ignore[arg-type]  # checked by choice()
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_hidden_layers=self.integer("num_hidden_layers", MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=(
                0 if kind == "memory" else self.integer("intermediate_size", _MAX_INNER_SIZE)
            ),
            memory_intermediate_size=(
                0 if kind == "dense" else self.integer("memory_intermediate_size", _MAX_INNER_SIZE)
            ),
            rms_norm_eps=self.positive("rms_norm_eps", 1e-6 if kind == "dense" else 1e-5),
            rope_theta=self.rope_theta(),
            max_position_embeddings=self.integer("max_position_embeddings", MAX_INTEGER, 2048),
            tie_word_embeddings=self.flag("tie_word_embeddings", False),
            context_mlp_type=self.choice("context_mlp_type", ("swiglu", "linear"), "swiglu"),  # type: ignore[arg-type]  # checked by choice()
            context_mlp_input=self.choice(  # type: ignore[arg-type]  # checked by choice()
                "context_mlp_input", ("post_attention", "residual"), "post_attention"
            ),
            bos_token_id=self.token("bos_token_id", vocab_size),
            eos_token_id=self.token("eos_token_id", vocab_size),
        )
