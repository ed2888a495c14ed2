"""`limited`: a prefix of the text, near the number of tokens asked for."""

from __future__ import annotations

import pytest
from _eval_fakes import pico_tokenizer

from tolkit.data import Document
from tolkit.data.limit import limited

DOCUMENTS = [Document("a", "abcde" * 4), Document("b", "fghij" * 4), Document("c", "klm")]


@pytest.mark.parametrize("limit", [1, 19, 20, 21, 39, 40, 41, 43, 44, 1000])
def test_a_prefix_of_that_many_tokens(limit: int) -> None:
    # One character is one token of this tokenizer, so the count can be exact.
    kept = list(limited(DOCUMENTS, pico_tokenizer(), limit))
    text = "".join(document.text for document in kept)
    whole = "".join(document.text for document in DOCUMENTS)
    assert text == whole[:limit]
    assert [d.name for d in kept] == [d.name for d in DOCUMENTS][: len(kept)]


def test_a_huge_document_is_not_encoded_whole() -> None:
    lengths = []

    class Watched:
        def encode(self, text: str) -> list[int]:
            lengths.append(len(text))
            return [0] * len(text)

    (kept,) = limited([Document("a", "x" * 10**6)], Watched(), 5)  # a stand-in
    assert kept.text == "xxxxx"
    assert max(lengths) <= 64 * 5
