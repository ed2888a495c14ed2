"""Texts to ids: what is scored after what, cut where, and with which token in front."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from _eval_fakes import pico_tokenizer, text_of
from tokenizers import Tokenizer as Core
from tokenizers import processors

from tolkit.data import Document, Tokenizer
from tolkit.errors import DataError, UsageError
from tolkit.evaluate.tasks import Item, Page
from tolkit.evaluate.tasks.requests import Requests, prefix_of, requests_of

PICO = pico_tokenizer()
MERGING = Tokenizer.train([Document("a", "the cat sat on the mat, the cats ate\n" * 30)], 300)
BOS, EOS = 0, 1


def requested(
    *pairs: tuple[str, str], tokenizer: Tokenizer = PICO, length: int = 99, prefix: int | None = BOS
) -> Requests:
    return requests_of([Item("f:1", pairs, gold=0)], tokenizer, length, prefix)


def texts(requests: Requests, tokenizer: Tokenizer = PICO) -> list[tuple[str, str]]:
    """What each window of the first item reads before the scored part, and that part."""
    windows = [requests.windows[i] for i in requests.of_item[0]]
    cuts = [(w.ids[: -w.scored].tolist(), w.ids[-w.scored :].tolist()) for w in windows]
    return [(tokenizer.decode(context), tokenizer.decode(rest)) for context, rest in cuts]


@pytest.mark.parametrize(("context", "continuation", "read", "scored"), [
    ("a cat", " sat", "a cat", " sat"),
    ("a cat ", "sat", "a cat", " sat"),
    ("a cat \n ", " sat", "a cat", " \n  sat"),
    ("", " sat", "<bos>", " sat"),
    ("  ", "sat", "<bos>", "  sat"),
    ("", "<bos> sat", "<bos>", " sat"),
    ("", "<eos> sat", "<bos>", "<eos> sat"),
    ("<bos>a", " b", "<bos>a", " b"),
])  # fmt: skip
def test_what_is_scored(context: str, continuation: str, read: str, scored: str) -> None:
    assert texts(requested((context, continuation))) == [(read, scored)]


@pytest.mark.parametrize(("bos", "eos", "prefix"), [(3, 5, 3), (None, 5, 5), (None, None, None)])
def test_prefix(bos: int | None, eos: int | None, prefix: int | None) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.bos_id, tokenizer.eos_id = bos, eos
    assert prefix_of(tokenizer) == prefix


def test_context_and_continuation_are_encoded_together() -> None:
    (window,) = requested(("the ca", "t sat on the mat"), tokenizer=MERGING).windows
    whole, context = (MERGING.encode(text) for text in ("the cat sat on the mat", "the ca"))
    assert whole[: len(context)] != context
    assert window.ids.tolist() == whole and window.scored == len(whole) - len(context)


def test_nothing_left_to_score() -> None:
    for tokenizer, context, continuation, prefix in [
        (MERGING, "the ca", "t", BOS),
        (PICO, "a", "", BOS),
        (PICO, "", "", BOS),
        (PICO, "", "a", None),
        (PICO, "", "<bos>", BOS),
    ]:
        with pytest.raises(DataError, match="f:1: a continuation without a token of its own"):
            requested((context, continuation), tokenizer=tokenizer, prefix=prefix)


def test_without_a_prefix_the_first_token_is_context() -> None:
    requests = requested(("", "cat"), prefix=None)
    assert texts(requests) == [("c", "at")]


@pytest.mark.parametrize("length", [3, 4, 5, 8, 9])
def test_cut_on_the_left(length: int) -> None:
    requests = requested(("abcdef", "ghi"), ("b", "c"), length=length)
    whole = "abcdefghi"[-(length + 1) :]
    assert texts(requests) == [(whole[:-3], "ghi"), ("b", "c")]
    assert requests.truncated == int(length < 8)


def test_a_continuation_longer_than_the_window() -> None:
    with pytest.raises(UsageError, match="window: 3 tokens, expected at least 4: f:1"):
        requested(("a", "bcde"), length=3)


def test_equal_requests_are_made_once() -> None:
    requests = requested(("a", "b"), ("a", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"))
    assert requests.of_item == ((0, 1, 0, 2, 3),)
    assert [w.scored for w in requests.windows] == [1, 1, 1, 2]


def test_added_tokens_are_added_once() -> None:
    core = Core.from_str(PICO.files()["tokenizer.json"].decode())
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    adding = Tokenizer(core.to_str().encode(), PICO.files()["tokenizer_config.json"], "adding")
    pairs = [("a", "b"), ("<bos>a", "b"), ("", "b"), ("<eos>a", "b")]
    found = texts(requested(*pairs, tokenizer=adding), adding)
    assert [context for context, _ in found] == ["<bos>a", "<bos>a", "<bos>", "<bos><eos>a"]
    assert adding.encode("a") == PICO.encode("a")
    page = requests_of([Page("p", "ab", 1, 2)], adding, 99, BOS)
    assert page.windows[0].ids.tolist() == [BOS, BOS, *PICO.encode("ab")]
    assert page.windows[0].scored == 3


def test_a_tokenizer_that_knows_no_marking() -> None:
    """Another `TextTokenizer`: nothing is added, and spelled-out tokens stay text."""

    class Plain:
        vocab_size, bos_id, eos_id, digest = PICO.vocab_size, BOS, EOS, PICO.digest
        encode_batch, decode = PICO.encode_batch, PICO.decode

    requests = requests_of([Item("f:1", (("a<eos>", "b"),))], Plain(), 99, BOS)
    assert EOS not in requests.windows[0].ids


@pytest.mark.parametrize("prefix", [BOS, None])
@pytest.mark.parametrize("size", [2, 7, 8, 9, 16, 17, 50])
def test_pages_are_read_in_rolling_windows(size: int, prefix: int | None) -> None:
    text, length = text_of(size), 8
    requests = requests_of([Page("p", text, 10, size)], PICO, length, prefix)
    ids = PICO.encode(text) if prefix is None else [prefix, *PICO.encode(text)]
    predicted = []
    for index in requests.of_item[0]:
        window = requests.windows[index]
        at = len(predicted) + 1 + window.scored
        assert window.ids.tolist() == ids[max(0, at - length - 1) : at]
        predicted += window.ids[-window.scored :].tolist()
    assert predicted == ids[1:]
    share = 1.0 if prefix is not None else (size - 1) / size
    assert requests.scored_share == (pytest.approx(share),)


def test_pages_and_items_keep_their_order() -> None:
    items = [Page("p", "ab", 1, 2), Item("f", (("a", "b"),)), Page("q", "cd", 1, 2)]
    requests = requests_of(items, PICO, 9, BOS)
    found = [requests.windows[i].ids.tolist() for (i,) in requests.of_item]
    assert found == [[BOS, *PICO.encode("ab")], PICO.encode("ab"), [BOS, *PICO.encode("cd")]]


def test_a_page_with_nothing_to_score() -> None:
    with pytest.raises(DataError, match="p: nothing to score"):
        requests_of([Page("p", "a", 1, 1)], PICO, 9, None)


def test_windows_are_those_the_forward_pass_takes() -> None:
    (window,) = requested(("a", "b")).windows
    assert window.ids.dtype == np.int32
    assert dataclasses.asdict(window)["document"] == 0
