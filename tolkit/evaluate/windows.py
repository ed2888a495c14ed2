"""Text to windows: what the model reads at once, and which of its predictions count.

The rolling convention of lm-evaluation-harness, per document: a prefix token stands before the
text, every token of the text is predicted exactly once, and the last window is filled up with
left context. Without a prefix token a document's first token is context only.

A window of `length` input tokens holds `length` + 1 ids: the last one is only predicted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, overload

import numpy as np
import numpy.typing as npt

from tolkit.errors import DataError, UsageError

__all__ = ["Prefix", "TextDocument", "TextTokenizer", "Window", "Windows", "windows_of"]

Prefix = Literal["eos", "bos", "none"]
_PREFIXES = ("eos", "bos", "none")
_WORD_BREAK = re.compile(r"\s+")
_ENCODE_CHARACTERS = 1 << 22


class TextDocument(Protocol):
    """A text that is scored on its own."""

    @property
    def name(self) -> str: ...
    @property
    def text(self) -> str: ...


class TextTokenizer(Protocol):
    """The part of a tokenizer that windows need; `encode_batch` adds no special tokens."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def digest(self) -> str: ...
    def encode_batch(self, texts: Sequence[str], /) -> Sequence[Sequence[int]]: ...
    def decode(self, ids: Sequence[int], /) -> str: ...


@dataclass(frozen=True)
class Window:
    """One stretch of ids, of which the last `scored` are predicted and counted.

    ids: int32 [n], n >= 2; the model reads ids[:-1], the targets are ids[1:].
    scored: how many targets count, 1 <= scored <= n - 1; the rest is context.
    n_bytes, n_words: the document's UTF-8 bytes and words, shared out among its windows in
        proportion to the decoded length of what each scores. They sum to the document's exactly;
        fractions are the price of that.
    document: index of the document (0 for all windows of packed text).
    """

    ids: npt.NDArray[np.int32]
    scored: int
    n_bytes: float
    n_words: float
    document: int


@dataclass(frozen=True)
class Windows(Sequence[Window]):
    """The windows of a text with everything that decides whether two evaluations compare.

    length: input tokens of a full window.     packed: documents joined before cutting.
    prefix_id: the token put in front, None when there is none.
    text_digest: SHA-256 over the documents' texts; names and paths do not enter.
    """

    items: tuple[Window, ...]
    length: int
    packed: bool
    prefix_id: int | None
    text_digest: str
    tokenizer_digest: str
    n_documents: int
    document_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Window, ...]: ...
    def __getitem__(self, index: int | slice) -> Window | tuple[Window, ...]:
        return self.items[index]

    @property
    def n_tokens(self) -> int:
        """Tokens scored."""
        return sum(window.scored for window in self.items)

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the scored text."""
        return round(sum(window.n_bytes for window in self.items))

    @property
    def n_words(self) -> int:
        """Words of the scored text, counted as lm-evaluation-harness counts them."""
        return round(sum(window.n_words for window in self.items))

    def name_of(self, window: int) -> str:
        """The document a window belongs to, for messages."""
        return self.document_names[self.items[window].document]


def windows_of(
    documents: Iterable[TextDocument],
    tokenizer: TextTokenizer,
    length: int,
    packed: bool = False,
    prefix: Prefix = "eos",
) -> Windows:
    """Cut documents into windows; every token is scored once.

    Args:
        documents: texts, in order. Documents without a token to score are left out.
        tokenizer: its special token named by `prefix` goes in front of each document; a
            tokenizer without one scores a document from its second token on.
        length: tokens a model reads at once, at least 1.
        packed: join the documents with eos into one text first (bos and "none" join with
            nothing). The joining tokens are predicted too; the remainder is a last window.
        prefix: "eos" (the default), "bos" (what lm-evaluation-harness prefers for a tokenizer
            that has one), or "none".

    Bytes and words are those of the scored text: with a prefix the whole document's (bytes as
    UTF-8, words as pieces between runs of white space, so word and byte perplexity equal
    lm-evaluation-harness'), without one less the share of the unscored first token.

    Raises:
        UsageError: `length` below 1, or an unknown `prefix`.
        DataError: no document has a token to score.
    """
    if length < 1:
        raise UsageError(f"window: expected at least 1 token, got {length}")
    if prefix not in _PREFIXES:
        raise UsageError(f"prefix: expected one of {', '.join(_PREFIXES)}, got {prefix!r}")
    prefix_id = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "none": None}[prefix]

    digest = hashlib.sha256()
    names: list[str] = []
    texts: list[_Encoded] = []
    for document, ids in _encoded(documents, tokenizer):
        data = document.text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)
        words = len(_WORD_BREAK.split(document.text)) if document.text else 0
        names.append(document.name)
        texts.append(_Encoded(ids, len(data), words))
    n_documents = len(texts)
    if packed and any(len(text.ids) for text in texts):
        names = ["packed text"]
        texts = [_joined(texts, tokenizer.eos_id if prefix == "eos" else None)]

    windows: list[Window] = []
    for index, text in enumerate(texts):
        windows.extend(_cut(text, tokenizer, length, prefix_id, index))
    if not windows:
        raise DataError(
            f"text: nothing to score in {n_documents} document(s)",
            hint="give text of at least two tokens",
        )
    return Windows(
        items=tuple(windows),
        length=length,
        packed=packed,
        prefix_id=prefix_id,
        text_digest=digest.hexdigest(),
        tokenizer_digest=tokenizer.digest,
        n_documents=n_documents,
        document_names=tuple(names),
    )


@dataclass(frozen=True)
class _Encoded:
    ids: npt.NDArray[np.int32]
    n_bytes: int
    n_words: int


def _encoded(
    documents: Iterable[TextDocument], tokenizer: TextTokenizer
) -> Iterator[tuple[TextDocument, npt.NDArray[np.int32]]]:
    """Documents with their ids, encoded some megabytes at a time so that threads help."""
    pending: list[TextDocument] = []
    characters = 0

    def flush() -> Iterator[tuple[TextDocument, npt.NDArray[np.int32]]]:
        batch = tokenizer.encode_batch([document.text for document in pending])
        for document, ids in zip(pending, batch, strict=True):
            yield document, np.asarray(ids, dtype=np.int32)

    for document in documents:
        pending.append(document)
        characters += len(document.text)
        if characters >= _ENCODE_CHARACTERS:
            yield from flush()
            pending, characters = [], 0
    if pending:
        yield from flush()


def _joined(texts: Sequence[_Encoded], separator_id: int | None) -> _Encoded:
    """All documents as one, `separator_id` between neighbours; empty ones leave no trace."""
    between = np.array([] if separator_id is None else [separator_id], dtype=np.int32)
    parts = [part for text in texts if len(text.ids) for part in (between, text.ids)][1:]
    return _Encoded(
        np.concatenate(parts),
        sum(text.n_bytes for text in texts),
        sum(text.n_words for text in texts),
    )


def _cut(
    text: _Encoded, tokenizer: TextTokenizer, length: int, prefix_id: int | None, document: int
) -> list[Window]:
    """The windows of one document; none when it has nothing to predict."""
    ids = text.ids
    if prefix_id is not None:
        ids = np.concatenate([np.array([prefix_id], dtype=np.int32), ids])
    last = len(ids) - 1
    if last < 1:
        return []
    # A window ends at every `length`-th target and at the last one, and reaches `length` back.
    ends = [*range(length, last, length), last]
    starts = [0, *ends[:-1]]
    pieces = [ids[start + 1 : end + 1] for start, end in zip(starts, ends, strict=True)]
    decoded = [_decoded_bytes(tokenizer, piece) for piece in pieces]
    unscored = 0 if prefix_id is not None else _decoded_bytes(tokenizer, ids[:1])
    total = sum(decoded) + unscored
    shares = [size / total for size in decoded]
    return [
        Window(
            ids=ids[max(0, end - length) : end + 1],
            scored=end - start,
            n_bytes=text.n_bytes * share,
            n_words=text.n_words * share,
            document=document,
        )
        for start, end, share in zip(starts, ends, shares, strict=True)
    ]


def _decoded_bytes(tokenizer: TextTokenizer, ids: npt.NDArray[np.int32]) -> int:
    # At least one, so that windows of nothing but special tokens keep a finite share.
    return max(1, len(tokenizer.decode(ids.tolist()).encode("utf-8", "surrogatepass")))
