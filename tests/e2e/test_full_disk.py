"""A disk that is full or failing: exit 6, the old bundle intact, nothing half-written left over.

ENOSPC and EIO are raised at I/O calls chosen by seed; a real small tmpfs is filled where mounting
is allowed.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _crash import run_command
from _nano import fault_hook, memory_folder, nano_checkpoint, tree_bytes

from tolkit_formats import TolError, files, verify
from tolkit_formats.errors import ResourceError

SEED = 11
POINTS = 30  # a command and kind of fault, of which there are four
COMMANDS = ("build", "compress", "drop-layers")
WRITING = ("open", "write", "write-half", "fsync", "replace", "mkdir", "fsync-dir")


@pytest.fixture(scope="module")
def inputs() -> Iterator[Path]:
    with memory_folder() as folder:
        nano_checkpoint(folder / "ckpt", vocab_size=1500, hidden_size=8)
        run_command("compress", folder, folder / "coded.tol", force=False)
        yield folder


@pytest.fixture(scope="module")
def old(inputs: Path) -> Path:
    run_command("build", inputs, inputs / "old.tol", force=False)
    return inputs / "old.tol"


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


Calls = list[tuple[str, str]]


@pytest.fixture(scope="module")
def whole(inputs: Path, old: Path) -> dict[str, tuple[Calls, dict[str, bytes]]]:
    """Per command the I/O calls of an undisturbed --force run, and what it writes."""
    result = {}
    for name in COMMANDS:
        out = inputs / name / "b.tol"
        shutil.copytree(old, out)
        calls: Calls = []
        with fault_hook(lambda what, path, calls=calls: calls.append((what, path))):
            run_command(name, inputs, out, force=True)
        result[name] = (calls, tree_bytes(out))
        shutil.rmtree(out.parent)
    return result


def failing(call: int, code: int, *, from_then_on: bool) -> Callable[[str, str], None]:
    """A hook that fails I/O call `call`, and with `from_then_on` every write after it."""
    count = [0]

    def hook(what: str, path: str) -> None:
        count[0] += 1
        if count[0] == call or (from_then_on and count[0] > call and what in WRITING):
            raise OSError(code, os.strerror(code), path)

    return hook


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("from_then_on", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_fault_at_any_call(
    inputs: Path, old: Path, whole: dict, folder: Path, name: str, code: int, from_then_on: bool
) -> None:
    calls, want = whole[name]
    before = tree_bytes(old)
    eligible = [
        i
        for i, (what, _) in enumerate(calls, 1)
        if code == errno.EIO or what.removesuffix("-done") in WRITING
    ]
    generator = random.Random(f"{SEED} {name} {code} {from_then_on}")
    for point in sorted(generator.sample(eligible, POINTS)):
        what, path = calls[point - 1]
        note = f"seed {SEED}: {name}, call {point} of {len(calls)}: {what} {Path(path).name}"
        out = folder / str(point) / "b.tol"
        shutil.copytree(old, out)
        try:
            with (
                fault_hook(failing(point, code, from_then_on=from_then_on)),
                pytest.raises(ResourceError) as caught,
            ):
                run_command(name, inputs, out, force=True)
            message = caught.value.message
            assert caught.value.exit_code == 6 and message.isprintable(), message
            assert str(folder) in message or str(inputs) in message, message
            if code == errno.ENOSPC:
                assert re.search(r"no space left on device .*[\d,]+ bytes free", message), message
                assert caught.value.hint
                if what in ("write", "write-half", "fsync") and "lock" not in path:
                    assert re.search(r"[\d,]+ bytes needed", message), message
            old_new_or_moving(out, before, want)
            assert no_half_written_files(out.parent), note
            run_command(name, inputs, out, force=True)
            assert tree_bytes(out) == want
            assert [p.name for p in out.parent.iterdir()] == ["b.tol"]
        except BaseException as error:
            error.add_note(note)
            raise
        shutil.rmtree(out.parent)


def old_new_or_moving(out: Path, before: dict[str, bytes], want: dict[str, bytes]) -> None:
    """The old bundle under its name, or aside of it for a moment, or the new one."""
    if not out.exists():
        assert tree_bytes(files.aside_of(out)) == before
        return
    verify(out)
    assert tree_bytes(out) in (before, want)


def no_half_written_files(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_the_check_before_starting(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(ResourceError) as caught:
        run_command("build", inputs, tmp_path / "b.tol", force=False)
    assert re.search(r"[\d,]{5,} bytes needed, 1,000 bytes free", caught.value.message)
    assert list(tmp_path.iterdir()) == []


def test_a_single_file_is_all_or_nothing(tmp_path: Path) -> None:
    """Reports, counts and the like: no call can fail and leave a temporary file behind."""
    target = tmp_path / "counts.safetensors"
    calls: list[str] = []
    with fault_hook(lambda what, path: calls.append(what)):
        files.write_atomic(target, b"old" * 100)
    for point in range(1, len(calls) + 1):
        with (
            fault_hook(failing(point, errno.ENOSPC, from_then_on=False)),
            pytest.raises(ResourceError),
        ):
            files.write_atomic(target, b"new" * 100)
        assert target.read_bytes() in (b"old" * 100, b"new" * 100)
        assert [p.name for p in tmp_path.iterdir()] == [target.name]


def test_reading_what_may_not_be_read(inputs: Path, old: Path) -> None:
    """EACCES on any file of a bundle is one line, not a traceback."""

    def hook(what: str, path: str) -> None:
        if what == "map" and "records" in path:
            raise PermissionError(errno.EACCES, "Permission denied", path)

    with fault_hook(hook), pytest.raises(TolError, match=r"records.*permission denied"):
        verify(old)


# A real full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of a size in KiB; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(size_kib: int) -> Path:
        place = tmp_path / f"disk{size_kib}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(place)]
        if shutil.which("mount") is None:
            pytest.skip("no mount command here")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("size_kib", [4, 40, 80, 120, 160, 200])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full(
    small_disk: Callable[[int], Path], inputs: Path, whole: dict, name: str, size_kib: int
) -> None:
    place = small_disk(size_kib)
    out = place / "b.tol"
    free = shutil.disk_usage(place).free
    try:
        run_command(name, inputs, out, force=False)
    except ResourceError as error:
        assert re.search(r"[\d,]+ bytes free", error.message), error.message
        assert not out.exists() and no_half_written_files(place)
    else:
        assert tree_bytes(out) == whole[name][1]
        assert sum(map(len, whole[name][1].values())) < free
        return
    subprocess.run(["mount", "-o", "remount,size=4m", str(place)], check=True)
    run_command(name, inputs, out, force=False)
    assert tree_bytes(out) == whole[name][1]
    assert [entry.name for entry in place.iterdir()] == ["b.tol"]


@pytest.mark.parametrize("limit_kib", [1, 16, 24])
def test_a_limit_on_file_size(inputs: Path, tmp_path: Path, limit_kib: int) -> None:
    """RLIMIT_FSIZE: EFBIG, not SIGXFSZ, and exit 6."""
    code = f"""
        import resource, signal, sys
        from pathlib import Path
        import torch
        from _crash import run_command
        from tolkit_formats.errors import ResourceError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_kib} << 10,) * 2)
        try:
            out = Path({str(tmp_path)!r}) / "b.tol"
            run_command("compress", Path({str(inputs)!r}), out, force=False)
        except ResourceError as error:
            sys.exit(f"{{error.exit_code}} {{error.message}}")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1 and done.stderr.startswith("6 "), done.stderr
    assert "file too large" in done.stderr and "bytes free" in done.stderr
    assert not (tmp_path / "b.tol").exists() and no_half_written_files(tmp_path)
