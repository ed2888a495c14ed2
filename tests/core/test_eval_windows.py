"""Windows against the rolling convention re-derived token by token."""

from __future__ import annotations

import re

import numpy as np
import pytest
from _eval_fakes import documents_of, pico_tokenizer, text_of

from tolkit.data import Document, Tokenizer
from tolkit.errors import DataError, UsageError
from tolkit.evaluate import Windows, windows_of


def oracle(tokens: list[int], prefix: int | None, length: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, predicted) of each window, by walking over the tokens one at a time.

    The first window predicts the first `length` tokens behind the prefix. Every later one
    predicts the next `length` (or what is left) and reads the `length` tokens before its last.
    """
    stream = tokens if prefix is None else [prefix, *tokens]
    windows = []
    position = 1
    while position < len(stream):
        predicted = []
        while position < len(stream) and len(predicted) < length:
            predicted.append(stream[position])
            position += 1
        inputs = []
        reach = position - 2  # the token before the last predicted one
        while reach >= 0 and len(inputs) < length:
            inputs.insert(0, stream[reach])
            reach -= 1
        windows.append((inputs, predicted))
    return windows


class Bare:
    """A tokenizer without special tokens around the pico one."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner = inner
        self.vocab_size, self.digest = inner.vocab_size, inner.digest
        self.bos_id = self.eos_id = None
        self.encode_batch, self.decode = inner.encode_batch, inner.decode


def as_pairs(windows: Windows) -> list[tuple[list[int], list[int]]]:
    return [
        (window.ids[:-1].tolist(), window.ids[len(window.ids) - window.scored :].tolist())
        for window in windows
    ]


@pytest.mark.parametrize("length", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("size", [1, 2, 6, 7, 8, 14, 15, 100])
@pytest.mark.parametrize("prefix", ["eos", "bos", "none"])
def test_each_document_is_rolled_as_the_oracle_rolls_it(
    length: int, size: int, prefix: str
) -> None:
    tokenizer = pico_tokenizer()
    text = text_of(size)
    prefix_id = {"eos": 1, "bos": 0, "none": None}[prefix]
    expected = oracle(tokenizer.encode(text), prefix_id, length)
    if not expected:
        with pytest.raises(DataError, match="nothing to score"):
            windows_of([Document("d", text)], tokenizer, length, prefix=prefix)
        return
    windows = windows_of([Document("d", text)], tokenizer, length, prefix=prefix)
    assert as_pairs(windows) == expected
    assert windows.prefix_id == prefix_id


def test_a_hand_written_example() -> None:
    # 8 tokens, windows of 3, prefix 1: P a b | c d e | f g h with g h read after e f.
    ids = pico_tokenizer().encode("abcdefgh")
    a, b, c, d, e, f, g, h = ids
    windows = windows_of([Document("d", "abcdefgh")], pico_tokenizer(), 3)
    assert as_pairs(windows) == [
        ([1, a, b], [a, b, c]),
        ([c, d, e], [d, e, f]),
        ([e, f, g], [g, h]),
    ]


def test_without_special_tokens_the_first_token_is_context_only() -> None:
    tokenizer = Bare(pico_tokenizer())
    text = "abcdefgh"
    windows = windows_of([Document("d", text)], tokenizer, 4)
    assert as_pairs(windows) == oracle(tokenizer.encode_batch([text])[0], None, 4)
    assert windows.prefix_id is None
    assert windows.n_tokens == 7
    assert windows.n_bytes == 7  # the unscored first character is not counted


def test_every_token_of_every_document_is_scored_once() -> None:
    documents = documents_of(40, 3, 0, 17, 1)
    tokenizer = pico_tokenizer()
    windows = windows_of(documents, tokenizer, 8)
    scored = [t for _, predicted in as_pairs(windows) for t in predicted]
    assert scored == [t for document in documents for t in tokenizer.encode(document.text)]
    assert windows.n_documents == 5


def test_packed_text_is_one_document_joined_with_eos_and_its_remainder_counts() -> None:
    documents = documents_of(10, 5, 0, 7)
    tokenizer = pico_tokenizer()
    joined: list[int] = []
    for document in filter(lambda document: document.text, documents):
        joined += ([tokenizer.eos_id] if joined else []) + tokenizer.encode(document.text)
    windows = windows_of(documents, tokenizer, 6, packed=True)
    assert as_pairs(windows) == oracle(joined, tokenizer.eos_id, 6)
    assert windows.n_tokens == 10 + 5 + 7 + 2
    assert windows.n_bytes == 22


def test_words_and_bytes_are_the_documents() -> None:
    text = "  two  words\nand é more "
    document = Document("d", text.replace("é", "e"))
    windows = windows_of([document], pico_tokenizer(), 5)
    assert windows.n_words == len(re.split(r"\s+", text)) == 7  # the empty ends count
    assert windows.n_bytes == len(document.text)
    assert np.isclose(sum(w.n_words for w in windows), 7, rtol=1e-12)
    assert [w.n_bytes for w in windows] == pytest.approx([w.scored for w in windows])


def test_bytes_follow_the_decoded_text_not_the_token_count() -> None:
    # Five tokens a window; the second half's tokens stand for four bytes each.
    class Wide(Bare):
        def __init__(self) -> None:
            super().__init__(pico_tokenizer())
            self.encode_batch = lambda texts: [[4] * 5 + [9] * 5 for _ in texts]
            self.decode = lambda ids: "".join("x" if i == 4 else "xxxx" for i in ids)
            self.eos_id = 1

    windows = windows_of([Document("d", "x" * 25)], Wide(), 5)
    assert [w.n_bytes for w in windows] == [5.0, 20.0]


def test_the_text_digest_sees_text_and_borders_but_no_names() -> None:
    tokenizer = pico_tokenizer()

    def digest(*texts: str, name: str = "n") -> str:
        return windows_of([Document(name, t) for t in texts], tokenizer, 4).text_digest

    assert digest("ab", "cd") == digest("ab", "cd", name="elsewhere")
    assert len({digest("ab", "cd"), digest("abcd"), digest("a", "bcd"), digest("cd", "ab")}) == 4


def test_nothing_to_score_is_an_error() -> None:
    tokenizer = pico_tokenizer()
    for documents in ([], [Document("d", "")], [Document("d", ""), Document("e", "")]):
        for packed in (False, True):
            with pytest.raises(DataError, match="nothing to score"):
                windows_of(documents, tokenizer, 4, packed=packed)


@pytest.mark.parametrize("arguments", [{"length": 0}, {"length": 4, "prefix": "pad"}])
def test_bad_options(arguments: dict) -> None:
    with pytest.raises(UsageError):
        windows_of([Document("d", "abc")], pico_tokenizer(), **arguments)
