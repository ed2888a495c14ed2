"""BundleWriter: atomic publish, resume that trusts nothing, and respect for what is in the way."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from _nano import RAW_F16, Nano, fault_hook, tree_bytes, write_nano

from tolkit_formats import files, open_bundle, verify
from tolkit_formats.errors import (
    BundleError,
    InputError,
    OutputExistsError,
    ResourceError,
    TolError,
)
from tolkit_formats.writer import BundleWriter, work_folder


class StoppedError(Exception):
    """An interruption of ours, which nothing below may catch."""


def write(path: Path, **options: object) -> Nano:
    """Three shards of 1,024 rows."""
    settings = {"vocab_size": 2500, "hidden_size": 5, "max_shard_bytes": 1, **options}
    return write_nano(path, [RAW_F16, RAW_F16], **settings)


def stop_at(operation: str, name: str) -> AbstractContextManager[None]:
    """Raise StoppedError at the first I/O call `operation` on a file whose path contains `name`."""

    def hook(what: str, path: str) -> None:
        if what == operation and name in path:
            raise StoppedError

    return fault_hook(hook)


def shard_writes(action: Callable[[], object]) -> set[str]:
    """Names of the shards that `action` writes."""
    seen = set()

    def hook(what: str, path: str) -> None:
        if what == "write" and "records-" in path:
            seen.add(Path(path).name.removeprefix(".").split("-of-")[0])

    with fault_hook(hook):
        action()
    return seen


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A work folder with two of three shards finished."""
    with stop_at("open", "records-0-00003"), pytest.raises(StoppedError):
        write(tmp_path / "b.tol")
    assert not (tmp_path / "b.tol").exists()
    assert work_folder(tmp_path / "b.tol").is_dir()
    return tmp_path / "b.tol"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return tree_bytes(write(tmp_path_factory.mktemp("undisturbed") / "b.tol").path)


def only_the_bundle_is_left(path: Path) -> bool:
    return [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_publishes_a_bundle_that_verifies(tmp_path: Path) -> None:
    nano = write(tmp_path / "b.tol")
    assert verify(nano.path).num_records == 2500
    assert only_the_bundle_is_left(nano.path)


def test_same_input_gives_the_same_bytes(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert tree_bytes(write(tmp_path / "b.tol").path) == undisturbed


def test_everything_is_durable_before_the_name_appears(tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []
    with fault_hook(lambda what, path: calls.append((what, path))):
        write(tmp_path / "b.tol")
    published = calls.index(("replace", str(tmp_path / "b.tol")))
    before, after = calls[:published], calls[published:]
    assert ("fsync-dir-done", str(tmp_path)) in after
    work = str(work_folder(tmp_path / "b.tol") / "bundle")
    opened = {path for what, path in before if what == "open" and path.startswith(work)}
    assert len(opened) > 10
    for path in opened:
        last_write = max(i for i, call in enumerate(before) if call == ("write-done", path))
        assert ("fsync-done", path) in before[last_write:], f"{path} is not fsynced"
    manifest = before.index(("replace-done", f"{work}/tol.json"))
    assert not [c for c in before[manifest:] if c[0] in ("open", "write", "replace")]
    for folder in (work, f"{work}/tables"):
        named = max(
            i
            for i, (what, path) in enumerate(before)
            if what in ("replace-done", "open-done") and str(Path(path).parent) == folder
        )
        assert ("fsync-dir-done", folder) in before[named:], f"{folder} is not fsynced"


def test_the_same_command_continues_where_it_stopped(
    interrupted: Path, undisturbed: dict[str, bytes]
) -> None:
    assert shard_writes(lambda: write(interrupted)) == {"records-0-00003"}
    assert tree_bytes(interrupted) == undisturbed
    assert only_the_bundle_is_left(interrupted)


@pytest.mark.parametrize("damage", ["flip", "short", "long", "gone", "zeros"])
def test_a_damaged_finished_shard_is_built_again(
    interrupted: Path, undisturbed: dict[str, bytes], damage: str
) -> None:
    (shard,) = work_folder(interrupted).glob("bundle/tables/records-0-00002*")
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "zeros":
        data[:] = bytes(len(data))
    shard.write_bytes(data[:-1] if damage == "short" else data + b"\0" * (damage == "long"))
    if damage == "gone":
        shard.unlink()
    assert shard_writes(lambda: write(interrupted)) == {"records-0-00002", "records-0-00003"}
    assert tree_bytes(interrupted) == undisturbed


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"version":2,"fingerprint":"nano"}',
        b'{"version":2,"fingerprint":"nano","shards":[],"notes":{}}',
        b'{"version":2,"fingerprint":"nano","shards":{"records-0-00001-of-00003.safetensors":5},'
        b'"notes":{}}',
        b'{"version":2,"fingerprint":"nano","shards":{"records-0-00001-of-00003.safetensors":'
        b'{"bytes":1}},"notes":{}}',
        b'{"version":2,"fingerprint":"nano","shards":{},"notes":7}',
        b'{"version":3,"fingerprint":"nano","shards":{},"notes":{}}',
    ],
)
def test_a_damaged_state_file_is_as_good_as_none(
    interrupted: Path, undisturbed: dict[str, bytes], content: bytes
) -> None:
    (work_folder(interrupted) / "work.json").write_bytes(content)
    assert len(shard_writes(lambda: write(interrupted))) == 3
    assert tree_bytes(interrupted) == undisturbed


def test_a_flipped_bit_of_the_state_file_is_not_believed(interrupted: Path) -> None:
    state = work_folder(interrupted) / "work.json"
    kept = tree_bytes(work_folder(interrupted))
    data = state.read_bytes()
    for bit in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        state.write_bytes(flipped)
        with BundleWriter(interrupted, fingerprint="nano") as writer:
            assert not writer.resumed, f"bit {bit}"
            for name, content in kept.items():
                (writer.work / name).write_bytes(content)
    state.write_bytes(data)
    with BundleWriter(interrupted, fingerprint="nano") as writer:
        assert writer.resumed


def test_another_fingerprint_discards_everything(interrupted: Path) -> None:
    scratch = work_folder(interrupted) / "carry.f16"
    scratch.write_bytes(b"x")
    (work_folder(interrupted) / "bundle" / "stray.json").write_bytes(b"x")
    written = shard_writes(lambda: write(interrupted, fingerprint="other", seed=4))
    assert len(written) == 3
    verify(interrupted)
    assert only_the_bundle_is_left(interrupted)


def test_restart_discards_everything(interrupted: Path) -> None:
    with BundleWriter(interrupted, fingerprint="nano", restart=True) as writer:
        assert not writer.resumed and not list(writer.folder.rglob("records-*"))


def test_leftovers_of_a_kill_never_get_into_the_bundle(
    interrupted: Path, undisturbed: dict[str, bytes]
) -> None:
    folder = work_folder(interrupted) / "bundle"
    for name in (
        ".tol.json.tmp",
        "tol.json",
        ".config.json.tmp",
        "old.json",
        "tables/.checksums.safetensors.tmp",
        "tables/checksums.safetensors",
        "tables/bases.safetensors",
        "tables/.records-0-00003-of-00003.safetensors.tmp",
    ):
        (folder / name).write_bytes(b"left behind")
    (folder / "deep" / "er").mkdir(parents=True)
    write(interrupted)
    assert tree_bytes(interrupted) == undisturbed
    verify(interrupted)


def test_an_error_keeps_finished_shards_and_removes_half_written_files(interrupted: Path) -> None:
    names = {p.name for p in work_folder(interrupted).rglob("*")}
    assert not [name for name in names if name.endswith(".tmp")]
    assert len([name for name in names if name.startswith("records-")]) == 2


def test_an_error_before_anything_was_finished_leaves_nothing(
    tmp_path: Path,
) -> None:
    with stop_at("write", "records-0-00001"), pytest.raises(StoppedError):
        write(tmp_path / "b.tol")
    assert list(tmp_path.iterdir()) == []


# What is in the way.


def test_an_existing_output_is_refused_and_unchanged(tmp_path: Path) -> None:
    nano = write(tmp_path / "b.tol")
    before = tree_bytes(nano.path)
    with pytest.raises(OutputExistsError) as caught:
        write(nano.path, seed=1)
    assert caught.value.exit_code == 2 and "--force" in caught.value.hint
    assert tree_bytes(nano.path) == before and only_the_bundle_is_left(nano.path)


def test_force_replaces_and_open_readers_keep_what_they_opened(tmp_path: Path) -> None:
    old = write(tmp_path / "b.tol")
    reader = open_bundle(old.path)
    new = write(tmp_path / "b.tol", seed=1, fingerprint="new", force=True)
    assert new.identity != old.identity
    np.testing.assert_array_equal(reader.rows([5, 2000]), old.rows_VKD[[5, 2000]])
    np.testing.assert_array_equal(open_bundle(new.path).rows([5]), new.rows_VKD[[5]])
    assert only_the_bundle_is_left(new.path)


def test_force_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "b.tol").mkdir()
    verify(write(tmp_path / "b.tol", force=True).path)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_what_is_not_a_bundle_is_left_alone(tmp_path: Path, kind: str, force: bool) -> None:
    path, elsewhere = tmp_path / "b.tol", tmp_path / "elsewhere"
    if kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("years of work")
    elif kind == "file":
        path.write_text("years of work")
    else:
        if kind == "link":
            elsewhere.mkdir()
            (elsewhere / "tol.json").write_text("{}")
        path.symlink_to(elsewhere)
    with pytest.raises(OutputExistsError):
        write(path, force=force)
    assert path.is_symlink() == ("link" in kind)
    assert not work_folder(path).exists()
    if kind == "folder":
        assert (path / "thesis.tex").read_text() == "years of work"
    if kind == "link":
        assert (elsewhere / "tol.json").read_text() == "{}"


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_strangers_folder_of_the_work_folders_name_is_left_alone(
    tmp_path: Path, kind: str
) -> None:
    work, elsewhere = work_folder(tmp_path / "b.tol"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("years of work")
    if kind == "folder":
        elsewhere.rename(work)
    elif kind == "file":
        work.write_text("years of work")
    else:
        work.symlink_to(elsewhere)
    with pytest.raises(TolError) as caught:
        write(tmp_path / "b.tol")
    assert str(work) in caught.value.message
    text = work if kind == "file" else work / "thesis.tex"
    assert text.read_text() == "years of work"


def test_force_leaves_a_strangers_replaced_folder_alone(tmp_path: Path) -> None:
    nano = write(tmp_path / "b.tol")
    strange = tmp_path / "b.tol.replaced"
    strange.mkdir()
    (strange / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match="replaced"):
        write(nano.path, seed=1, fingerprint="new", force=True)
    assert (strange / "thesis.tex").read_text() == "years of work"
    verify(nano.path)


def test_no_folder_to_write_into(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write(tmp_path / "gone" / "b.tol")


# Two writers.


def hold_lock(work: Path) -> subprocess.Popen[str]:
    """Another process that has the work folder locked until its stdin closes."""
    code = f"""
        import sys
        from pathlib import Path
        from tolkit_formats import files
        work = Path({str(work)!r})
        work.mkdir(exist_ok=True)
        with files.lock(work / "lock"):
            print("locked", flush=True)
            sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_a_second_writer_is_refused_until_the_first_ends(interrupted: Path) -> None:
    before = tree_bytes(work_folder(interrupted))
    process = hold_lock(work_folder(interrupted))
    try:
        with pytest.raises(ResourceError, match="another process is writing") as caught:
            write(interrupted)
        assert caught.value.exit_code == 6 and caught.value.hint
        with pytest.raises(ResourceError):
            write(interrupted, fingerprint="other")  # must not discard the other one's work
        assert tree_bytes(work_folder(interrupted)) == before
    finally:
        process.communicate()
    verify(write(interrupted).path)


@pytest.mark.parametrize("successor", [False, True])
def test_a_lock_whose_folder_went_away_is_not_a_lock(tmp_path: Path, successor: bool) -> None:
    """Between opening the lock file and holding it, its owner may have published and gone.

    And a third process may have come in between.
    """
    work = tmp_path / "work"
    work.mkdir()

    def remove(what: str, path: str) -> None:
        if what == "open-done" and path.endswith("lock"):
            files.set_fault_hook(None)
            files.remove_tree(work)
            if successor:
                work.mkdir()
                (work / "lock").touch()

    with (
        fault_hook(remove),
        pytest.raises(ResourceError, match="another process"),
        files.lock(work / "lock"),
    ):
        pass


def test_notes_survive_and_are_durable(tmp_path: Path) -> None:
    with pytest.raises(StoppedError), BundleWriter(tmp_path / "b.tol", fingerprint="f") as writer:
        writer.remember("fitted", [0, 1])
        raise StoppedError
    with BundleWriter(tmp_path / "b.tol", fingerprint="f") as writer:
        assert writer.resumed and writer.note("fitted") == [0, 1] and writer.note("x") is None


def test_what_could_not_be_opened_is_not_published(tmp_path: Path) -> None:
    manifest = open_bundle(write_nano(tmp_path / "a.tol").path).manifest
    with (
        pytest.raises(BundleError, match="is missing"),
        BundleWriter(tmp_path / "b.tol", fingerprint="f") as writer,
    ):
        writer.publish(manifest)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tol"]
