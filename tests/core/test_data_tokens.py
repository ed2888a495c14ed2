"""The token stream and its cache."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tolkit.data import Document, Tokenizer, count_tokens, tokens, tokens_of
from tolkit.errors import DataError, MismatchError

CORPUS = [Document("a", "the cat sat on the mat, the cat ate the rat\n" * 30)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, 280)


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "a.txt"
    file.write_text("the cat\n\f\nsat on é\n\f\nthe mat\n")
    return str(file)


def test_the_stream_is_documents_each_with_its_eos(tokenizer: Tokenizer, text: str) -> None:
    stream = tokens_of([text], tokenizer)
    parts = ["the cat\n", "sat on é\n", "the mat\n"]
    expected = [[*tokenizer.encode(p), tokenizer.eos_id] for p in parts]
    found = [stream.ids[int(a) : int(b)].tolist() for a, b in pairwise(stream.starts)]
    assert found == expected
    assert stream.ids.dtype == np.uint32 and len(stream) == sum(map(len, expected))
    assert stream.text_bytes == sum(len(p.encode()) for p in parts)


def test_a_tokenizer_without_eos_puts_nothing_between(tokenizer: Tokenizer, text: str) -> None:
    bare = Tokenizer(tokenizer.files()["tokenizer.json"], b'{"eos_token": null}', "bare")
    stream = tokens_of([text], bare)
    assert stream.ids.tolist() == bare.encode("the cat\n") + bare.encode(
        "sat on é\n"
    ) + bare.encode("the mat\n")


def test_counts_equal_a_plain_count(tokenizer: Tokenizer, text: str) -> None:
    stream = tokens_of([text], tokenizer)
    counts = count_tokens(stream, 300)
    assert counts.dtype == np.uint64 and counts.shape == (300,)
    assert [int(c) for c in counts] == [stream.ids.tolist().count(i) for i in range(300)]
    with pytest.raises(MismatchError, match="the vocabulary has 40 ids"):
        count_tokens(stream, 40)


def test_the_cache_is_used_and_an_edit_or_another_tokenizer_misses_it(
    tokenizer: Tokenizer, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = tokens_of([text], tokenizer, cache)
    other = tokens_of([text], Tokenizer.train(CORPUS, 270), cache)
    Path(text).write_text("the cat sat\n")
    edited = tokens_of([text], tokenizer, cache)
    assert len({first.key, other.key, edited.key}) == 3
    assert sorted(p.name for p in cache.iterdir()) == sorted(
        f"{s.key[:32]}.ids" for s in (first, other, edited)
    )
    monkeypatch.setattr(Tokenizer, "encode_batch", None)  # a second encoding would fail
    assert tokens_of([text], tokenizer, cache).ids.tolist() == edited.ids.tolist()


@pytest.mark.parametrize("damage", ["flip ids", "flip starts", "cut", "grow", "empty"])
def test_a_damaged_cache_is_rebuilt(
    tokenizer: Tokenizer, text: str, tmp_path: Path, damage: str
) -> None:
    expected = tokens_of([text], tokenizer, tmp_path).ids.tolist()
    (path,) = tmp_path.glob("*.ids")
    data = bytearray(path.read_bytes())
    if damage == "flip ids":
        data[5] ^= 1
    elif damage == "flip starts":
        data[-tokens._TRAILER.size - 3] ^= 64
    else:
        data = {"cut": data[:-1], "grow": data + b"\0", "empty": bytearray()}[damage]
    path.write_bytes(data)
    assert tokens_of([text], tokenizer, tmp_path).ids.tolist() == expected
    assert path.read_bytes() != bytes(data)


def test_long_texts_are_encoded_in_pieces_with_the_ids_of_the_whole(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = "the cat\n sat\n\non the  mat,\nthe rat\n" * 40
    (tmp_path / "a.txt").write_text(whole)
    monkeypatch.setattr(tokens, "_PIECE_CHARACTERS", 64)
    pieces = tokens._pieces(whole)
    assert len(pieces) > 10 and "".join(pieces) == whole
    stream = tokens_of([str(tmp_path / "a.txt")], tokenizer)
    assert stream.ids.tolist() == [*tokenizer.encode(whole), tokenizer.eos_id]


def test_many_batches_make_one_stream(
    tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens_of([text], tokenizer)
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 4)
    found = tokens_of([text], tokenizer)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.starts.tolist() == expected.starts.tolist()


def test_text_that_changes_under_the_reader(
    tokenizer: Tokenizer, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tokens._write_cache

    def edit_then_write(*arguments: object) -> str:
        Path(text).write_text("another text\n")
        return real(*arguments)

    monkeypatch.setattr(tokens, "_write_cache", edit_then_write)
    with pytest.raises(DataError, match="changed while it was read"):
        tokens_of([text], tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
