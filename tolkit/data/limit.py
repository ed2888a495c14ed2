"""Only the beginning of a text, by tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tolkit.data.documents import Document
from tolkit.data.tokenizer import Tokenizer

__all__ = ["limited"]


def limited(
    documents: Iterable[Document], tokenizer: Tokenizer, limit_tokens: int
) -> Iterator[Document]:
    """Documents up to about `limit_tokens` tokens in all; the last one is cut.

    The cut is by characters, in proportion, so the count is near the limit and the text stays a
    prefix of the whole. At least one character of the first document is kept.
    """
    left = limit_tokens
    for document in documents:
        # No token is longer than its text: what lies far behind the limit is not encoded.
        text = document.text[: 64 * left]
        count = len(tokenizer.encode(text))
        if count < left:
            left -= count
            yield document if len(text) == len(document.text) else Document(document.name, text)
            continue
        yield Document(document.name, text[: max(1, len(text) * left // max(1, count))])
        return
