"""SHA-256 digests that say "these belong together" (SPEC section 7). Lower-case hex."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit_formats import files, strict_json
from tolkit_formats.errors import BundleError, DataError, MismatchError
from tolkit_formats.files import Buffer, bytes_view
from tolkit_formats.limits import CHECKSUM_BLOCK_BYTES

__all__ = [
    "array_digest",
    "block_digests",
    "file_digest",
    "json_digest",
    "tokenizer_digest",
    "tokenizer_vocabulary",
]

_CHUNK = 8 << 20
_TOKENIZER_DEPTH = 32


def file_digest(path: Path) -> str:
    """Digest of a file's bytes, read in 8 MiB pieces."""
    digest = hashlib.sha256()
    for chunk in files.read_chunks(Path(path), _CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def block_digests(path: Path) -> npt.NDArray[np.uint8]:
    """SHA-256 of each 1 MiB block of a file, U8 [blocks, 32]."""
    data = bytes_view(files.map_bytes(path))
    blocks = [
        np.frombuffer(hashlib.sha256(data[i : i + CHECKSUM_BLOCK_BYTES]).digest(), np.uint8)
        for i in range(0, len(data), CHECKSUM_BLOCK_BYTES)
    ]
    return np.stack(blocks) if blocks else np.empty((0, 32), np.uint8)


def array_digest(dtype: str, shape: tuple[int, ...], buffers: Iterable[Buffer]) -> str:
    """Digest of a tensor: ``dtype:d0xd1`` and a NUL, then its little-endian bytes."""
    digest = hashlib.sha256(f"{dtype}:{'x'.join(map(str, shape))}\0".encode())
    for buffer in buffers:
        digest.update(bytes_view(buffer))
    return digest.hexdigest()


def json_digest(value: object) -> str:
    """Digest of a JSON value's canonical form."""
    return hashlib.sha256(strict_json.canonical(value)).hexdigest()


def tokenizer_vocabulary(tokenizer_json: bytes, where: str = "tokenizer.json") -> dict[int, str]:
    """Token id -> token of a Hugging Face tokenizers file, added tokens included.

    Raises:
        DataError: no vocabulary, or one id with two tokens.
    """
    try:
        document: Any = strict_json.parse(tokenizer_json, where, max_depth=_TOKENIZER_DEPTH)
    except BundleError as error:
        raise DataError(error.message) from error
    try:
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, dict):
            pairs = [(i, token) for token, i in vocabulary.items()]
        else:
            pairs = [(i, entry[0]) for i, entry in enumerate(vocabulary)]
        pairs += [(entry["id"], entry["content"]) for entry in document.get("added_tokens") or []]
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{where}: has no model.vocab this reader understands") from error
    result: dict[int, str] = {}
    for i, token in pairs:
        if isinstance(i, bool) or not isinstance(i, int) or not isinstance(token, str):
            raise DataError(f"{where}: has no model.vocab of strings with integer ids")
        if result.setdefault(i, token) != token:
            raise DataError(
                f"{where}: id {i} has two tokens, {result[i][:40]!r} and {token[:40]!r}"
            )
    return result


def tokenizer_digest(tokenizer_json: bytes, vocab_size: int, where: str = "tokenizer.json") -> str:
    """Digest of the vocabulary in id order: per id its UTF-8 length (u32) and bytes.

    Ids without a token (padding up to `vocab_size`) enter with length 0xFFFFFFFF.

    Raises:
        MismatchError: a token id at or above `vocab_size`, or below 0.
    """
    vocabulary = tokenizer_vocabulary(tokenizer_json, where)
    outside = [i for i in vocabulary if not 0 <= i < vocab_size]
    if outside:
        raise MismatchError(
            f"{where}: holds token id {max(outside)}, the model's vocabulary has {vocab_size} rows",
            hint="use the tokenizer the checkpoint was trained with",
        )
    digest = hashlib.sha256()
    for i in range(vocab_size):
        token = vocabulary.get(i)
        if token is None:
            digest.update(b"\xff\xff\xff\xff")
        else:
            data = token.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()
