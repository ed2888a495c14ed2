"""strict_json: what json.loads lets through is refused; the canonical form is one byte string."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolkit_formats.errors import BundleError
from tolkit_formats.limits import MAX_INTEGER
from tolkit_formats.strict_json import canonical, parse

REFUSED = {
    "empty": (b"", "not JSON"),
    "nothing but spaces": (b"  \n", "not JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "UTF-16": ("{}".encode("utf-16-le"), "not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "UTF-8 surrogate": (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
    "NUL": (b"{}\0", "Extra data"),
    "NUL in a string": (b'{"a": "\0"}', "Invalid control character"),
    "trailing object": (b"{}{}", "Extra data"),
    "trailing comma": (b"[1,]", "not JSON"),
    "comment": (b"/* */ {}", "not JSON"),
    "single quotes": (b"{'a': 1}", "not JSON"),
    "truncated": (b'{"a": [1, 2', "not JSON"),
    "duplicate key": (b'{"a": 1, "b": 2, "a": 1}', "duplicate key 'a'"),
    "duplicate key below": (b'{"x": [{"a": 1, "a": 2}]}', "duplicate key 'a'"),
    "escaped duplicate key": (b'{"a": 1, "\\u0061": 2}', "duplicate key 'a'"),
    "NaN": (b"[NaN]", "NaN"),
    "Infinity": (b"[Infinity]", "Infinity"),
    "-Infinity": (b"[-Infinity]", "-Infinity"),
    "float overflow": (b"[1e999]", "not finite"),
    "negative float overflow": (b"[-1e999]", "not finite"),
    "2^53": (str(MAX_INTEGER + 1).encode(), "out of range"),
    "-2^53": (str(-MAX_INTEGER - 1).encode(), "out of range"),
    "2^63": (b"9223372036854775808", "out of range"),
    "5,000-digit integer": (b"9" * 5000, "out of range"),
    "leading zero": (b"[01]", "not JSON"),
    "depth 17": (b"[" * 17 + b"]" * 17, "nested deeper than 16"),
    "depth 17 of objects": (b'{"a":' * 17 + b"1" + b"}" * 17, "nested deeper than 16"),
    "depth 100,000": (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 16"),
    "unclosed depth 100,000": (b"[" * 100_000, "nested deeper than 16"),
}


@pytest.mark.parametrize(("data", "word"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(data: bytes, word: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse(data, "F.json")
    message = caught.value.message
    assert message.startswith("F.json: ") and word in message
    assert "\n" not in message and len(message) < 200


def test_messages_stay_short_and_on_one_line() -> None:
    key = json.dumps("k\n" * 100_000).encode()
    with pytest.raises(BundleError) as caught:
        parse(b"{" + key + b": 1, " + key + b": 2}", "F.json")
    assert "\n" not in caught.value.message and len(caught.value.message) < 200


@pytest.mark.parametrize(
    "data", [b"1", b'"a"', b"null", b"true", b"-0.0", b"[" * 16 + b"]" * 16, b' {"a" : 1}\n\t']
)
def test_accepts_what_json_accepts(data: bytes) -> None:
    assert parse(data, "F.json") == json.loads(data)


def test_largest_integers_pass() -> None:
    for value in (MAX_INTEGER, -MAX_INTEGER):
        assert parse(str(value).encode(), "F.json") == value


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(values)
@settings(max_examples=150, deadline=None)
def test_canonical_form_is_a_fixed_point(value: object) -> None:
    data = canonical(value)
    assert canonical(parse(data, "F.json")) == data
    assert data.isascii() and data.endswith(b"\n")


def test_canonical_form_to_the_byte() -> None:
    data = canonical({"b": [1, 2.5], "a": "\u00e9"})
    assert data == b'{\n "a": "\\u00e9",\n "b": [\n  1,\n  2.5\n ]\n}\n'
    with pytest.raises(ValueError):
        canonical(float("nan"))
