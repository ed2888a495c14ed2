"""Documents from whatever the user names: files, patterns, folders, JSONL, zstd of these.

A document is a whole file, one JSONL record, or a part of a text file between lines that hold
one form feed. Text is UTF-8, kept as it is (a leading byte order mark excepted).
"""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard

from tolkit.data.stdlib_corpus import stdlib_documents
from tolkit.errors import DataError

__all__ = ["Document", "Source", "expand_sources", "read_documents"]

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".py", ".jsonl", ".ndjson"})
RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_PATTERN_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class Document:
    """One text that is scored and separated on its own.

    name: the file, with ``:LINE`` for a JSONL record and ``#PART`` for a form-feed part.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """One file (or the built-in corpus) a specification stands for."""

    name: str
    documents: Callable[[], Iterator[Document]]


def read_documents(specs: Sequence[str]) -> Iterator[Document]:
    """All documents of `specs`, in the order given, sorted inside patterns and folders.

    Each of `specs` is a file, a glob pattern, a folder (read to all depths; files named
    .txt .text .md .rst .py .jsonl .ndjson, each also with .zst), or ``stdlib``,
    ``stdlib:train``, ``stdlib:valid``: the sources and manual of the running Python.

    Raises:
        DataError: nothing matches, a text is empty, bytes are not UTF-8, a JSONL line has no
            string field "text", a zstd frame is damaged; the message names file and line.
    """
    for source in expand_sources(specs):
        yield from source.documents()


def expand_sources(specs: Sequence[str]) -> list[Source]:
    """The files behind `specs`, without reading them."""
    if not specs:
        raise DataError("text: no source given", hint="name a file, a folder or stdlib")
    sources: list[Source] = []
    for spec in specs:
        if spec == "stdlib" or spec.startswith("stdlib:"):
            sources.append(_stdlib_source(spec))
        else:
            sources.extend(_file_source(path) for path in _matching_files(spec))
    return sources


def _stdlib_source(spec: str) -> Source:
    _, _, part = spec.partition(":")
    if part not in ("", "train", "valid"):
        raise DataError(f"{spec}: unknown part, expected stdlib, stdlib:train or stdlib:valid")

    def documents() -> Iterator[Document]:
        return (Document(name, text) for name, text in stdlib_documents(part or "all"))

    return Source(spec, documents)


def _file_source(path: Path) -> Source:
    return Source(str(path), lambda: _file_documents(path))


def _matching_files(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if _is_corpus_file(p, path))
        if not found:
            raise DataError(
                f"{spec}: no text file in this folder, expected names ending in "
                + " ".join(sorted(TEXT_SUFFIXES))
                + " (or these with .zst)"
            )
        return found
    if path.exists():
        return [path]
    if _PATTERN_CHARACTERS & set(spec):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if found:
            return found
        raise DataError(f"{spec}: no file matches this pattern")
    raise DataError(f"{spec}: no such file or folder")


def _is_corpus_file(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and _content_suffix(path) in TEXT_SUFFIXES and path.is_file()


def _content_suffix(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix == ".zst" else path
    return inner.suffix.lower()


def _file_documents(path: Path) -> Iterator[Document]:
    records = _content_suffix(path) in RECORD_SUFFIXES
    empty = True
    with _open_text(path) as lines:
        found = _record_documents(path, lines) if records else _part_documents(path, lines)
        for document in found:
            empty = False
            yield document
    if empty:
        raise DataError(f"{path}: empty text")


@contextmanager
def _open_text(path: Path) -> Iterator[Iterable[str]]:
    """Lines of a UTF-8 file with their ends kept; damage becomes a DataError naming `path`."""
    try:
        with path.open("rb") as raw:
            stream: IO[bytes] = raw
            if path.suffix == ".zst":
                reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                stream = io.BufferedReader(reader)
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="strict", newline="\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason}, byte {error.object[error.start]:#04x})",
            hint=f"convert it: iconv -f ISO-8859-1 -t UTF-8 {path}",
        ) from error
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged zstd data ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _part_documents(path: Path, lines: Iterable[str]) -> Iterator[Document]:
    """Parts between form-feed lines; blank parts are no documents. One part: the bare name."""
    parts = _form_feed_parts(lines)
    first = next(parts, None)
    if first is None:
        return
    second = next(parts, None)
    if second is None:
        yield Document(str(path), first)
        return
    yield Document(f"{path}#1", first)
    yield Document(f"{path}#2", second)
    for number, part in enumerate(parts, start=3):
        yield Document(f"{path}#{number}", part)


def _form_feed_parts(lines: Iterable[str]) -> Iterator[str]:
    part: list[str] = []
    for line in lines:
        if line.rstrip("\r\n") == "\f":
            text = "".join(part)
            part = []
            if text.strip():
                yield text
        else:
            part.append(line)
    text = "".join(part)
    if text.strip():
        yield text


def _record_documents(path: Path, lines: Iterable[str]) -> Iterator[Document]:
    """One document a JSONL record; blank lines and records of blank text are skipped."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not a JSON object ({error})") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{where}: expected an object with a string field "text"')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: text holds a lone surrogate, not Unicode") from error
        if text.strip():
            yield Document(where, text)
