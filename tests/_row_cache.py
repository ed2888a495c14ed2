"""What the tests of the row cache share: bundles of every kind, and a watch on reads."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from _bands import write_bands
from _coded import write_coded
from _nano import ALL_CODECS, NF4, RAW_F32, svd, write_nano

from tolkit_formats import Bundle, open_bundle

BUNDLES: dict[str, Callable[[Path], object]] = {
    "all codecs": lambda path: write_nano(path, ALL_CODECS),
    "no counts": lambda path: write_nano(path, [NF4, svd(5, NF4)], counts=False),
    "raw f32": lambda path: write_nano(path, [RAW_F32] * 3, hidden_size=7),
    "one token": lambda path: write_nano(path, [RAW_F32], vocab_size=1, tokenizer=False),
    "three tiers, predictors": write_bands,
    "coded, two tiers": write_coded,
    "coded, a tier of means": lambda path: write_coded(path, counts=(1,)),
    "shards": lambda path: write_nano(path, [NF4], vocab_size=2500, max_shard_bytes=1),
}


def plain(path: Path, *, counts: bool = False, vocab_size: int = 40) -> Bundle:
    """Slots are token ids, unless there are counts."""
    return open_bundle(write_nano(path, [NF4], counts=counts, vocab_size=vocab_size).path)


class Watch:
    """Counts reads of records; fails those it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.reads: list[str] = []
        self._fail_at = fail_at

    def __call__(self, operation: str, path: str) -> None:
        if operation == "pread":
            self.reads.append(path)
            if len(self.reads) - 1 == self._fail_at:
                raise OSError(errno.EIO, "Input/output error")
