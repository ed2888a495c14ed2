"""Malformed tol.json: its bytes, and its meaning behind a fitting identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _hostile import Case, params, run_case
from _nano import reseal, seal_json, write_nano

from tolkit_formats.errors import BundleError, InputError, UnsupportedVersionError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nano(tmp_path_factory.mktemp("good") / "g.tol", gone={}).path


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Change the bytes of tol.json."""

    def damage(path: Path) -> None:
        manifest = path / "tol.json"
        manifest.write_bytes(change(manifest.read_bytes()))

    return damage


def text(old: str, new: str) -> Callable[[Path], object]:
    """Replace the first `old` in tol.json, identity left alone."""

    def change(data: bytes) -> bytes:
        assert old.encode() in data, old
        return data.replace(old.encode(), new.encode(), 1)

    return raw(change)


def field(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the parsed manifest and seal it again."""
    return lambda path: reseal(path, change)


def put(*keys: str | int, value: object) -> Callable[[Path], object]:
    """Set manifest[k0][k1]... and seal it again; deletes the key when the value is `GONE`."""

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in keys[:-1]:
            place = place[key]
        if value is GONE:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value

    return field(change)


GONE = object()
HUGE = (1 << 53) - 1


def _bytes_cases() -> list[Case]:
    cases = [
        Case("empty", raw(lambda d: b""), ("tol.json", "not JSON")),
        Case("a space", raw(lambda d: b" "), ("not JSON",)),
        Case("byte order mark", raw(lambda d: b"\xef\xbb\xbf" + d), ("BOM",)),
        Case("UTF-16", raw(lambda d: d.decode().encode("utf-16")), ("not UTF-8",)),
        Case("UTF-32", raw(lambda d: d.decode().encode("utf-32-le")), ("not JSON",)),
        Case("latin-1", text('"build"', '"b\udcff"'.encode("utf-8", "replace").decode()), ()),
        Case("NUL at the end", raw(lambda d: d + b"\0"), ("Extra data",)),
        Case("only NULs", raw(lambda d: bytes(len(d))), ("not JSON",)),
        Case("trailing object", raw(lambda d: d + b"{}"), ("Extra data",)),
        Case("line feed too many", raw(lambda d: d + b"\n"), ("canonical",)),
        Case("no final line feed", raw(lambda d: d[:-1]), ("canonical",)),
        Case("compact", raw(lambda d: json.dumps(json.loads(d)).encode()), ("canonical",)),
        Case("CRLF", raw(lambda d: d.replace(b"\n", b"\r\n")), ("canonical",)),
        Case("a list", raw(lambda d: b"[]"), ("expected an object",)),
        Case("null", raw(lambda d: b"null"), ("expected an object, got null",)),
        Case("a string", raw(lambda d: b'"tol"'), ("expected an object, got a string",)),
        Case("5 MiB", raw(lambda d: d + b" " * (5 << 20)), ("larger", "4,194,304"), InputError),
        Case("depth 100,000", raw(lambda d: b"[" * 100_000), ("nested deeper",)),
        Case("duplicate key", text('"combine"', '"version"'), ("duplicate key 'version'",)),
        Case("duplicate key 2 deep", text('"norm"', '"ffn"'), ("duplicate key 'ffn'",)),
        Case("duplicate file", text('"README.md"', '"config.json"'), ("duplicate key",)),
        Case("NaN", text('"lookup_scale": 1', '"lookup_scale": NaN'), ("NaN",)),
        Case("1e999", text('"lookup_scale": 1', '"lookup_scale": 1e999'), ("not finite",)),
        Case("2^63", text('"vocab_size": 40', f'"vocab_size": {2**63}'), ("out of range",)),
        Case("5,000 digits", text('"vocab_size": 40', '"vocab_size": ' + "4" * 5000), ("range",)),
        Case("one digit changed", text('"vocab_size": 40', '"vocab_size": 41'), ("identity",)),
        Case("escape for a letter", text('"build"', '"\\u0062uild"'), ("canonical",)),
        Case("1.0 for 1", text('"lookup_scale": 1', '"lookup_scale": 1.0'), ("identity",)),
    ]
    for percent in range(5, 100, 10):
        cut = raw(lambda d, p=percent: d[: len(d) * p // 100])
        cases.append(Case(f"truncated at {percent} %", cut, ("tol.json", "not JSON")))
    return cases


BYTES = _bytes_cases()


def tier(**values: object) -> Callable[[Path], object]:
    return field(lambda m: m["tiers"][0].update(values))


def plane(index: int, **values: object) -> Callable[[Path], object]:
    return field(lambda m: m["tiers"][0]["planes"][index].update(values))


REQUIRED = (
    "format",
    "version",
    "required_features",
    "identity",
    "vocab_size",
    "num_layers",
    "hidden_size",
    "combine",
    "lookup_scale",
    "out_of_range",
    "layers",
    "slots",
    "tiers",
    "encoding",
    "sources",
    "files",
    "history",
)
INTEGERS = ("vocab_size", "num_layers", "hidden_size")
Newer = UnsupportedVersionError

MEANING = [
    *[
        Case(f"{name} missing", put(name, value=GONE), (f"{name} is missing",))
        for name in REQUIRED
        if name != "identity"
    ],
    Case(
        "identity missing",
        raw(
            lambda d: json.dumps(
                {k: v for k, v in json.loads(d).items() if k != "identity"}, sort_keys=True
            ).encode()
        ),
        ("identity is missing",),
    ),
    *[
        Case(f"{name} is {label}", put(name, value=value), (name, word))
        for name in INTEGERS
        for label, value, word in (
            ("a string", "40", "got a string"),
            ("true", True, "got a boolean"),
            ("a float", 40.0, "got a number"),
            ("null", None, "got null"),
            ("0", 0, "expected 1 to"),
            ("negative", -40, "expected 1 to"),
            ("huge", HUGE, "expected 1 to"),
        )
    ],
    Case("another format", put("format", value="gguf"), ("format is 'gguf'",)),
    Case("version 2.0", put("version", value="2.0"), ("version 2.0", "1.x"), Newer),
    Case("version 1", put("version", value="1"), ("not MAJOR.MINOR",)),
    Case("version 01.0", put("version", value="01.0"), ("not MAJOR.MINOR",)),
    Case("version 1.0 and a line", put("version", value="1.0\n"), ("not MAJOR.MINOR",)),
    Case("version a number", put("version", value=1.0), ("version", "string")),
    Case("version negative", put("version", value="-1.0"), ("not MAJOR.MINOR",)),
    Case("version of Arabic digits", put("version", value="\u0661.\u0660"), ("not MAJOR.MINOR",)),
    Case("unknown feature", put("required_features", value=["x\n" * 99]), ("feature",), Newer),
    Case("feature no string", put("required_features", value=[{"a": 1}]), ("feature",), Newer),
    Case("65 features", put("required_features", value=["x"] * 65), ("required_features", "65")),
    Case("unknown field", put("colour", value="red"), ("unknown field 'colour'",)),
    Case("unknown field, long", put("c\n" * 999, value=1), ("unknown field",)),
    Case("identity upper case", raw(lambda d: _upper_identity(d)), ("identity", "lower-case")),
    Case("identity short", raw(lambda d: _short_identity(d)), ("identity", "64")),
    Case("V x L x D beyond the files", put("vocab_size", value=1 << 24), ("slots", "[16777216]")),
    Case("V below the rows", put("vocab_size", value=39), ("num_rows is 40",)),
    Case("L beyond layers", put("num_layers", value=5), ("layers has 4 entries, expected 5",)),
    Case("D changed", put("hidden_size", value=25), ("plane of layer", "expected")),
    Case("combine unknown", put("combine", value="product"), ("combine is 'product'",)),
    Case("lookup_scale a string", put("lookup_scale", value="1"), ("lookup_scale", "number")),
    Case("lookup_scale true", put("lookup_scale", value=True), ("lookup_scale", "number")),
    Case("out_of_range unknown", put("out_of_range", value="wrap"), ("out_of_range",)),
    Case("slots unknown", put("slots", value="hashed"), ("slots is 'hashed'",)),
    Case("slots identity, file there", put("slots", value="identity"), ("slots", "nothing")),
    Case("layers a dict", put("layers", value={}), ("layers must be a list",)),
    Case("layer no object", put("layers", 1, value="kept"), ("layers[1]", "got a string")),
    Case("layer status unknown", put("layers", 1, "status", value="lost"), ("layers[1]", "lost")),
    Case(
        "layer status of a megabyte",
        put("layers", 1, "status", value="l\n" * (1 << 19)),
        ("layers[1]: status",),
    ),
    Case(
        "folded into nothing",
        put("layers", 1, value={"status": "folded"}),
        ("layers[1]", "into is missing"),
    ),
    Case(
        "folded into itself",
        put("layers", 1, value={"status": "folded", "into": 1}),
        ("layers[1] is folded into 1",),
    ),
    Case(
        "folded beyond L",
        put("layers", 1, value={"status": "folded", "into": 4}),
        ("layers[1]", "into is 4"),
    ),
    Case(
        "kept with into",
        put("layers", 1, value={"status": "kept", "into": 0}),
        ("layers[1]", "unknown field 'into'"),
    ),
    Case(
        "layer dropped, plane there",
        put("layers", 1, value={"status": "dropped"}),
        ("planes must be the kept layers [0, 2, 3]",),
    ),
    Case("no tiers", put("tiers", value=[]), ("tiers hold 0 rows",)),
    Case("257 tiers", field(lambda m: m.update(tiers=m["tiers"] * 257)), ("tiers has 257",)),
    Case("tier twice", field(lambda m: m.update(tiers=m["tiers"] * 2)), ("tiers[1]", "first_slot")),
    Case("first_slot 1", tier(first_slot=1), ("first_slot is 1",)),
    Case("no rows", tier(num_rows=0), ("num_rows is 0",)),
    Case("rows beyond V", tier(num_rows=41), ("num_rows is 41",)),
    Case("stride 0", tier(stride=0), ("stride is 0",)),
    Case("stride too small", tier(stride=16), ("stride is 16, expected",)),
    Case("stride too large", tier(stride=1 << 20), ("stride is 1048576, expected",)),
    Case("stride huge", tier(stride=HUGE), ("stride is",)),
    Case("rows_per_shard 0", tier(rows_per_shard=0), ("rows_per_shard is 0",)),
    Case("rows_per_shard odd", tier(rows_per_shard=1025), ("rows_per_shard 1025",)),
    Case("shard above 1 GiB", tier(rows_per_shard=1 << 24), ("rows_per_shard 16777216",)),
    Case("layer twice", plane(1, layer=0), ("planes must be the kept layers",)),
    Case("layers swapped", field(lambda m: m["tiers"][0]["planes"].reverse()), ("in order",)),
    Case("plane gone", field(lambda m: m["tiers"][0]["planes"].pop()), ("planes must be",)),
    Case("layer beyond L", plane(3, layer=9), ("planes must be the kept layers",)),
    Case("layer true", plane(1, layer=True), ("planes[1]", "got a boolean")),
    Case("offset moved", plane(1, offset=4), ("plane of layer 1 at 4+28, expected 48+28",)),
    Case("offset negative", plane(1, offset=-4), ("offset is -4",)),
    Case("length short", plane(2, length=12), ("plane of layer 2", "expected 76+16")),
    Case("length huge", plane(2, length=HUGE), ("length is",)),
    Case("unknown plane field", plane(0, alpha=2), ("unknown field 'alpha'",)),
    Case("order a layer short", put("encoding", "order", value=[0, 1, 2]), ("order must list",)),
    Case("order doubled", put("encoding", "order", value=[0, 1, 2, 2]), ("order must list",)),
    Case("order of strings", put("encoding", "order", value=["0"]), ("order must list",)),
    Case("order with true", put("encoding", "order", value=[0, True, 2, 3]), ("order must list",)),
    Case("feedback 1", put("encoding", "feedback", value=1), ("feedback must be true",)),
    Case("source digest short", put("sources", "embedding", value="ab"), ("embedding", "64")),
    Case("source upper case", put("sources", "config", value="A" * 64), ("config", "lower-case")),
    Case("source with a line", put("sources", "config", value="a" * 64 + "\n"), ("config",)),
    Case("source layers short", field(lambda m: m["sources"]["layers"].pop()), ("3 entries",)),
    Case("source norm null", put("sources", "layers", 0, "norm", value=None), ("norm", "null")),
    Case(
        "file bytes negative", put("files", "README.md", "bytes", value=-7), ("README.md: bytes",)
    ),
    Case("file bytes true", put("files", "README.md", "bytes", value=True), ("README.md: bytes",)),
    Case("file digest short", put("files", "README.md", "sha256", value="0"), ("README.md: sha",)),
    Case("file no object", put("files", "README.md", value=7), ("README.md: expected an object",)),
    Case("files a list", put("files", value=[]), ("files: expected an object",)),
    Case("no shard listed", field(lambda m: _drop_file(m, "records-")), ("records-0", "missing")),
    Case("no checksums", field(lambda m: _drop_file(m, "checksums")), ("checksums", "missing")),
    Case("no bases", field(lambda m: _drop_file(m, "bases")), ("bases", "missing")),
    Case("no slots", field(lambda m: _drop_file(m, "slots")), ("slots", "missing")),
    Case("no config", field(lambda m: _drop_file(m, "config.json")), ("config.json is missing",)),
    Case("no backbone", field(lambda m: _drop_file(m, "backbone")), ("backbone", "missing")),
    Case("history a dict", put("history", value={}), ("history must be a list",)),
    Case("history no command", put("history", 0, "command", value=GONE), ("history[0]: command",)),
    Case("history parent", put("history", 0, "parent", value="B.tol"), ("history[0]: parent",)),
    Case("history options", put("history", 0, "options", value="-f"), ("history[0]: options",)),
]


def _drop_file(manifest: dict[str, Any], part: str) -> None:
    (name,) = [name for name in manifest["files"] if part in name and "tokenizer" not in name]
    del manifest["files"][name]


def _upper_identity(data: bytes) -> bytes:
    manifest = json.loads(data)
    return data.replace(manifest["identity"].encode(), manifest["identity"].upper().encode())


def _short_identity(data: bytes) -> bytes:
    identity = json.loads(data)["identity"].encode()
    return data.replace(identity, identity[:-1])


def codec(index: int, **params_: object) -> Callable[[Path], object]:
    return field(lambda m: m["tiers"][0]["planes"][index]["codec"].update(params_))


CODECS = [
    Case("codec null", plane(0, codec=None), ("planes[0]: codec",)),
    Case("codec a string", plane(0, codec="raw"), ("planes[0]: codec",)),
    Case("codec without a name", plane(0, codec={}), ("planes[0]", "name")),
    Case("codec name a list", plane(0, codec={"name": ["raw"]}), ("planes[0]", "name")),
    Case("unknown codec", plane(0, codec={"name": "ans"}), ("planes[0]", "ans"), Newer),
    Case("codec of a megabyte", plane(0, codec={"name": "n\n" * 5000}), ("planes[0]",), Newer),
    Case("raw dtype unknown", codec(0, dtype="f64"), ("planes[0]", "dtype", "f64")),
    Case("raw dtype of a megabyte", codec(0, dtype="f" * 5000), ("planes[0]", "dtype")),
    Case("raw dtype missing", plane(0, codec={"name": "raw"}), ("planes[0]", "dtype")),
    Case("raw with a group", codec(0, group_size=64), ("planes[0]", "group_size", "unknown")),
    Case("unknown parameter", codec(1, **{"z\n" * 999: 8}), ("planes[1]", "unknown parameter")),
    Case("int8 bits 3", codec(1, bits=3), ("planes[1]", "bits", "unknown")),
    Case("group size 0", codec(2, group_size=0), ("planes[2]", "group_size")),
    Case("group size negative", codec(2, group_size=-64), ("planes[2]", "group_size")),
    Case("group size 63", codec(2, group_size=63), ("planes[2]", "group_size", "63")),
    Case("group size 64.0", codec(2, group_size=64.0), ("planes[2]", "group_size")),
    Case("group size true", codec(2, group_size=True), ("planes[2]", "group_size")),
    Case("group size missing", plane(2, codec={"name": "nf4"}), ("planes[2]", "group_size")),
    Case("rank 0", codec(3, rank=0), ("planes[3]", "rank", "1..24")),
    Case("rank above D", codec(3, rank=25), ("planes[3]", "rank", "25")),
    Case("rank negative", codec(3, rank=-4), ("planes[3]", "rank")),
    Case("rank a string", codec(3, rank="50%"), ("planes[3]", "rank")),
    Case("rank another", codec(3, rank=5), ("plane of layer 3",)),
    Case("inner missing", plane(3, codec={"name": "svd", "rank": 4}), ("planes[3]", "inner")),
    Case("inner svd", codec(3, inner={"name": "svd"}), ("planes[3]", "inner")),
    Case("inner unknown", codec(3, inner={"name": "ans"}), ("planes[3]", "ans"), Newer),
    Case("inner of a megabyte", codec(3, inner="i\n" * 5000), ("planes[3]", "inner")),
]


@params(BYTES)
def test_manifest_bytes(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


@params(MEANING + CODECS)
def test_manifest_meaning(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


def test_the_corpus_is_as_large_as_planned(good: Path) -> None:
    assert len(BYTES) >= 30 and len(MEANING) >= 45
    data = (good / "tol.json").read_bytes()
    assert seal_json(json.loads(data)) == data  # sealing itself changes nothing


def test_errors_are_bundle_errors_or_say_which_version_is_needed() -> None:
    assert {case.error for case in [*BYTES, *MEANING, *CODECS]} == {
        BundleError,
        InputError,
        UnsupportedVersionError,
    }
