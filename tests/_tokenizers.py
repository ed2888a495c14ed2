"""The pico tokenizer with one thing changed."""

from __future__ import annotations

import json
from collections.abc import Callable

from _pico import pico_tokenizer_files


def tokenizer_with(change: Callable[[dict], object]) -> bytes:
    document = json.loads(pico_tokenizer_files()["tokenizer.json"])
    change(document)
    return json.dumps(document).encode()


def permute(document: dict) -> None:
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def shrink(document: dict) -> None:
    del document["model"]["vocab"]["a"]


def add_token(document: dict) -> None:
    document["added_tokens"].append(
        {
            "id": 96, "content": "<more>", "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
    )  # fmt: skip


def grow(document: dict) -> None:
    document["model"]["vocab"]["zz"] = 96


def rename(document: dict) -> None:
    vocabulary = document["model"]["vocab"]
    vocabulary["\u00e9"] = vocabulary.pop("a")
