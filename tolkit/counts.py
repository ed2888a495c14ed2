"""Token counts on disk: how often each token stands in some text (`tol count`).

The file is token_counts.safetensors as `train` writes it (U64 [V]); the digest of the tokenizer
stands in its metadata, so counts of another tokenizer are noticed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tolkit.errors import DataError, MismatchError
from tolkit.sources import TableSource
from tolkit_formats.errors import BundleError
from tolkit_formats.tensorfile import TensorFile, write_tensors

__all__ = ["COUNTS_NAME", "assumed_counts", "load_counts", "save_counts"]

COUNTS_NAME = "token_counts"


def assumed_counts(vocab_size: int) -> npt.NDArray[np.uint64]:
    """Counts that fall with the token id by Zipf's law, U64 [V], for when none are known.

    Trained tokenizers number their tokens by falling frequency of the merges or pieces. On the
    reference model (byte-level BPE), 1.0 bits a value, fixed widths, no metric: KL .0022 with
    these, .0141 with equal weights, .0014 with counts.
    """
    return (1e7 / (np.arange(vocab_size) + 16)).astype(np.uint64)


def save_counts(path: Path, counts_V: npt.NDArray[np.uint64], tokenizer_digest: str) -> None:
    """Write counts U64 [V], all or nothing."""
    write_tensors(path, {COUNTS_NAME: ("U64", counts_V)}, {"tokenizer": tokenizer_digest})


def load_counts(path: Path, source: TableSource) -> npt.NDArray[np.uint64]:
    """Counts that fit `source`.

    Raises:
        DataError: not a counts file.
        MismatchError: another vocabulary size, or counted with another tokenizer.
    """
    try:
        file = TensorFile(path)
        counts = file.array(COUNTS_NAME)
    except BundleError as error:
        raise DataError(error.message, hint="write one with: tol count DATA -o FILE") from error
    if counts.dtype != np.uint64 or counts.shape != (source.vocab_size,):
        raise MismatchError(
            f"{path}: holds {counts.dtype} {list(counts.shape)}, expected uint64 "
            f"[{source.vocab_size}]"
        )
    counted_with = file.metadata.get("tokenizer")
    expected = source.sources().tokenizer
    if counted_with is not None and expected is not None and counted_with != expected:
        raise MismatchError(
            f"{path}: counted with another tokenizer than {source.path}'s",
            hint=f"run: tol count DATA --tokenizer {source.path} -o {path}",
        )
    return np.array(counts, np.uint64)
