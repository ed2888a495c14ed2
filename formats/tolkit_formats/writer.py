"""Writing a bundle as a stream: rows in blocks, shards that survive a crash, one atomic publish.

The work folder ``NAME.tol.partial`` holds ``bundle/`` (what will be published), ``work.json``
(fingerprint of inputs and options, finished shards with their digests, notes of the caller) and
scratch files of the caller. The same command finds its fingerprint there and continues; finished
shards are hashed again before they are believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace as with_fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit_formats import files, strict_json
from tolkit_formats.digests import block_digests, file_digest, json_digest
from tolkit_formats.errors import (
    BundleError,
    InputError,
    NonFiniteError,
    OutputExistsError,
    TolError,
)
from tolkit_formats.limits import MAX_MANIFEST_BYTES
from tolkit_formats.manifest import FileEntry, Manifest, needs_of
from tolkit_formats.manifest_rules import parse_manifest
from tolkit_formats.rans import RowCoder
from tolkit_formats.records import Tier
from tolkit_formats.shard_writers import CodedShardWriter, ShardWriter
from tolkit_formats.tensorfile import write_tensors

__all__ = [
    "BundleWriter",
    "CodedShardWriter",
    "ShardWriter",
    "block_digests",
    "require_absent",
    "work_folder",
]

_WORK_VERSION = 3
_STATE_BYTES = 16 * MAX_MANIFEST_BYTES  # notes of every shard
_LOCK = "lock"
_STATE = "work.json"


def work_folder(destination: Path) -> Path:
    """Where the unfinished bundle for `destination` lives."""
    return destination.with_name(destination.name + ".partial")


class BundleWriter:
    """Builds one bundle in its work folder. A context manager; `publish` ends it.

    Leaving with an error keeps finished shards for the next run of the same command and removes
    everything half-written; when nothing was finished, or the error is one of the numbers
    themselves, the work folder goes too.

    Args:
        destination: the NAME.tol folder to publish.
        fingerprint: digest of inputs and options; a work folder with another one is discarded.
        force: replace an existing destination when publishing.
        restart: discard a work folder even if it fits.

    Raises:
        OutputExistsError: destination exists and not `force`.
        ResourceError: another process is writing the same destination.
    """

    def __init__(
        self, destination: Path, *, fingerprint: str, force: bool = False, restart: bool = False
    ) -> None:
        self.destination = Path(destination)
        self.force = force
        require_absent(self.destination, force=force)
        self.work = work_folder(self.destination)
        self.folder = self.work / "bundle"
        files.claim_dir(self.work, _LOCK)
        with ExitStack() as cleanup:
            cleanup.enter_context(files.lock(self.work / _LOCK))
            self._fingerprint = fingerprint
            self._state = self._resume(fingerprint, restart)
            self.resumed = bool(self._state["shards"] or self._state["notes"])
            files.make_dir(self.folder / "tables")
            self._cleanup = cleanup.pop_all()

    # State that survives a crash.

    def note(self, key: str) -> Any:
        """What the caller remembered under `key` before a crash, or None."""
        return self._state["notes"].get(key)

    def remember(self, key: str, value: Any) -> None:
        """Keep a JSON value across a crash (durable when this returns)."""
        self._state["notes"][key] = value
        self._save()

    def _save(self) -> None:
        state = {**self._state, "digest": json_digest(self._state)}
        files.write_atomic(self.work / _STATE, strict_json.canonical(state))

    def _resume(self, fingerprint: str, restart: bool) -> dict[str, Any]:
        try:
            data = files.read_bytes(self.work / _STATE, limit_bytes=_STATE_BYTES)
            state = strict_json.parse(data, f"{self.work}/{_STATE}")
        except (InputError, BundleError):
            state = None
        if restart or not _fits(state, fingerprint):
            self._discard()
            return _fresh_state(fingerprint)
        assert isinstance(state, dict)
        for path in sorted(self.work.rglob("*.tmp")):
            files.unlink(path)
        # Only finished shards are taken over; the rest is quickly written again, and what does
        # not belong must not get into the file list.
        for entry in _entries(self.folder):
            if entry.name != "tables" or entry.is_symlink() or not entry.is_dir():
                _remove(entry)
        for entry in _entries(self.folder / "tables"):
            if entry.name not in state["shards"]:
                _remove(entry)
        return state

    def start_over(self) -> None:
        """Forget finished shards and notes: what they rested on turned out damaged."""
        self._discard()
        self._state = _fresh_state(self._fingerprint)
        self.resumed = False
        files.make_dir(self.folder / "tables")

    def _discard(self) -> None:
        """Empty the work folder but for the lock, which marks it as ours until the end."""
        for entry in _entries(self.work):
            if entry.name != _LOCK:
                _remove(entry)

    # Files.

    def put_file(self, name: str, data: bytes) -> None:
        """Write a root file (config.json, README.md...)."""
        files.write_atomic(self.folder / name, data)

    def put_tensors(
        self, name: str, tensors: Mapping[str, tuple[str, npt.NDArray[np.generic]]]
    ) -> None:
        """Write a safetensors file: name -> (dtype, array)."""
        write_tensors(self.folder / name, tensors)

    def path(self, name: str) -> Path:
        """Where a file of the bundle is being prepared, for callers that stream it themselves."""
        return self.folder / name

    # Shards.

    def shard_done(self, tier: Tier, shard: int) -> bool:
        """Whether a shard was finished by an earlier run and still has its digest."""
        name = tier.shard_name(shard)
        known = self._state["shards"].get(name)
        path = self.folder / "tables" / name
        if not known or not path.is_file() or path.stat().st_size != known["bytes"]:
            return False
        return file_digest(path) == str(known["sha256"])

    def shard_note(self, tier: Tier, shard: int) -> Any:
        """What `ShardWriter.remember` was given for a finished shard, or None."""
        return self._state["shards"][tier.shard_name(shard)]["note"]

    def open_shard(
        self, tier: Tier, shard: int, coder: RowCoder | None = None
    ) -> ShardWriter | CodedShardWriter:
        """Start shard `shard` of `tier`; write its rows in order, then close.

        Args:
            coder: of a tier of coded records.
        """
        name = tier.shard_name(shard)
        path = self.folder / "tables" / name

        def finished(note: Any) -> None:
            known = {"bytes": path.stat().st_size, "sha256": file_digest(path), "note": note}
            self._state["shards"][name] = known
            self._save()

        if not tier.coded:
            return ShardWriter(path, tier, shard, finished)
        assert coder is not None and coder.num_positions == tier.stride
        return CodedShardWriter(path, tier, shard, coder, finished)

    def shard_bytes(self) -> dict[str, int]:
        """File name -> bytes of the shards finished so far."""
        return {name: known["bytes"] for name, known in self._state["shards"].items()}

    def forget_shards(self, note: str) -> None:
        """Remove finished shards and a note on them: they will have other parameters."""
        names = list(self._state["shards"])
        self._state["shards"] = {}
        self._state["notes"].pop(note, None)
        self._save()
        for name in names:
            files.unlink(self.folder / "tables" / name)

    # The end.

    def publish(self, manifest: Manifest) -> Manifest:
        """Complete `manifest` with the file list, write it last, and give the folder its name.

        Returns:
            the manifest as published, identity set.
        """
        tables = self.folder / "tables"
        checksums = {
            path.name: ("U8", block_digests(path))
            for path in sorted(tables.iterdir())
            if path.name != "checksums.safetensors"
        }
        write_tensors(tables / "checksums.safetensors", checksums)
        entries = {}
        for path in sorted([*self.folder.iterdir(), *tables.iterdir()]):
            if path.is_file():
                name = str(path.relative_to(self.folder))
                entries[name] = FileEntry(path.stat().st_size, self._digest_of(path))
        entries.pop("tol.json", None)
        manifest = with_fields(manifest, files=entries)
        version, features = needs_of(manifest)
        manifest = with_fields(manifest, version=version, required_features=features)
        data, identity = manifest.to_bytes()
        parse_manifest(data, f"{self.destination}/tol.json")  # nothing unreadable is published
        files.fsync_dir(tables)
        files.write_atomic(self.folder / "tol.json", data)
        files.publish_dir(self.folder, self.destination, force=self.force)
        self._end()
        return with_fields(manifest, identity=identity)

    def _digest_of(self, path: Path) -> str:
        known = self._state["shards"].get(path.name)
        return known["sha256"] if known else file_digest(path)

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with self._cleanup:
            if kind is None or not self.work.exists():
                return
            try:
                # The same command would meet the same number again.
                self._tidy(hopeless=issubclass(kind, NonFiniteError))
            except (OSError, TolError):
                return  # the error that brought us here is the one to report

    def _tidy(self, *, hopeless: bool) -> None:
        if hopeless or not (self._state["shards"] or self._state["notes"]):
            self._end()
            return
        for path in sorted(self.work.rglob("*.tmp")):
            files.unlink(path)

    def _end(self) -> None:
        """Remove the work folder, the lock last and still held."""
        self._discard()
        files.remove_tree(self.work)
        self._cleanup.close()


def _fresh_state(fingerprint: str) -> dict[str, Any]:
    return {"version": _WORK_VERSION, "fingerprint": fingerprint, "shards": {}, "notes": {}}


def _fits(state: object, fingerprint: str) -> bool:
    """Whether parsed work.json is what was written, for the same inputs and options.

    Takes its digest out.
    """
    if not isinstance(state, dict):
        return False
    digest = state.pop("digest", None)
    same = (state.get("version"), state.get("fingerprint")) == (_WORK_VERSION, fingerprint)
    return same and digest == json_digest(state)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        files.remove_tree(entry)
    else:
        files.unlink(entry)


def require_absent(destination: Path, *, force: bool) -> None:
    """OutputExistsError when `destination` is there and must not be replaced."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise OutputExistsError(f"{destination}: exists and is not a bundle folder")
    if destination.exists():
        if not force:
            raise OutputExistsError(
                f"{destination}: already exists", hint="choose another name, or add --force"
            )
        if not (destination / "tol.json").is_file() and any(destination.iterdir()):
            raise OutputExistsError(f"{destination}: is a folder but not a bundle, left alone")
        aside = files.aside_of(destination)
        if aside.exists() and not (aside / "tol.json").is_file():
            raise OutputExistsError(
                f"{aside}: is in the way of replacing {destination.name}, left alone",
                hint="move it away, or choose another output",
            )
    if not destination.parent.is_dir():
        raise InputError(f"{destination.parent}: no such folder")
