"""A model small enough for any test: V 96, D 32, 2 layers, K 48, and a character tokenizer.

`from _pico import pico_config, pico_model, pico_checkpoint`. Weights are drawn so that every part
of a block matters to the logits (the decoder's own initial weights are nearly silent).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models

from tolkit.model import Decoder, ModelConfig, save_checkpoint

PICO_VOCAB = 96
BOS, EOS = "<bos>", "<eos>"


def pico_config(architecture: str = "memory", **overrides: Any) -> ModelConfig:
    """Two layers of D 32 with grouped-query attention (4 heads, 2 key-value heads)."""
    values: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": PICO_VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": {"dense": 48, "memory": 0, "flex": 16}[architecture],
        "memory_intermediate_size": {"dense": 0, "memory": 48, "flex": 40}[architecture],
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return ModelConfig(**{**values, **overrides})


def pico_model(
    architecture: str = "memory",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Decoder:
    """A decoder of `pico_config` with loud weights; equal for equal arguments."""
    model = Decoder(pico_config(architecture, **overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    return model.to(dtype)


def pico_tokenizer_files() -> dict[str, bytes]:
    """A character tokenizer of 96 tokens: <bos>, <eos>, line feed, ASCII 32 to 124."""
    characters = ["\n", *map(chr, range(32, 125))]
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.decoder = decoders.Fuse()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def pico_counts() -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Zipf-like token counts [96], the last four tokens never seen."""
    counts = (100_000 / np.arange(1, PICO_VOCAB + 1)).astype(np.uint64)
    counts[-4:] = 0
    return np.random.default_rng(0).permutation(counts)


def pico_checkpoint(
    path: Path,
    architecture: str = "memory",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    counts: bool = True,
    **overrides: Any,
) -> Path:
    """Write `pico_model` with tokenizer and token counts as a checkpoint folder; returns `path`."""
    save_checkpoint(
        pico_model(architecture, seed=seed, dtype=dtype, **overrides),
        path,
        pico_tokenizer_files(),
        pico_counts() if counts else None,
    )
    return path


def pico_ids(batch: int = 3, length: int = 17, *, seed: int = 0) -> torch.Tensor:
    """Token ids int64 [batch, length] with repeats."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, PICO_VOCAB // 4, (batch, length), generator=generator)


def same_weights(first: Decoder, second: Decoder) -> bool:
    """Equal parameters under equal names in one order."""
    mine, theirs = first.state_dict(), second.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)
