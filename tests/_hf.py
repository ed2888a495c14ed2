"""What the transformers tests share: model kinds, and one folder in each of its two forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _pico import pico_checkpoint

from tolkit.build import build
from tolkit.model import Decoder
from tolkit.progress import SilentProgress

HF_KINDS: dict[str, dict[str, Any]] = {
    "memory": {"architecture": "memory"},
    "memory, untied, full heads": {
        "architecture": "memory",
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
    },
    "memory, one kv head": {"architecture": "memory", "num_key_value_heads": 1},
    "flex": {"architecture": "flex"},
    "flex, linear": {"architecture": "flex", "context_mlp_type": "linear"},
    "flex, reads residual": {"architecture": "flex", "context_mlp_input": "residual"},
}


def both_forms(folder: Path, **kind: Any) -> dict[str, Path]:
    """A checkpoint and the bundle of its float32 tables."""
    checkpoint = pico_checkpoint(folder / "ckpt", **kind)
    build(checkpoint, folder / "full.tol", dtype="f32", progress=SilentProgress())
    return {"checkpoint": checkpoint, "bundle": folder / "full.tol"}


@torch.no_grad()
def naive_greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """The prompt and `count` likeliest next tokens, everything computed anew for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids
