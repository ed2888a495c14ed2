"""JSON that believes nothing, and one canonical way to write it.

`json.loads` takes duplicate keys (last wins), NaN, 1e999 and nesting until the stack ends; here
they are errors. `canonical` is the byte form whose SHA-256 identifies a bundle: keys sorted,
one-space indentation, ASCII escapes, a final line feed.
"""

from __future__ import annotations

import json
import math
from typing import Any

from tolkit_formats.errors import BundleError
from tolkit_formats.limits import MAX_INTEGER, MAX_JSON_DEPTH

__all__ = ["canonical", "parse"]


def parse(data: bytes, where: str, *, max_depth: int = MAX_JSON_DEPTH) -> Any:
    """Parse one UTF-8 JSON document.

    Args:
        data: the bytes.
        where: file or field named in errors.
        max_depth: nesting allowed.

    Raises:
        BundleError: not UTF-8, byte order mark, NUL, duplicate key, NaN or infinity, an integer of
            2**53 or more, nesting deeper than `max_depth`, anything after the document.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise BundleError(f"{where}: duplicate key {key[:60]!r}")
                seen.add(key)
        return result

    def integer(text: str) -> int:
        if len(text) > 17 or abs(int(text)) > MAX_INTEGER:
            raise BundleError(f"{where}: integer {text[:24]} is out of range, limit 2^53 - 1")
        return int(text)

    def real(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise BundleError(f"{where}: number {text[:24]} is not finite")
        return value

    def constant(text: str) -> Any:
        raise BundleError(f"{where}: {text} is not JSON")

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=real,
            parse_constant=constant,
        )
    except UnicodeDecodeError as error:
        raise BundleError(f"{where}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise BundleError(f"{where}: not JSON at byte {error.pos}: {error.msg}") from error
    except RecursionError as error:
        raise BundleError(f"{where}: nested deeper than {max_depth}") from error
    if isinstance(value, (dict, list)):
        _check_depth(value, where, max_depth)
    return value


def _check_depth(value: Any, where: str, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise BundleError(f"{where}: nested deeper than {max_depth}")


def canonical(value: Any) -> bytes:
    """The canonical bytes of a JSON value; ValueError for NaN or infinity."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"
