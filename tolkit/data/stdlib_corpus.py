"""The built-in corpus: sources and manual of the running Python's standard library.

Every Python carries it, so a first run needs no download. About 9 MB of text: the .py files
outside tests, and the manual's topics (`pydoc_data`). Left out: character tables (`encodings`,
long runs of near-equal lines) and files that name the building machine. One document in 24, by the
digest of its name, is held out for validation; the split is the same on every machine.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tolkit.errors import DataError

__all__ = ["stdlib_documents"]

VALID_ONE_IN = 24
_LEFT_OUT_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
_MACHINE_FILES = re.compile(r"^(_sysconfigdata.*|python-config)\.py$")
_FORM_FEED_LINE = re.compile(r"^\f\r?\n", re.MULTILINE)


def stdlib_documents(part: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the corpus, sorted by name; `part` is "all", "train" or "valid".

    Raises:
        DataError: this Python has no library sources (zipped or byte-compiled only).
    """
    names: dict[str, Path | str] = {**_source_files(), **_manual_topics()}
    if not names:
        raise DataError(
            "stdlib: this Python carries no library sources",
            hint="name text files instead of stdlib",
        )
    for name in sorted(names):
        if part != "all" and is_held_out(name) != (part == "valid"):
            continue
        origin = names[name]
        text = _source_text(origin) if isinstance(origin, Path) else origin
        if text.strip():
            yield name, text


def is_held_out(name: str) -> bool:
    """Whether the document belongs to the validation part."""
    return hashlib.sha256(name.encode()).digest()[0] % VALID_ONE_IN == 0


def _source_files() -> dict[str, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        folders = inside.parts[:-1]
        if _LEFT_OUT_FOLDERS & set(folders) or any(p.startswith("config-") for p in folders):
            continue
        if not _MACHINE_FILES.match(path.name):
            found["stdlib/" + inside.as_posix()] = path
    return found


def _manual_topics() -> dict[str, str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return {}
    return {f"stdlib/manual/{topic}.txt": text for topic, text in topics.items()}


def _source_text(path: Path) -> str:
    """The file as UTF-8 without page breaks; one in another encoding counts as absent."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError):
        return ""
    return _FORM_FEED_LINE.sub("", text)
