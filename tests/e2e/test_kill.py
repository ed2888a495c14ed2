"""kill -9 at random I/O calls: the output is the old one, the new one, or not there.

Never one that opens and is wrong; and the same command run again ends in the same bytes as a run
that was left alone. A failure names command, seed and call, which replays it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
from _crash import fork_server, run
from _nano import memory_folder, nano_checkpoint, tree_bytes

from tolkit.model import load_checkpoint
from tolkit_formats import open_bundle, verify

pytestmark = pytest.mark.slow

SEED = 7
KILLS = 50
COMMANDS = ("build", "compress", "bands", "drop-layers")
FITTING_KILLS = 20  # of bands, whose every run fits anew


class Workshop:
    """Inputs, and per command what an undisturbed run gives."""

    def __init__(self, folder: Path) -> None:
        self.context: ForkServerContext = fork_server()
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        nano_checkpoint(self.inputs / "ckpt", vocab_size=2100, hidden_size=8)
        nano_checkpoint(self.inputs / "old" / "ckpt", vocab_size=2100, hidden_size=8, seed=1)
        assert self("compress", folder / "coded.tol") == 0
        (folder / "coded.tol").rename(self.inputs / "coded.tol")
        assert self("build", folder / "old.tol", inputs=self.inputs / "old") == 0
        self.old = folder / "old.tol"
        self.calls: dict[str, list[str]] = {}
        self.whole: dict[str, dict[str, bytes]] = {}
        self.rows: dict[str, np.ndarray] = {}
        for name in COMMANDS:
            (folder / name).mkdir()
            out = folder / name / "b.tol"
            assert self(name, out, log=folder / "log") == 0
            self.calls[name] = (folder / "log").read_text().splitlines()
            self.whole[name] = tree_bytes(out)
            self.rows[name] = open_bundle(out).rows(np.arange(2100))

    def __call__(
        self,
        name: str,
        out: Path,
        *,
        kill_at: int = 0,
        force: bool = False,
        log: Path | None = None,
        inputs: Path | None = None,
    ) -> int:
        where = inputs or self.inputs
        return run(self.context, name, where, out, kill_at=kill_at, force=force, log=log)


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    with memory_folder() as folder:
        yield Workshop(folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


def points(name: str, count: int, calls: list[str]) -> list[int]:
    """`count` different calls, numbered from 1; those around publishing always among them."""
    first = next(i for i, call in enumerate(calls, 1) if call.startswith("replace b.tol"))
    fixed = range(first - 2, min(first + 8, len(calls) + 1))
    others = [i for i in range(1, len(calls) + 1) if i not in fixed]
    return sorted([*fixed, *random.Random(f"{SEED} {name}").sample(others, count - len(fixed))])


def whole_or_absent(workshop: Workshop, name: str, out: Path, *, old: bool) -> str:
    """``old``, ``new`` or ``absent``; anything else fails."""
    if not out.exists():
        return "absent"
    verify(out)
    if old and tree_bytes(out) == tree_bytes(workshop.old):
        return "old"
    assert tree_bytes(out) == workshop.whole[name]
    np.testing.assert_array_equal(open_bundle(out).rows(np.arange(2100)), workshop.rows[name])
    return "new"


def finished(workshop: Workshop, name: str, out: Path) -> None:
    assert tree_bytes(out) == workshop.whole[name], "the second run gave other bytes"
    assert [entry.name for entry in out.parent.iterdir()] == [out.name], "something is left over"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_at_any_call(workshop: Workshop, name: str, folder: Path) -> None:
    calls = workshop.calls[name]
    seen = set()
    for point in points(name, FITTING_KILLS if name == "bands" else KILLS, calls):
        out = folder / str(point) / "b.tol"
        out.parent.mkdir()
        with explained(f"{name}, call {point} of {len(calls)}: {calls[point - 1]}"):
            assert workshop(name, out, kill_at=point) == -9
            state = whole_or_absent(workshop, name, out, old=False)
            seen.add(state)
            if state == "absent":
                assert workshop(name, out) == 0
            # Published, and killed while tidying up: the next run with --force tidies up too.
            elif len(list(out.parent.iterdir())) > 1:
                assert workshop(name, out, force=True) == 0
            finished(workshop, name, out)
        shutil.rmtree(out.parent)
    assert seen == {"absent", "new"}


def test_a_kill_while_replacing(workshop: Workshop, folder: Path) -> None:
    name = "compress"
    calls = forced_calls(workshop, name, folder)
    seen = set()
    for point in points(f"{name} --force", KILLS // 2, calls):
        out = folder / str(point) / "b.tol"
        shutil.copytree(workshop.old, out)
        with explained(f"{name} --force, call {point} of {len(calls)}: {calls[point - 1]}"):
            assert workshop(name, out, kill_at=point, force=True) == -9
            seen.add(whole_or_absent(workshop, name, out, old=True))
            assert workshop(name, out, force=True) == 0
            finished(workshop, name, out)
        shutil.rmtree(out.parent)
    assert seen == {"old", "absent", "new"}


def forced_calls(workshop: Workshop, name: str, folder: Path) -> list[str]:
    out = folder / "forced" / "b.tol"
    shutil.copytree(workshop.old, out)
    assert workshop(name, out, force=True, log=folder / "log") == 0
    finished(workshop, name, out)
    return (folder / "log").read_text().splitlines()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_of_the_recovery(workshop: Workshop, name: str, folder: Path) -> None:
    generator = random.Random(f"{SEED} double {name}")
    total = len(workshop.calls[name])
    for round_ in range(3 if name == "bands" else 10):
        out = folder / str(round_) / "b.tol"
        out.parent.mkdir()
        first, second = generator.randint(20, total - 20), generator.randint(1, total // 2)
        with explained(f"{name}, calls {first} ({workshop.calls[name][first - 1]}), then {second}"):
            assert workshop(name, out, kill_at=first) == -9
            # A recovery may need fewer calls than `second`; then it simply ends.
            if workshop(name, out, kill_at=second) == -9:
                whole_or_absent(workshop, name, out, old=False)
                assert workshop(name, out, force=True) == 0
            finished(workshop, name, out)


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("basis-*", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("basis-*", lambda data: data[: len(data) // 2]),
        ("carry-*", lambda data: data[:7] + bytes([data[7] ^ 64]) + data[8:]),
        ("carry-*", lambda data: data[:-2]),
        ("carry-*", None),
        ("basis-*", None),
        ("target*", lambda data: bytes(len(data))),
    ],
)
def test_damaged_intermediate_files_are_not_believed(
    workshop: Workshop, folder: Path, pattern: str, damage: Callable[[bytes], bytes] | None
) -> None:
    """Killed while fitting the last basis; then a file it would go on from is damaged."""
    calls = workshop.calls["compress"]
    fitted = [i for i, call in enumerate(calls) if call == "replace-done work.json"]
    point = fitted[1] + 2  # two layers are noted as fitted
    out = folder / "b.tol"
    assert workshop("compress", out, kill_at=point) == -9
    found = sorted((folder / "b.tol.partial").glob(pattern))
    assert found, f"nothing called {pattern} there any more"
    for path in found:
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(path.read_bytes()))
    assert workshop("compress", out) == 0
    finished(workshop, "compress", out)


@pytest.mark.parametrize("name", ["save", "train"])
def test_a_kill_while_a_checkpoint_is_written(workshop: Workshop, name: str, folder: Path) -> None:
    whole = folder / "whole" / "b.tol"
    whole.parent.mkdir()
    assert workshop(name, whole, log=folder / "log") == 0
    calls = (folder / "log").read_text().splitlines()
    for point in points(name, KILLS // 2, calls):
        out = folder / str(point) / "b.tol"
        out.parent.mkdir()
        with explained(f"{name}, call {point} of {len(calls)}: {calls[point - 1]}"):
            assert workshop(name, out, kill_at=point) == -9
            if out.exists():
                assert weights(out) == weights(whole)
            assert workshop(name, out, force=True) == 0
            assert weights(out) == weights(whole)
            assert [entry.name for entry in out.parent.iterdir()] == [out.name]
        shutil.rmtree(out.parent)


def weights(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint folder but the training log, which holds times."""
    load_checkpoint(path)
    return {k: v for k, v in tree_bytes(path).items() if not k.startswith("train")}


class explained:  # noqa: N801  # reads like a function
    """Puts the point of a kill in front of whatever fails inside."""

    def __init__(self, point: str) -> None:
        self.point = point

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        if error is not None:
            error.add_note(f"seed {SEED}: {self.point}")
