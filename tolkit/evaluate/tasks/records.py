"""JSONL records that say where they are wrong: FILE:LINE, the field, what was expected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from tolkit.errors import BundleError, DataError
from tolkit_formats import strict_json

__all__ = ["Record", "read_records", "utf8_text"]

_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One JSON object with the file and line it came from."""

    where: str
    fields: Mapping[str, Any]

    def has(self, *names: str) -> bool:
        """Whether all these fields are there."""
        return all(name in self.fields for name in names)

    def get(self, name: str) -> Any:
        """The value of a field of any type; DataError when it is missing."""
        if name not in self.fields:
            raise DataError(f"{self.where}: field {name!r} is missing")
        return self.fields[name]

    def wrong(self, name: str, expected: str, got: object) -> NoReturn:
        """Raise a DataError about one field."""
        raise DataError(f"{self.where}: field {name!r}: expected {expected}, got {_short(got)}")

    def text(self, name: str) -> str:
        """A string field."""
        value = self.get(name)
        if not isinstance(value, str):
            self.wrong(name, "a string", value)
        return self._unicode(name, value)

    def texts(self, name: str, at_least: int) -> list[str]:
        """A field that is a list of strings."""
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            self.wrong(name, "a list of strings", value)
        if len(value) < at_least:
            self.wrong(name, f"at least {at_least} strings", value)
        return [self._unicode(name, entry) for entry in value]

    def label(self, name: str, first: int, count: int) -> int:
        """Index of a label that counts from `first`, as a number or in digits."""
        value = self.get(name)
        number = value
        if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
            number = int(value)
        expected = f"a label from {first} to {first + count - 1}"
        if isinstance(number, bool) or not isinstance(number, int):
            self.wrong(name, expected, value)
        if not first <= number < first + count:
            self.wrong(name, expected, value)
        return number - first

    def part(self, name: str) -> Record:
        """A field that is an object, as a record of its own."""
        value = self.get(name)
        if not isinstance(value, dict):
            self.wrong(name, "an object", value)
        return Record(f"{self.where}: in {name!r}", value)

    def _unicode(self, name: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            self.wrong(name, "Unicode text", "a lone surrogate")
        return text


def read_records(path: Path, limit: int | None, labels_field: str | None = None) -> list[Record]:
    """Records of a JSONL file, the first `limit` where given; blank lines are skipped.

    Args:
        path: UTF-8, one object a line.
        limit: at least 1.
        labels_field: taken from ``<name>-labels.lst`` beside the file (one label a line, in the
            order of the records) for records that do not have it.

    Raises:
        DataError: no such file, no records, not UTF-8, not a JSON object (duplicate keys and
            numbers without a value count as such), or another number of labels than of records.
    """
    records = list(islice(_parsed(path), limit))
    if not records:
        raise DataError(f"{path}: no records, expected one JSON object a line")
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    if labels_field is None or not labels_path.is_file():
        return records
    labels = [text.strip() for _, _, text in _lines(labels_path) if text.strip()]
    count = sum(1 for _, _, text in _lines(path) if text.strip())
    if len(labels) != count:
        raise DataError(
            f"{labels_path}: expected {count} labels, one for each record of {path.name}, "
            f"got {len(labels)}"
        )
    return [
        Record(record.where, {labels_field: label, **record.fields})
        for record, label in zip(records, labels, strict=False)
    ]


def utf8_text(path: Path) -> str:
    """A whole file as text, a leading byte order mark excepted; DataError as `read_records`."""
    return "".join(text for _, _, text in _lines(path))


def _parsed(path: Path) -> Iterator[Record]:
    for where, data, text in _lines(path):
        if not text.strip():
            continue
        try:
            value = strict_json.parse(data, where)
        except BundleError as error:
            raise DataError(error.message) from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected a JSON object, got {_short(value)}")
        yield Record(where, value)


def _lines(path: Path) -> Iterator[tuple[str, bytes, str]]:
    """FILE:LINE, the bytes and the text of each line, line ends kept."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                data = raw.removeprefix(_MARK) if number == 1 else raw
                try:
                    yield f"{path}:{number}", data, data.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: not UTF-8 text (byte {data[error.start]:#04x})",
                        hint=f"convert it: iconv -f ISO-8859-1 -t UTF-8 {path}",
                    ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _short(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
