"""Text as it comes: whole characters, whatever the tokenizer, and stop texts across pieces."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models

from tolkit.data import Document, Tokenizer
from tolkit.runtime.text import StopWatch, TextStream

TEXTS = [
    "plain words, and more of them",
    "caf\u00e9 na\u00efve \u2014 \u201cquoted\u201d",
    "\U0001f600\U0001f680\U0001f9d1\u200d\U0001f4bb and \u4f60\u597d\u4e16\u754c\u4f60\u597d",
    "line\nline\n\n  indented\ttab ",
]


def byte_level() -> Tokenizer:
    """Bytes alone: every character above 127 takes several tokens."""
    return Tokenizer.train([Document("ab", "x")], 258)


class ByteFallback:
    """A tokenizer of the Llama kind: pieces with a mark for the space, bytes for the rest."""

    def __init__(self) -> None:
        pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyz,\n\t"]
        tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
        self.vocabulary = {token: i for i, token in enumerate(tokens)}
        self.core = Core(
            models.BPE(vocab=self.vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
        )
        self.core.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )

    def encode(self, text: str) -> list[int]:
        return list(self.core.encode("\u2581" + text.replace(" ", "\u2581")).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.core.decode(list(ids), skip_special_tokens=False))


@pytest.mark.parametrize("text", TEXTS, ids=["ascii", "latin", "emoji", "space"])
@pytest.mark.parametrize("kind", [byte_level, ByteFallback])
def test_pieces_are_whole_and_join_to_the_text(text: str, kind: type) -> None:
    tokenizer = kind()
    ids = tokenizer.encode(text)
    for start in (0, 1, len(ids) // 2, len(ids) - 1):
        before = tokenizer.decode(ids[:start])
        if "\ufffd" in before:  # a prompt of ids may end inside a character; a text does not
            continue
        stream = TextStream(tokenizer, ids[:start])
        pieces = [stream.push(token) for token in ids[start:]]
        assert all("\ufffd" not in piece for piece in pieces)
        assert before + "".join(pieces) + stream.finish() == text


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = byte_level()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode("a\u20acb")]
    assert pieces == ["a", "", "", "\u20ac", "b"]


def test_bytes_that_never_become_a_character_are_shown_in_the_end() -> None:
    tokenizer = byte_level()
    start = tokenizer.encode("\u20ac")[0]  # the first byte of three, over and over
    stream = TextStream(tokenizer)
    pieces = [stream.push(start) for _ in range(40)]
    shown = "".join(pieces) + stream.finish()
    assert set(shown) == {"\ufffd"}
    assert any(pieces), "not held back for ever"
    stream = TextStream(tokenizer)
    assert stream.push(start) == ""
    assert stream.finish() == "\ufffd"


def naive_cut(text: str, stops: tuple[str, ...]) -> str:
    starts = [text.find(stop) for stop in stops if stop in text]
    return text[: min(starts)] if starts else text


def test_stops_are_found_across_any_cut() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("ab\n", k=draw.randint(0, 12)))
        stops = tuple("".join(draw.choices("ab\n", k=draw.randint(1, 4))) for _ in range(2))
        watch = StopWatch(stops)
        shown = ""
        at = 0
        while at < len(text) and not watch.stopped:
            size = draw.randint(1, 3)
            shown += watch.push(text[at : at + size])
            at += size
        shown += watch.finish()
        assert watch.stopped == any(stop in text for stop in stops)
        assert len(shown) >= len(naive_cut(text, stops))
        if not watch.stopped:
            assert shown == text
        else:
            assert not any(stop in shown for stop in stops)
            assert text.startswith(shown)
