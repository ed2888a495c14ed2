"""File names in the manifest, what lies under them, and shard files that are not the right ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _hostile import Case, params, run_case
from _nano import RAW_F16, Nano, refresh, reseal, tree_bytes, write_nano

from tolkit_formats import open_bundle, verify
from tolkit_formats.errors import BundleError

SHARD = "tables/records-0-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nano(tmp_path_factory.mktemp("good") / "g.tol").path


def listed_as(name: str) -> Callable[[Path], object]:
    """README.md under another name in the manifest."""

    def damage(path: Path) -> None:
        reseal(path, lambda m: m["files"].update({name: m["files"].pop("README.md")}))

    return damage


NAMES = {
    "parent": "../README.md",
    "parent in tables": "tables/../README.md",
    "parent of parent": "tables/../../README.md",
    "dots in a name": "tables/a..b",
    "absolute": "/etc/passwd",
    "absolute in tables": "tables//etc/passwd",
    "backslash": "tables\\a",
    "backslash in a name": "tables/a\\b",
    "drive": "C:/a",
    "drive without slash": "C:a",
    "UNC": "\\\\host\\share",
    "URL": "https://example.org/a",
    "NUL": "tables/a\0b",
    "NUL at the end": "README.md\0",
    "newline": "tables/a\nb",
    "newline at the end": "tables/a\n",
    "space": "tables/a b",
    "leading dot": "tables/.hidden",
    "current folder": "tables/./a",
    "trailing slash": "tables/a/",
    "deeper": "tables/a/b",
    "empty": "",
    "tables alone": "tables/",
    "129 characters": "tables/" + "a" * 129,
    "a megabyte": "tables/" + "a" * (1 << 19),
    "look-alike of a letter": "tables/\u0430",
    "right-to-left": "tables/a\u202eb",
    "combining": "tables/a\u0301",
    "surrogate": "tables/\ud800",
    "case clash": "tables/A",
    "device": "CON",
    "root name of ours, other case": "readme.md",
    "manifest itself": "tol.json",
    "quality": "quality.jsonl",
    "unknown root name": "model.safetensors",
    "pickle": "pytorch_model.bin",
    "escape": "tables/\x1b[31m",
}
NAME_CASES = [Case(f"name: {k}", listed_as(v), ("files", "not allowed")) for k, v in NAMES.items()]
NAME_CASES += [
    Case("a table file nobody needs", listed_as("tables/notes.txt"), ("notes.txt", "nothing")),
    Case(
        "a shard too many", listed_as("tables/records-1-00001-of-00001.safetensors"), ("nothing",)
    ),
    Case(
        "a shard of another count",
        lambda p: reseal(
            p,
            lambda m: m["files"].update(
                {"tables/records-0-00001-of-00002.safetensors": m["files"].pop(SHARD)}
            ),
        ),
        (SHARD, "missing"),
    ),
]


def replace_by(name: str, make: Callable[[Path, Path], object]) -> Callable[[Path], object]:
    """Move a file of the bundle outside, and `make(place, outside)` something in its place."""

    def damage(path: Path) -> None:
        outside = path.parent / "outside"
        shutil.move(path / name, outside)
        make(path / name, outside)

    return damage


PLACES = [
    *[
        Case(f"{name} is a link to the real file", replace_by(name, Path.symlink_to), (name, word))
        for name, word in (
            ("tol.json", "tol.json"),
            ("config.json", "link"),
            ("backbone.safetensors", "link"),
            ("tables/slots.safetensors", "link"),
            (SHARD, "link"),
        )
    ],
    Case("link loop", replace_by(SHARD, lambda p, _: p.symlink_to(p.name)), (SHARD, "link")),
    Case("dangling link", replace_by("README.md", lambda p, _: p.symlink_to("gone")), ("link",)),
    Case(
        "FIFO",
        replace_by("config.json", lambda p, _: os.mkfifo(p)),
        ("config.json", "not a regular file"),
    ),
    Case("FIFO shard", replace_by(SHARD, lambda p, _: os.mkfifo(p)), (SHARD, "not a regular file")),
    Case(
        "folder",
        replace_by("README.md", lambda p, _: p.mkdir()),
        ("README.md", "not a regular file"),
    ),
    Case("folder shard", replace_by(SHARD, lambda p, _: p.mkdir()), (SHARD, "not a regular file")),
    Case(
        "device",
        replace_by("config.json", lambda p, _: p.symlink_to("/dev/zero")),
        ("config.json", "link"),
    ),
    Case(
        "tables is a link",
        replace_by("tables", Path.symlink_to),
        ("tables", "not a folder"),
    ),
    Case("tables is a file", replace_by("tables", lambda p, _: p.write_bytes(b"")), ("tables",)),
    Case("no tables", lambda p: shutil.rmtree(p / "tables"), ("tables", "not a folder")),
]


def on_shard(change: Callable[[bytes], bytes], name: str = SHARD) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def other(**options: object) -> Callable[[Path], object]:
    """The records of another bundle of the same shape."""

    def damage(path: Path) -> None:
        donor = write_nano(path.parent / "donor.tol", **{"seed": 7, **options})
        shutil.copy(donor.path / SHARD, path / SHARD)

    return damage


def sparse(path: Path) -> None:
    shard = path / SHARD
    size_bytes = shard.stat().st_size
    shard.unlink()
    with shard.open("wb") as file:
        file.truncate(size_bytes)


def extra(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(b"not listed")


SHARD_CASES = [
    Case("missing", lambda p: (p / SHARD).unlink(), (SHARD, "no such file")),
    Case("empty", on_shard(lambda d: b""), (SHARD, "0 bytes, expected")),
    Case("short by 1", on_shard(lambda d: d[:-1]), (SHARD, "bytes, expected")),
    Case("long by 1", on_shard(lambda d: d + b"\0"), (SHARD, "bytes, expected")),
    Case("half", on_shard(lambda d: d[: len(d) // 2]), (SHARD, "bytes, expected")),
    Case("doubled", on_shard(lambda d: d + d), (SHARD, "bytes, expected")),
    Case("zeros of the right size", on_shard(lambda d: bytes(len(d))), (SHARD, "header")),
    Case("sparse zeros of the right size", sparse, (SHARD, "header")),
    Case("0xFF of the right size", on_shard(lambda d: b"\xff" * len(d)), (SHARD, "header")),
    Case("text of the right size", on_shard(lambda d: b"x" * len(d)), (SHARD, "header")),
    Case(
        "header intact, payload zero",
        on_shard(lambda d: d[:512] + bytes(len(d) - 512)),
        (SHARD, "SHA-256"),
        at_open=False,
    ),
    Case("another bundle's", other(), (SHARD, "SHA-256"), at_open=False),
    Case("another size's", other(vocab_size=39), (SHARD, "bytes, expected")),
    Case("missing config", lambda p: (p / "config.json").unlink(), ("config.json", "no such")),
    Case("missing tokenizer", lambda p: (p / "tokenizer.json").unlink(), ("tokenizer.json",)),
    Case("missing slots", lambda p: (p / "tables/slots.safetensors").unlink(), ("slots",)),
    Case("missing checksums", lambda p: (p / "tables/checksums.safetensors").unlink(), ("checks",)),
    Case("missing card", lambda p: (p / "README.md").unlink(), ("README.md", "no such file")),
    *[
        Case(f"extra {name!r}", extra(name), ("is not listed",), at_open=False)
        for name in (
            "extra.bin",
            ".hidden",
            "tables/extra",
            "tables/records-0-00002-of-00001.safetensors",
            "two\nlines",
            "tables/\x1b[31m",
            "caf\udce9",
        )
    ],
    Case("extra folder", lambda p: (p / "deep").mkdir(), ("deep", "not listed"), at_open=False),
    Case(
        "extra folder in tables",
        lambda p: (p / "tables/deep").mkdir(),
        ("deep", "not listed"),
        at_open=False,
    ),
    Case(
        "extra link",
        lambda p: (p / "x.json").symlink_to("/etc/passwd"),
        ("x.json", "not listed"),
        at_open=False,
    ),
]


@params(NAME_CASES)
def test_names(case: Case, good: Path, tmp_path: Path) -> None:
    canary = tree_bytes(good)
    run_case(case, good, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.tol"]
    assert tree_bytes(good) == canary


@params(PLACES)
def test_what_lies_under_a_name(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


@params(SHARD_CASES)
def test_shard_files(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


# Shards that are intact and wrong: what opens must not serve a wrong number.


def sharded(path: Path, seed: int = 0) -> Nano:
    return write_nano(
        path,
        [RAW_F16, RAW_F16],
        vocab_size=3000,
        hidden_size=5,
        max_shard_bytes=1,
        seed=seed,
        fingerprint=str(seed),
    )


def swap(path: Path, first: str, second: str) -> None:
    a, b = path / first, path / second
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)


@pytest.mark.parametrize("kind", ["swapped", "doubled", "other bundle's"])
def test_no_row_of_an_intact_but_wrong_shard(tmp_path: Path, kind: str) -> None:
    nano = sharded(tmp_path / "b.tol")
    names = [f"tables/records-0-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    wrong = names[1:2]
    if kind == "swapped":
        swap(nano.path, *names[:2])
        wrong = names[:2]
    elif kind == "doubled":
        shutil.copy(nano.path / names[0], nano.path / names[1])
    else:
        donor = sharded(tmp_path / "donor.tol", seed=3)
        shutil.copy(donor.path / names[1], nano.path / names[1])
    bundle = open_bundle(nano.path)
    assert nano.slot_of_token_V is not None
    shard_of_token = nano.slot_of_token_V // 1024
    for token in range(0, 3000, 37):
        if names[shard_of_token[token]] in wrong:
            with pytest.raises(BundleError, match="records-0-"):
                bundle.rows([token])
        else:
            np.testing.assert_array_equal(bundle.rows([token]), nano.rows_VKD[[token]])
    with pytest.raises(BundleError, match="SHA-256"):
        verify(nano.path)


# Valid oddities: strange, and within the rules.


def _pretty_header(path: Path) -> None:
    shard = path / SHARD
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), indent=3).encode() + b" " * 777
    shard.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    refresh(path)


def _hard_link(path: Path) -> None:
    os.link(path / SHARD, path.parent / "second name")


def _read_only(path: Path) -> None:
    for entry in [*path.rglob("*"), path]:
        entry.chmod(0o555 if entry.is_dir() else 0o444)


ODDITIES: dict[str, Callable[[Path], object]] = {
    "shard header with spaces and line feeds": _pretty_header,
    "hard link to a shard": _hard_link,
    "read-only": _read_only,
    "quality.jsonl": lambda p: (p / "quality.jsonl").write_bytes(b"{}\n"),
    "a damaged quality.jsonl": lambda p: (p / "quality.jsonl").write_bytes(b"\xff" * 99),
    "an empty history": lambda p: reseal(p, lambda m: m.update(history=[])),
    "no tokenizer config": lambda p: ((p / "tokenizer_config.json").unlink(), refresh(p)),
    "no card": lambda p: ((p / "README.md").unlink(), refresh(p)),
    "lookup_scale 0.5": lambda p: reseal(p, lambda m: m.update(lookup_scale=0.5)),
    "out_of_range row_0": lambda p: reseal(p, lambda m: m.update(out_of_range="row_0")),
    "encode order backwards": lambda p: reseal(p, lambda m: m["encoding"]["order"].reverse()),
    "smaller rows_per_shard": lambda p: reseal(
        p, lambda m: m["tiers"][0].update(rows_per_shard=1024)
    ),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_valid_oddities_open(name: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.tol"
    shutil.copytree(good, path)
    ODDITIES[name](path)
    rows = open_bundle(path).rows(np.arange(40))
    np.testing.assert_array_equal(rows, open_bundle(good).rows(np.arange(40)))
    verify(path)
    path.chmod(0o755)


@pytest.mark.parametrize(
    "options",
    [
        {"vocab_size": 1, "tokenizer": False},
        {"vocab_size": 1024},
        {"hidden_size": 1, "codecs": [RAW_F16]},
        {"codecs": [RAW_F16], "gone": {0: None}},
        {"codecs": [RAW_F16] * 3, "gone": {0: 2, 1: 2}},
        {"codecs": [RAW_F16] * 64, "hidden_size": 2},
        {"counts": False, "tokenizer": False},
    ],
    ids=str,
)
def test_valid_small_and_strange_shapes_open(options: dict, tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol", **options)
    verify(nano.path)
    ids = np.arange(nano.rows_VKD.shape[0])
    got = open_bundle(nano.path).rows(ids)
    assert got.shape == nano.rows_VKD.shape
    np.testing.assert_allclose(got, nano.rows_VKD, rtol=1e-5, atol=1e-5)


def test_paths_of_a_bundle_may_be_odd(tmp_path: Path) -> None:
    for name in ("with space.tol", "line\nfeed.tol", "caf\udce9.tol", "-f.tol", "x" * 240 + ".tol"):
        nano = write_nano(tmp_path / name)
        verify(nano.path)
    (tmp_path / "link.tol").symlink_to(tmp_path / "with space.tol")
    verify(tmp_path / "link.tol")


def test_the_corpus_is_as_large_as_planned() -> None:
    assert len(NAME_CASES) + len(PLACES) >= 30 and len(SHARD_CASES) >= 25
    assert len(ODDITIES) + 7 + 6 >= 20
