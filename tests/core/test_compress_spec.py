"""What a user may write after --rank, --layers, --codec, and what is refused in which words."""

from __future__ import annotations

import pytest

from tolkit.compress.spec import CompressSpec, middle_layers, named_codec, parse_layers, parse_ranks
from tolkit.errors import UsageError


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("0", (0,)),
        ("3-5,9", (3, 4, 5, 9)),
        ("9,3-5", (3, 4, 5, 9)),
        ("10-", (10, 11)),
        (" 1 , 2 ", (1, 2)),
    ],
)
def test_layer_lists(text: str, want: tuple[int, ...]) -> None:
    assert parse_layers(text, 12, "--layers") == want


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("12", "layer 12 is out of range, the model has layers 0 to 11"),
        ("3-12", "layer 12 is out of range"),
        ("5-3", "runs backwards"),
        ("3,3", "names a layer twice"),
        ("-3", "is not a layer"),
        ("a", "is not a layer"),
        ("", "is not a layer"),
        ("1,,2", "is not a layer"),
        ("1.5", "is not a layer"),
    ],
)
def test_layer_lists_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_layers(text, 12, "--layers")
    assert caught.value.message.startswith("--layers: ")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("50%", {0: 16, 1: 16, 2: 16}),
        ("33.3%", {0: 10, 1: 10, 2: 10}),
        ("100%", {0: 32, 1: 32, 2: 32}),
        ("1", {0: 1, 1: 1, 2: 1}),
        ("0:8,1-:25%", {0: 8, 1: 8, 2: 8}),
        ("2:5", {2: 5}),
    ],
)
def test_ranks(text: str, want: dict[int, int]) -> None:
    assert parse_ranks(text, 3, 32) == want


def test_percent_is_floored_without_binary_fractions() -> None:
    # 0.7 * 10 is 6.999... in binary floating point.
    assert parse_ranks("70%", 1, 10) == {0: 7}
    assert parse_ranks("50%", 1, 25) == {0: 12}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("33", "rank 33, expected 1 to 32"),
        ("0", "rank 0, expected 1 to 32"),
        ("101%", "more than 100 %"),
        ("1%", "gives rank 0"),
        ("half", "is not a rank"),
        ("-4", "is not a rank"),
        ("8,4", "names no layers"),
        ("0-1:8,1-2:4", "names layer 1 twice"),
        ("5:8", "out of range"),
    ],
)
def test_ranks_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_ranks(text, 3, 32)


def test_codecs_not_offered() -> None:
    with pytest.raises(UsageError, match="'int3' is not offered, expected int8, int4, nf4, fp4"):
        CompressSpec(codec="int3")
    with pytest.raises(UsageError, match="nothing to do"):
        CompressSpec()


def test_named_codecs() -> None:
    assert named_codec("f16", 8).to_json() == {"name": "raw", "dtype": "f16"}
    assert named_codec("nf4", 8).to_json() == {"name": "nf4", "group_size": 64}


def test_middle() -> None:
    assert middle_layers(range(12), 2) == (5, 6)
    assert middle_layers(range(8), 2) == (3, 4)
    assert middle_layers([0, 2, 4, 6], 1) == (2,)
    for count in (0, 12, -1):
        with pytest.raises(UsageError, match="expected 1 to 11"):
            middle_layers(range(12), count)
