"""How a bundle came to be, and what each step cost in quality. Needs no torch.

A manifest lists the commands that led to a bundle with the identity each started from; the
evaluation records of these ancestors lie beside them. Joined, they are the quality along the
lineage. Records on different texts or windows are never put into one column.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tolkit.errors import InputError, UsageError
from tolkit.quality_log import QUALITY_FILE, QualityRecord, Setting, parse_record, quality_lines
from tolkit_formats import files, open_bundle
from tolkit_formats.limits import MAX_MANIFEST_BYTES
from tolkit_formats.manifest import Manifest
from tolkit_formats.manifest_rules import parse_manifest

__all__ = ["Lineage", "Step", "history_of", "options_text"]

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Step:
    """One command of the lineage and the bundle it wrote.

    identity: of that bundle; None when the manifest names none.
    path: where that bundle was found; None when it is not here.
    table_bytes, bits_per_value: of its tables, from its manifest or else from a record.
    record: its last evaluation under the lineage's setting; None without one.
    """

    command: str
    options: Mapping[str, Any]
    identity: str | None
    path: Path | None
    table_bytes: int | None
    bits_per_value: float | None
    record: QualityRecord | None


@dataclass(frozen=True)
class Lineage:
    """The steps to a bundle, oldest first.

    setting: text, windows and reference of all records shown; None when there is no record.
    notes: records that were left out, and why; folders that could not be read.
    """

    steps: tuple[Step, ...]
    setting: Setting | None
    notes: tuple[str, ...]


def history_of(
    bundle: str | Path, search: Sequence[str | Path] = (), text: str | None = None
) -> Lineage:
    """The lineage of a bundle with the records of its ancestors.

    Reads the manifests and quality.jsonl of the bundle, of the bundles in its folder and of those
    in the `search` folders. Nothing is written.

    Args:
        bundle: a NAME.tol folder.
        text: the beginning of the text digest whose records are wanted; by default that of the
            text on which most steps were measured, the newest of several.

    Raises:
        InputError and its kin: the bundle cannot be read, or a search folder is missing.
        UsageError: no record is of a text with that digest.
    """
    bundle = Path(bundle)
    own = open_bundle(bundle, check_crc=False).manifest
    notes: list[str] = []
    found = _bundles(bundle, [Path(folder) for folder in search], notes)
    found[own.identity] = (bundle, own)
    steps = [_step(own, i, found) for i in range(max(1, len(own.history)))]
    identities = {step.identity for step in steps}
    folders = [found[step.identity][0] for step in steps if step.identity in found]
    others = [path for path, _ in found.values() if path not in folders]
    records = [r for r in _records([*others, *folders], notes) if r.bundle in identities]
    setting = _choose(records, text, notes)
    return Lineage(
        tuple(_with_record(step, records, setting) for step in steps), setting, tuple(notes)
    )


def options_text(options: Mapping[str, Any]) -> str:
    """What was decided, without what is the default: ``rank 50%, codec nf4, no feedback``.

    Digests are cut short, and groups of numbers left to the manifest.
    """
    parts = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            continue
        if isinstance(value, str) and _DIGEST.fullmatch(value):
            parts.append(f"{name} {value[:12]}")
            continue
        if value is False:
            parts.append(f"no {name}")
        elif value is not None and value is not True and value != [] and value != "counts":
            shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            parts.append(f"{name} {shown}")
    return ", ".join(parts)


def _step(own: Manifest, index: int, found: Mapping[str, tuple[Path, Manifest]]) -> Step:
    history = own.history
    last = index + 1 >= len(history)
    identity = own.identity if last else history[index + 1].parent
    path, manifest = found.get(identity or "", (None, None))
    return Step(
        command=history[index].command if history else "unknown",
        options=history[index].options if history else {},
        identity=identity,
        path=path,
        table_bytes=None if manifest is None else manifest.table_bytes,
        bits_per_value=None if manifest is None else manifest.bits_per_value,
        record=None,
    )


def _with_record(step: Step, records: Sequence[QualityRecord], setting: Setting | None) -> Step:
    of_step = [record for record in records if record.bundle == step.identity]
    fitting = [r for r in of_step if setting is not None and r.setting == setting]
    if not fitting and setting is not None:  # measured without the reference: perplexity at least
        bare = replace(setting, reference=None)
        fitting = [record for record in of_step if record.setting == bare]
    sizes = of_step[-1:] if step.table_bytes is None else []
    return replace(
        step,
        record=fitting[-1] if fitting else None,
        table_bytes=sizes[0].table_bytes if sizes else step.table_bytes,
        bits_per_value=sizes[0].bits_per_value if sizes else step.bits_per_value,
    )


def _bundles(
    bundle: Path, search: Sequence[Path], notes: list[str]
) -> dict[str, tuple[Path, Manifest]]:
    """Identity -> bundle, for those beside `bundle` and in the search folders."""
    found: dict[str, tuple[Path, Manifest]] = {}
    beside = bundle.parent if bundle.name not in ("", "..") else bundle.resolve().parent
    for folder in [*search, beside]:
        if not folder.is_dir():
            raise InputError(f"search: {folder}: no such folder")
        for path in [folder, *files.list_dir(folder)]:
            if path.suffix == ".partial" or not (path / "tol.json").is_file():
                continue
            where = path / "tol.json"
            try:
                data = files.read_bytes(where, limit_bytes=MAX_MANIFEST_BYTES)
                manifest = parse_manifest(data, str(where))
            except InputError as error:
                notes.append(f"left out: {error.message}")
            else:
                found[manifest.identity] = (path, manifest)
    return found


def _records(folders: Iterable[Path], notes: list[str]) -> list[QualityRecord]:
    """The sound records of these bundles, in their order; what cannot be read becomes a note."""
    records: list[QualityRecord] = []
    for folder in folders:
        path = folder / QUALITY_FILE
        if not path.is_file():
            continue
        try:
            lines = quality_lines(path)
        except InputError as error:
            notes.append(f"left out: {error.message}")
            continue
        for number, line in lines:
            try:
                record = parse_record(line, f"{path}:{number}")
            except InputError as error:
                notes.append(f"left out: {error.message}")
                continue
            if record is None:
                notes.append(f"left out: {path}:{number}: not JSON, an unfinished line")
            elif record.problems:
                notes.append(f"left out: {path}:{number}: {record.problems[0]}")
            else:
                records.append(record)
    return records


def _choose(records: Sequence[QualityRecord], text: str | None, notes: list[str]) -> Setting | None:
    """The text and windows most steps were measured on, then their most frequent reference."""
    if text is not None and not any(r.setting.text_digest.startswith(text) for r in records):
        known = sorted({record.setting.text_digest[:12] for record in records})
        raise UsageError(
            f"text: no record is of a text with digest {text}..",
            hint=f"there are records of {', '.join(known)}" if known else "run tol eval first",
        )
    wanted = [r for r in records if r.setting.text_digest.startswith(text or "")]
    # Records of tasks alone have no text to make a column of.
    wanted = [r for r in wanted if r.counts["tokens"]]
    if not wanted:
        return None
    texts = [replace(record.setting, reference=None) for record in wanted]
    chosen = _most_measured(texts, wanted)
    same = [r for r, key in zip(wanted, texts, strict=True) if key == chosen]
    compared = [r for r in same if r.setting.reference is not None] or same
    setting = _most_measured([r.setting for r in compared], compared)
    _note_left_out(records, setting, notes)
    return setting


def _most_measured(settings: Sequence[Setting], records: Sequence[QualityRecord]) -> Setting:
    """The setting under which most bundles were measured; of several the last one met."""
    pairs = {(setting, record.bundle) for setting, record in zip(settings, records, strict=True)}
    bundles = Counter(setting for setting, _ in pairs)
    newest = {setting: i for i, setting in enumerate(settings)}
    return max(bundles, key=lambda setting: (bundles[setting], newest[setting]))


def _note_left_out(records: Sequence[QualityRecord], chosen: Setting, notes: list[str]) -> None:
    left: Counter[str] = Counter()
    formats = set()
    for record in records:
        if record.setting in (chosen, replace(chosen, reference=None)):
            formats.add(record.dtype)
        elif record.setting.text_digest != chosen.text_digest:
            left[f"on the text {record.setting.text_digest[:12]}"] += 1
        else:
            left["with other windows, tokenizer or reference"] += 1
    notes.extend(f"left out: {count} record(s) {what}" for what, count in sorted(left.items()))
    if len(formats) > 1:
        notes.append(f"number formats differ: {', '.join(sorted(formats))}")
