"""Typed access to a parsed JSON object: every wrong type or range is one named error."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from tolkit_formats.errors import BundleError

__all__ = ["Fields"]

_HEX = re.compile(r"[0-9a-f]{64}\Z")


class Fields:
    """A JSON object being taken apart.

    Args:
        value: the parsed value, checked to be an object.
        where: file and path within it, for messages (``B.tol/tol.json: tiers[0]``).
        allow_unknown: accept keys nobody asked for (manifests of a newer minor version).
    """

    def __init__(self, value: Any, where: str, *, allow_unknown: bool = False) -> None:
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object, got {_kind(value)}")
        self.value: dict[str, Any] = value
        self.where = where
        self.allow_unknown = allow_unknown
        self._seen: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the key is there."""
        return name in self.value

    def get(self, name: str) -> Any:
        """The raw value of a required key."""
        self._seen.add(name)
        if name not in self.value:
            raise BundleError(f"{self.where}: {name} is missing")
        return self.value[name]

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer (booleans are not) within low..high."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise BundleError(f"{self.where}: {name} must be an integer, got {_kind(value)}")
        if not low <= value <= high:
            raise BundleError(f"{self.where}: {name} is {value}, expected {low} to {high}")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BundleError(f"{self.where}: {name} must be a number, got {_kind(value)}")
        return value

    def text(self, name: str, choices: Collection[str] | None = None) -> str:
        """A string, one of `choices` where given."""
        value = self.get(name)
        if not isinstance(value, str):
            raise BundleError(f"{self.where}: {name} must be a string, got {_kind(value)}")
        if choices is not None and value not in choices:
            raise BundleError(
                f"{self.where}: {name} is {value[:40]!r}, expected {' or '.join(choices)}"
            )
        return value

    def hexdigest(self, name: str) -> str:
        """A lower-case SHA-256 in hex."""
        value = self.text(name)
        if not _HEX.match(value):
            raise BundleError(f"{self.where}: {name} must be 64 lower-case hex digits")
        return value

    def boolean(self, name: str) -> bool:
        """true or false."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise BundleError(f"{self.where}: {name} must be true or false, got {_kind(value)}")
        return value

    def array(self, name: str, *, longest: int) -> list[Any]:
        """A list of at most `longest` entries."""
        value = self.get(name)
        if not isinstance(value, list):
            raise BundleError(f"{self.where}: {name} must be a list, got {_kind(value)}")
        if len(value) > longest:
            raise BundleError(f"{self.where}: {name} has {len(value)} entries, limit {longest}")
        return value

    def object(self, name: str) -> Fields:
        """A nested object."""
        return Fields(self.get(name), f"{self.where}: {name}", allow_unknown=self.allow_unknown)

    def objects(self, name: str, *, longest: int) -> list[Fields]:
        """A list of nested objects."""
        return [
            Fields(item, f"{self.where}: {name}[{i}]", allow_unknown=self.allow_unknown)
            for i, item in enumerate(self.array(name, longest=longest))
        ]

    def done(self) -> None:
        """Every key must have been asked for, unless unknown ones are allowed."""
        unknown = sorted(set(self.value) - self._seen)
        if unknown and not self.allow_unknown:
            raise BundleError(f"{self.where}: unknown field {unknown[0][:60]!r}")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}.get(
        type(value), "a list" if isinstance(value, list) else "an object"
    )
