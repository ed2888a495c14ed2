"""Seeded random changes to a sound bundle: a TolError or right rows, never another exception.

TOLKIT_FUZZ=200000 runs more; a failure names its seed, which replays it. An escape becomes a named
case in a test_hostile file.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _bands import write_bands
from _nano import memory_folder, refresh, reseal, tree_bytes, with_header, write_nano

from tolkit_formats import TolError, open_bundle, verify

ROUNDS = int(os.environ.get("TOLKIT_FUZZ", "600"))
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 16, 40, 1024, 2**31, 2**32, 2**53 - 1, 2**53, 2**63, 1e300,
    0.5, -0.0, "", "a", "0", "kept", "folded", "dropped", "mapped", "identity", "raw", "svd", "nf4",
    "f32", "U8", "F64", "\n", "\u0000", "\ud800", "../x", "tables/x", "f" * 64, "x" * 300,
    [], {}, [[]], [0], [-1], [0, 4], [2**52, 2**52], {"name": "raw", "dtype": "f32"},
    {"name": "svd", "rank": 2, "inner": {"name": "int8"}}, "bands", "3x5 2x0", "12x8", [1, 8],
    {"layer": 1, "bits": 3, "exponent": 0}, {"bytes": 0, "sha256": "0" * 64},
]  # fmt: skip


@pytest.fixture(scope="module", params=["mixed", "bands"])
def good(request: pytest.FixtureRequest) -> Iterator[Path]:
    with memory_folder() as folder:
        write = {"mixed": write_nano, "bands": write_bands}[request.param]
        yield write(folder / "g.tol").path


def change_somewhere(value: Any, generator: random.Random) -> None:
    """Replace, remove, double or move one entry somewhere within a JSON value, in place."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        keys = node.keys() if isinstance(node, dict) else range(len(node))
        for key in list(keys):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    collect(value)
    node, key = generator.choice(places)
    kind = generator.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, list):
        node.insert(key, node[key])
    elif kind == 2 and isinstance(node[key], int) and not isinstance(node[key], bool):
        node[key] += generator.choice([-1, 1, 4, -16, 1024, 1 << 40])
    elif kind == 3:
        other, other_key = generator.choice(places)
        node[key] = json.loads(json.dumps(other[other_key]))
    else:
        node[key] = generator.choice(VALUES)


def in_manifest(path: Path, generator: random.Random) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for _ in range(generator.choice([1, 1, 1, 2, 4])):
            change_somewhere(manifest, generator)

    reseal(path, change)


def in_header(path: Path, generator: random.Random) -> None:
    file = generator.choice(sorted(path.rglob("*.safetensors")))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change_somewhere(header, generator)
    body = data[8 + length :]
    if generator.random() < 0.3:
        body = body[: generator.randrange(len(body) + 1)] + bytes(generator.randrange(9))
    file.write_bytes(with_header(json.dumps(header).encode(), body))
    refresh(path)


def in_json_file(path: Path, generator: random.Random) -> None:
    file = path / generator.choice(["config.json", "tokenizer.json", "tokenizer_config.json"])
    document = {"document": json.loads(file.read_bytes())}
    change_somewhere(document, generator)
    file.write_text(json.dumps(document.get("document")))
    refresh(path)


def bytes_anywhere(path: Path, generator: random.Random) -> None:
    file = generator.choice(sorted(entry for entry in path.rglob("*") if entry.is_file()))
    data = bytearray(file.read_bytes())
    for _ in range(generator.choice([1, 2, 16])):
        at = generator.randrange(len(data) + 1)
        data[at : at + generator.randrange(3)] = generator.randbytes(generator.randrange(3))
    file.write_bytes(data)
    if generator.random() < 0.7 and file.name != "tol.json":
        refresh(path)


KINDS = (in_manifest, in_header, in_json_file, bytes_anywhere)


@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
def test_random_changes(kind: Callable[[Path, random.Random], None], good: Path) -> None:
    whole = open_bundle(good)
    want = whole.rows(np.arange(whole.vocab_size))
    original = tree_bytes(good)
    survived = 0
    with memory_folder() as folder:
        path = folder / "b.tol"
        shutil.copytree(good, path)
        for number in range(ROUNDS // len(KINDS)):
            seed = f"{kind.__name__} {number}"
            try:
                kind(path, random.Random(seed))
                survived += _probe(path, want)
            except BaseException as error:
                error.add_note(f"seed {seed!r}")
                raise
            _restore(path, original)
    assert survived < ROUNDS // len(KINDS) / 2, "most changes change nothing: a blunt fuzzer"


def _probe(path: Path, want: np.ndarray) -> bool:
    """Whether the changed bundle still verifies; then it must be a consistent one."""
    try:
        report = verify(path)
    except TolError as error:
        assert error.message.isprintable() and len(error.message) < 500, error.message
        assert error.exit_code in (4, 5)
        report = None
    try:
        bundle = open_bundle(path)
        rows = bundle.rows(np.arange(bundle.vocab_size))
        bundle.token_counts()
        bundle.config()
    except TolError as error:
        assert error.message.isprintable() and len(error.message) < 500, error.message
        return report is not None
    if report is not None and rows.shape == want.shape:
        assert np.isfinite(rows).all()
    return report is not None


def _restore(path: Path, original: dict[str, bytes]) -> None:
    for name in tree_bytes(path).keys() - original.keys():
        (path / name).unlink()
    for name, data in original.items():
        (path / name).write_bytes(data)
