"""A corpus as one run of token ids, mapped from a cache file that can be trusted.

The stream is document, eos, document, eos, ... (no eos where the tokenizer has none). Ids are
written while the text is read: neither text nor ids are ever whole in memory.

Cache file, little-endian: ids U32 [n], document starts U64 [documents + 1], then a 64-byte
trailer: magic, n, documents, bytes of text, CRC-32 of all before it, and the first 24 bytes of
the key. The key is a SHA-256 over tokenizer.json and the text, so an edited source or another
tokenizer is another file. A file that fails any check is written anew.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tolkit.data.documents import Document, read_documents
from tolkit.data.tokenizer import Tokenizer
from tolkit.errors import DataError, MismatchError, ResourceError, TolError
from tolkit_formats import files

__all__ = ["TokenStream", "count_tokens", "tokens_of"]

_MAGIC = b"tolids01"
_TRAILER = struct.Struct("<8sQQQQ24s")
_BATCH_CHARACTERS = 1 << 21
_PIECE_CHARACTERS = 1 << 20
_CRC_BYTES = 8 << 20
_COUNT_IDS = 1 << 22


@dataclass(frozen=True)
class TokenStream:
    """Token ids of a corpus.

    ids: U32 [n], mapped read-only. starts: U64 [documents + 1], document i is
    ids[starts[i]:starts[i + 1]], its eos included. text_bytes: UTF-8 bytes of all documents.
    key: digest of tokenizer and text; two streams with one key are equal.
    """

    ids: npt.NDArray[np.uint32]
    starts: npt.NDArray[np.uint64]
    text_bytes: int
    key: str

    def __len__(self) -> int:
        return len(self.ids)


def tokens_of(
    specs: Sequence[str], tokenizer: Tokenizer, cache_dir: Path | None = None
) -> TokenStream:
    """Encode the documents of `specs` (see `read_documents`), or map what is cached.

    Args:
        cache_dir: kept cache folder, made when missing; None uses a temporary file that lives as
            long as the stream is mapped.

    Raises:
        DataError: as `read_documents`, or nothing but empty text.
    """
    if cache_dir is None:
        with tempfile.TemporaryDirectory(prefix="tolkit-tokens-") as folder:
            return _cached_stream(specs, tokenizer, Path(folder))
    files.make_dir(cache_dir)
    return _cached_stream(specs, tokenizer, cache_dir)


def count_tokens(
    stream: TokenStream | npt.NDArray[np.uint32], vocab_size: int
) -> npt.NDArray[np.uint64]:
    """How often each id of a stream (or of bare ids) occurs: U64 [vocab_size].

    Raises:
        MismatchError: the stream holds an id at or above `vocab_size`.
    """
    ids = stream.ids if isinstance(stream, TokenStream) else stream
    counts = np.zeros(vocab_size, np.uint64)
    for start in range(0, len(ids), _COUNT_IDS):
        found = np.bincount(ids[start : start + _COUNT_IDS], minlength=vocab_size)
        if len(found) > vocab_size:
            raise MismatchError(
                f"text: holds token id {len(found) - 1}, the vocabulary has {vocab_size} ids",
                hint="use the tokenizer the model was made for",
            )
        counts += found.astype(np.uint64)
    return counts


def _cached_stream(specs: Sequence[str], tokenizer: Tokenizer, folder: Path) -> TokenStream:
    key = _key(specs, tokenizer)
    path = folder / f"{key[:32]}.ids"
    stream = _open_cache(path, key)
    if stream is None:
        if _write_cache(path, read_documents(specs), tokenizer) != key:
            files.unlink(path)
            raise DataError(f"{' '.join(specs)}: the text changed while it was read")
        stream = _open_cache(path, key)
    if stream is None:
        raise ResourceError(f"{path}: differs from what was written (disk or memory fault)")
    return stream


def _key(specs: Sequence[str], tokenizer: Tokenizer) -> str:
    digest = _key_start(tokenizer)
    for document in read_documents(specs):
        _add_to_key(digest, document.text.encode())
    return digest.hexdigest()


def _key_start(tokenizer: Tokenizer) -> hashlib._Hash:
    digest = hashlib.sha256(_MAGIC + hashlib.sha256(tokenizer.files()["tokenizer.json"]).digest())
    digest.update(repr((tokenizer.eos_id, _PIECE_CHARACTERS)).encode())
    return digest


def _add_to_key(digest: hashlib._Hash, text: bytes) -> None:
    digest.update(len(text).to_bytes(8, "little") + text)


def _write_cache(path: Path, documents: Iterable[Document], tokenizer: Tokenizer) -> str:
    """Write the cache file; the key of the text that went into it."""
    ending = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    digest = _key_start(tokenizer)
    starts, text_bytes, crc = [0], 0, 0
    temporary = path.with_name(f".{path.name}.tmp")
    with files.FileWriter(temporary) as writer:
        for batch in _batches(documents):
            for text, ids in zip(batch, _encode_documents(batch, tokenizer), strict=True):
                buffer = np.asarray(ids + ending, "<u4")
                crc = zlib.crc32(files.bytes_view(buffer), crc)
                writer.write(buffer)
                starts.append(starts[-1] + len(buffer))
                encoded = text.encode()
                _add_to_key(digest, encoded)
                text_bytes += len(encoded)
        tail = np.asarray(starts, "<u8")
        writer.write(tail)
        crc = zlib.crc32(files.bytes_view(tail), crc)
        tag = digest.digest()[:24]
        writer.write(_TRAILER.pack(_MAGIC, starts[-1], len(starts) - 1, text_bytes, crc, tag))
    files.replace(temporary, path)
    files.fsync_dir(path.parent)
    return digest.hexdigest()


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document.text)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_documents(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    pieces = [_pieces(text) for text in texts]
    encoded = iter(tokenizer.encode_batch([piece for parts in pieces for piece in parts]))
    for parts in pieces:
        yield [token_id for _ in parts for token_id in next(encoded)]


def _pieces(text: str) -> list[str]:
    """A text over a mebi-character cut after line ends that no white space follows.

    Byte-level pre-tokenizers never join across such a place, so the ids are those of the whole.
    """
    cuts = [0]
    while len(text) - cuts[-1] > _PIECE_CHARACTERS:
        at = text.find("\n", cuts[-1] + _PIECE_CHARACTERS)
        while at >= 0 and text[at + 1 : at + 2].isspace():
            at = text.find("\n", at + 1)
        if at < 0 or at + 1 == len(text):
            break
        cuts.append(at + 1)
    cuts.append(len(text))
    return [text[start:end] for start, end in pairwise(cuts)]


def _open_cache(path: Path, key: str) -> TokenStream | None:
    """The stream in `path`; None when there is none or the file fails a check."""
    if not path.is_file():
        return None
    try:
        mapped = files.map_bytes(path)
    except TolError:
        return None
    body = len(mapped) - _TRAILER.size
    if body < 0:
        return None
    magic, n, documents, text_bytes, crc, tag = _TRAILER.unpack(mapped[body:].tobytes())
    if magic != _MAGIC or tag != bytes.fromhex(key)[:24] or 4 * n + 8 * (documents + 1) != body:
        return None
    found = 0
    for start in range(0, body, _CRC_BYTES):
        block = mapped[start : min(start + _CRC_BYTES, body)]
        found = zlib.crc32(files.bytes_view(block), found)
    if found != crc:
        return None
    starts = np.frombuffer(mapped[4 * n : body].tobytes(), "<u8")
    return TokenStream(mapped[: 4 * n].view("<u4"), starts, text_bytes, key)
