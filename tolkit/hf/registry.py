"""Telling transformers' Auto classes which of ours belong to model_type "memoryllm"."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from tolkit.hf.config import MemoryLlmConfig
from tolkit.hf.model import MemoryLlmForCausalLM

__all__ = ["register"]


def register() -> None:
    """Register configuration, model and tokenizer; done by `import tolkit.hf`, and repeatable."""
    AutoConfig.register(MemoryLlmConfig.model_type, MemoryLlmConfig, exist_ok=True)
    AutoModelForCausalLM.register(MemoryLlmConfig, MemoryLlmForCausalLM, exist_ok=True)
    AutoTokenizer.register(
        MemoryLlmConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True
    )
