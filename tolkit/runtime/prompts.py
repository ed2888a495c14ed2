"""Prompts from a file: a JSONL record each, or a line each."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

from tolkit.errors import DataError
from tolkit_formats import files

__all__ = ["parse_prompts", "read_prompts"]

_RECORDS = {".jsonl", ".ndjson"}
_LIMIT_BYTES = 1 << 30


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 file: field "prompt" of each record where its name ends in .jsonl or
    .ndjson, otherwise its lines without their ends. Blank lines are skipped.

    Raises:
        DataError: missing, not UTF-8, a record without that field, or no prompt at all.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    data = files.read_bytes(path, limit_bytes=_LIMIT_BYTES)
    return parse_prompts(data, str(path), records=path.suffix.lower() in _RECORDS)


def parse_prompts(data: bytes, where: str, *, records: bool) -> list[str]:
    """The same from bytes at hand; `where` names them in errors."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text ({error.reason}, byte {data[error.start]:#04x})",
            hint=f"convert it: iconv -f ISO-8859-1 -t UTF-8 {where}",
        ) from error
    lines = [line.rstrip("\r\n") for line in io.StringIO(text, newline="\n")]
    prompts = _recorded(lines, where) if records else [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{where}: holds no prompt")
    return prompts


def _recorded(lines: Iterable[str], where: str) -> list[str]:
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}:{number}: not a JSON object ({error})") from error
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str):
            raise DataError(f'{where}:{number}: expected an object with a string field "prompt"')
        prompts.append(prompt)
    return prompts
