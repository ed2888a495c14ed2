"""WikiText (Merity et al. 2016), a page at a time, its token spacing undone before scoring.

Words and bytes are those of the page as it is in the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tolkit.errors import DataError
from tolkit.evaluate.tasks.base import Page, TaskItem
from tolkit.evaluate.tasks.records import read_records, utf8_text

__all__ = ["WIKITEXT", "pages_of", "undo_spacing"]

_WORD_BREAK = re.compile(r"\s+")
_SPLITS = ("test", "validation", "valid", "dev", "val")

# The harness' pattern for "/' 5/" has no group and writes its own text; equal numbers need it.
_QUIRK = re.compile(r"/' [0-9]/"), "/'[0-9]/"
# Applied in this order: some only make sense after others.
_BEFORE: tuple[tuple[str, str], ...] = (
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_ENCLOSED = tuple(
    (re.compile(rf"{left}\s*([^{right}]*?)\s*{right}"), rf"{plain_left}\1{plain_right}")
    for left, right, plain_left, plain_right in (
        (r"\(", r"\)", "(", ")"),
        (r"\[", r"\]", "[", "]"),
        (r"\{", "}", "{", "}"),
        ('"', '"', '"', '"'),
        ("'", "'", "'", "'"),
    )
)
_AFTER: tuple[tuple[str, str], ...] = (
    *(("= " * count + "=", "=" * (count + 1)) for count in (3, 2, 1)),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def undo_spacing(page: str) -> str:
    """The page as running text: punctuation, brackets, quotes and headings without their spaces."""
    page = _QUIRK[0].sub(_QUIRK[1], page.replace("s '", "s'"))
    for found, put in _BEFORE:
        page = page.replace(found, put)
    for pattern, put in _ENCLOSED:
        page = pattern.sub(put, page)
    for found, put in _AFTER:
        page = page.replace(found, put)
    return page


def pages_of(text: str) -> list[str]:
    """A text in the form of the WikiText files, cut before its top-level headings.

    A heading is a line `` = Title = ``; those of sections have more signs. Text without such
    headings is cut at lines that hold one form feed. Blank pages are left out.
    """
    lines = text.split("\n")
    at_heading = any(_is_title(line) for line in lines)
    pages: list[list[str]] = [[]]
    for line in lines:
        if at_heading and _is_title(line):
            pages.append([line])
        elif not at_heading and line.rstrip("\r") == "\f":
            pages.append([])
        else:
            pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


def _is_title(line: str) -> bool:
    bare = line.replace("= = =", "===").replace("= =", "==").strip()
    return bare.startswith("= ") and bare.endswith(" =")


def _page(where: str, text: str) -> Page:
    return Page(where, undo_spacing(text), len(_WORD_BREAK.split(text)), len(text.encode()))


@dataclass(frozen=True)
class _WikiText:
    name: str = "wikitext"
    version: str = "2.0"
    metrics: tuple[str, ...] = ("ppl_word", "ppl_byte", "bits_per_byte")
    file_names: tuple[str, ...] = tuple(
        form.format(split)
        for split in _SPLITS
        for form in ("{}.jsonl", "{}.txt", "wiki.{}.raw", "wiki.{}.tokens")
    )

    def items(self, path: Path, limit: int | None) -> list[TaskItem]:
        """Pages of a JSONL file (field "page") or of a text file, see `pages_of`."""
        if path.suffix == ".jsonl":
            records = read_records(path, limit)
            found = [(record.where, record.text("page")) for record in records]
            return [_page(where, text) for where, text in found]
        pages = pages_of(utf8_text(path))
        if not pages:
            raise DataError(f"{path}: empty text, expected pages")
        return [_page(f"{path}#{i}", text) for i, text in islice(enumerate(pages, 1), limit)]


WIKITEXT = _WikiText()
