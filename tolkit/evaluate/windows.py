"""Text to windows: what the model reads at once, and which of its predictions count.

The rolling convention of lm-evaluation-harness, per document: a prefix token stands before the
text, every token of the text is predicted exactly once, and the last window is filled up with
left context. Without a prefix token a document's first token is context only.

A window of `length` input tokens holds `length` + 1 ids: the last one is only predicted.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, overload

import numpy as np
import numpy.typing as npt

from tolkit.errors import DataError, UsageError
from tolkit.evaluate.spill import SpilledIds

__all__ = [
    "Prefix",
    "TextDocument",
    "TextTokenizer",
    "Window",
    "Windows",
    "no_windows",
    "windows_of",
]

Prefix = Literal["eos", "bos", "none"]
_PREFIXES = ("eos", "bos", "none")
_WORD_BREAK = re.compile(r"\s+")
_ENCODE_CHARACTERS = 1 << 18
_PART_IDS = 1 << 20


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


@dataclass(frozen=True, eq=False)
class Windows(Sequence[Window]):
    """The windows of a text with everything that decides whether two evaluations compare.

    Windows are made when indexed; in memory are some 40 bytes for each. W windows, N ids.

    ids_N: the ids of all documents, prefixes and joining tokens included; may be a mapped file.
    begin_W, end_W: window w reads and predicts ids_N[begin:end].
    scored_W, bytes_W, words_W, document_W: fields of each Window.
    length: input tokens of a full window.     packed: documents joined before cutting.
    prefix_id: the token put in front, None when there is none.
    text_digest: SHA-256 over the documents' texts; names and paths do not enter.
    """

    ids_N: npt.NDArray[np.int32]
    begin_W: npt.NDArray[np.int64]
    end_W: npt.NDArray[np.int64]
    scored_W: npt.NDArray[np.int32]
    bytes_W: npt.NDArray[np.float64]
    words_W: npt.NDArray[np.float64]
    document_W: npt.NDArray[np.int32]
    length: int
    packed: bool
    prefix_id: int | None
    text_digest: str
    tokenizer_digest: str
    n_documents: int
    document_names: Sequence[str]

    @classmethod
    def of(
        cls,
        items: Sequence[Window],
        *,
        length: int,
        tokenizer_digest: str,
        packed: bool = False,
        prefix_id: int | None = None,
        text_digest: str = "0" * 64,
        document_names: Sequence[str] = ("text",),
    ) -> Windows:
        """Windows cut by hand, where `windows_of` does not cut as somebody else did."""
        lengths = np.array([len(window.ids) for window in items], np.int64)
        ends = np.cumsum(lengths)
        return cls(
            ids_N=np.concatenate([window.ids for window in items]),
            begin_W=ends - lengths,
            end_W=ends,
            scored_W=np.array([window.scored for window in items], np.int32),
            bytes_W=np.array([window.n_bytes for window in items], np.float64),
            words_W=np.array([window.n_words for window in items], np.float64),
            document_W=np.array([window.document for window in items], np.int32),
            length=length,
            packed=packed,
            prefix_id=prefix_id,
            text_digest=text_digest,
            tokenizer_digest=tokenizer_digest,
            n_documents=len(document_names),
            document_names=document_names,
        )

    def __len__(self) -> int:
        return len(self.begin_W)

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Window, ...]: ...
    def __getitem__(self, index: int | slice) -> Window | tuple[Window, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return Window(
            ids=self.ids_N[self.begin_W[index] : self.end_W[index]],
            scored=int(self.scored_W[index]),
            n_bytes=float(self.bytes_W[index]),
            n_words=float(self.words_W[index]),
            document=int(self.document_W[index]),
        )

    @property
    def lengths_W(self) -> npt.NDArray[np.int64]:
        """Ids of each window."""
        return self.end_W - self.begin_W

    @property
    def n_tokens(self) -> int:
        """Tokens scored."""
        return int(self.scored_W.sum(dtype=np.int64))

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the scored text."""
        return round(float(self.bytes_W.sum()))

    @property
    def n_words(self) -> int:
        """Words of the scored text, counted as lm-evaluation-harness counts them."""
        return round(float(self.words_W.sum()))

    def id_range(self) -> tuple[int, int]:
        """The smallest and the largest token id."""
        parts = [self.ids_N[i : i + _PART_IDS] for i in range(0, len(self.ids_N), _PART_IDS)]
        return min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)

    def name_of(self, window: int) -> str:
        """The document a window belongs to, for messages."""
        name: str = self.document_names[int(self.document_W[window])]
        return name


def no_windows(tokenizer: TextTokenizer, length: int) -> Windows:
    """The windows of no text, where only tasks are measured."""
    none = np.empty(0, np.int64)
    return Windows(
        ids_N=none.astype(np.int32),
        begin_W=none,
        end_W=none,
        scored_W=none.astype(np.int32),
        bytes_W=none.astype(np.float64),
        words_W=none.astype(np.float64),
        document_W=none.astype(np.int32),
        length=length,
        packed=False,
        prefix_id=None,
        text_digest=hashlib.sha256().hexdigest(),
        tokenizer_digest=tokenizer.digest,
        n_documents=0,
        document_names=(),
    )


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

    The text is read once, document by document; its ids go to a temporary file (4 bytes each), so
    memory does not grow with the text.

    Bytes and words are those of the scored text: with a prefix the whole document's (bytes as
    UTF-8, words as pieces between runs of white space, so word and byte perplexity equal
    lm-evaluation-harness'), without one less the share of the unscored first token.

    Raises:
        UsageError: `length` below 1, or an unknown `prefix`.
        DataError: no document has a token to score.
        ResourceError: no room for the temporary file.
    """
    if length < 1:
        raise UsageError(f"window: expected at least 1 token, got {length}")
    if prefix not in _PREFIXES:
        raise UsageError(f"prefix: expected one of {', '.join(_PREFIXES)}, got {prefix!r}")
    prefix_id = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "none": None}[prefix]

    digest = hashlib.sha256()
    cutter = _Cutter(tokenizer, length, prefix_id)
    separator_id = tokenizer.eos_id if packed and prefix == "eos" else None
    n_documents = 0
    for document, ids in _encoded(documents, tokenizer):
        data = document.text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)
        n_documents += 1
        if packed and not len(ids):
            continue
        cutter.add(ids, len(data), _word_count(document.text), separator_id)
        if not packed:
            cutter.close(document.name)
    if packed:
        cutter.close("packed text")
    if not cutter.scored:
        raise DataError(
            f"text: nothing to score in {n_documents} document(s)",
            hint="give text of at least two tokens",
        )
    return Windows(
        ids_N=cutter.ids.mapped(),
        begin_W=np.array(cutter.begin, np.int64),
        end_W=np.array(cutter.end, np.int64),
        scored_W=np.array(cutter.scored, np.int32),
        bytes_W=np.array(cutter.n_bytes, np.float64),
        words_W=np.array(cutter.n_words, np.float64),
        document_W=np.array(cutter.document, np.int32),
        length=length,
        packed=packed,
        prefix_id=prefix_id,
        text_digest=digest.hexdigest(),
        tokenizer_digest=tokenizer.digest,
        n_documents=n_documents,
        document_names=cutter.names,
    )


class _Cutter:
    """Takes in documents one after the other and notes where their windows begin and end.

    `add` appends a text (or, before `close`, one more part of a packed text); `close` cuts what
    was added since the last time.
    """

    def __init__(self, tokenizer: TextTokenizer, length: int, prefix_id: int | None) -> None:
        self._tokenizer = tokenizer
        self._length = length
        self._prefix = np.array([] if prefix_id is None else [prefix_id], dtype=np.int32)
        self.ids = SpilledIds()
        self.begin, self.end = array("q"), array("q")
        self.scored, self.document = array("i"), array("i")
        self.n_bytes, self.n_words = array("d"), array("d")
        self.names: list[str] = []
        self._first = 0  # of the text that is being added
        self._text_bytes = self._text_words = 0

    def add(
        self,
        ids: npt.NDArray[np.int32],
        n_bytes: int,
        n_words: int,
        separator_id: int | None = None,
    ) -> None:
        if self.ids.count == self._first:
            self.ids.append(self._prefix)
        elif separator_id is not None:
            self.ids.append(np.array([separator_id], dtype=np.int32))
        self.ids.append(ids)
        self._text_bytes += n_bytes
        self._text_words += n_words

    def close(self, name: str) -> None:
        first, last = self._first, self.ids.count - 1
        if last > first:
            self._cut(first, last)
        self._first = self.ids.count
        self._text_bytes = self._text_words = 0
        self.names.append(name)

    def _cut(self, first: int, last: int) -> None:
        """The windows of ids first..last: one ends at every `length`-th target and at the last."""
        all_ids = self.ids.mapped()
        begin = first
        sizes = array("d")
        for end in (*range(first + self._length, last, self._length), last):
            sizes.append(self._decoded_bytes(all_ids[begin + 1 : end + 1]))
            self.begin.append(max(first, end - self._length))
            self.end.append(end + 1)
            self.scored.append(end - begin)
            self.document.append(len(self.names))
            begin = end
        unscored = 0 if len(self._prefix) else self._decoded_bytes(all_ids[first : first + 1])
        shares = np.array(sizes) / (sum(sizes) + unscored)
        self.n_bytes.extend((self._text_bytes * shares).tolist())
        self.n_words.extend((self._text_words * shares).tolist())

    def _decoded_bytes(self, ids: npt.NDArray[np.int32]) -> int:
        # At least one, so that windows of nothing but special tokens keep a finite share.
        text = self._tokenizer.decode(ids.tolist())
        return max(1, len(text.encode("utf-8", "surrogatepass")))


def _word_count(text: str) -> int:
    return len(_WORD_BREAK.split(text)) if text else 0


def _encoded(
    documents: Iterable[TextDocument], tokenizer: TextTokenizer
) -> Iterator[tuple[TextDocument, npt.NDArray[np.int32]]]:
    """Documents with their ids, encoded some at a time: for all threads, in bounded memory."""
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
