"""The configuration of a memory or flex model as transformers holds it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from tolkit.model import ModelConfig

__all__ = ["MemoryLlmConfig"]


class MemoryLlmConfig(PretrainedConfig):  # type: ignore[misc]  # transformers has no types here
    """The keys of a checkpoint's config.json under their own names, defaults of a small model.

    `to_model_config` checks them; building one checks nothing, as transformers expects.
    """

    model_type = "memoryllm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        architecture_kind: str = "memory",
        vocab_size: int = 32000,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        intermediate_size: int = 0,
        memory_intermediate_size: int = 688,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 2048,
        tie_word_embeddings: bool = True,
        context_mlp_type: str = "swiglu",
        context_mlp_input: str = "post_attention",
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.architecture_kind = architecture_kind
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.intermediate_size = intermediate_size
        self.memory_intermediate_size = memory_intermediate_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.context_mlp_type = context_mlp_type
        self.context_mlp_input = context_mlp_input
        self.use_cache = use_cache
        # transformers 4 knows the format of the weights as torch_dtype, 5 takes either name.
        old_dtype = kwargs.pop("torch_dtype", None)
        kwargs["torch_dtype"] = kwargs.pop("dtype", None) or old_dtype
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @classmethod
    def from_model_config(cls, config: ModelConfig, **kwargs: Any) -> MemoryLlmConfig:
        """The transformers form of a memory or flex configuration; `kwargs` are added."""
        assert config.has_tables, "a dense model is a LlamaConfig"
        values = {k: v for k, v in config.to_json().items() if k != "model_type"}
        return cls(**{**values, **kwargs})

    def to_model_config(self) -> ModelConfig:
        """The checked tolkit form.

        Raises:
            CheckpointError: a missing or impossible value; it names the key.
        """
        return ModelConfig.from_json(self.to_dict(), f"{self.name_or_path or 'MemoryLlmConfig'}")
