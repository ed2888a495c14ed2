"""Same inputs, same bytes: whatever the threads, hash seed, folder, umask, locale or clock zone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from _nano import nano_checkpoint, tree_bytes

from tolkit.build import build
from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, compress
from tolkit.progress import SilentProgress

RUN = """
    import functools, os, sys
    from unittest import mock
    os.umask(int(os.environ["RUN_UMASK"], 8))
    import torch
    from tolkit.build import build
    from tolkit.bundling import Resources
    from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
    from tolkit.progress import SilentProgress
    from tolkit_formats.records import lay_out

    source, prefix = sys.argv[1:]
    common = {
        "resources": Resources(threads=int(os.environ["RUN_THREADS"])),
        "progress": SilentProgress(),
    }
    with mock.patch("tolkit.compress.plan.lay_out", functools.partial(lay_out, max_shard_bytes=1)):
        build(source, prefix + "build.tol", **common)
        compress(source, prefix + "nf4.tol", CompressSpec(codec="nf4"), **common)
        spec = CompressSpec(codec="nf4", rank="50%")
        compress(source, prefix + "rank.tol", spec, **common)
        compress(prefix + "build.tol", prefix + "again.tol", spec, **common)
        bands = CompressSpec(bits_per_value=5.0)
        compress(prefix + "build.tol", prefix + "bands.tol", bands, **common)
        drop_layers(prefix + "rank.tol", prefix + "drop.tol", DropSpec((1,)), **common)
"""
NAMES = ("build", "nf4", "rank", "again", "bands", "drop")


def run_elsewhere(
    folder: Path, source: str, prefix: str, *, threads: int, **environment: str
) -> dict[str, dict[str, bytes]]:
    """All commands in a fresh process; name -> files of the bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUN), source, prefix],
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path),
            "RUN_THREADS": str(threads),
            "OMP_NUM_THREADS": str(threads),
            "RUN_UMASK": "022",
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr
    return {name: tree_bytes(folder / f"{prefix}{name}.tol") for name in NAMES}


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = nano_checkpoint(tmp_path / "ckpt", vocab_size=2500)
    first = run_elsewhere(
        tmp_path / "a", str(checkpoint), "", threads=1, PYTHONHASHSEED="0", TZ="UTC", LC_ALL="C"
    )
    second = run_elsewhere(
        tmp_path / "some where" / "else",
        "../../ckpt",
        "other-",
        threads=2,
        PYTHONHASHSEED="4242",
        TZ="Asia/Kolkata",
        LC_ALL="C.UTF-8",
        RUN_UMASK="077",
        HOME="/nonexistent",
    )
    for name in NAMES:
        assert first[name] == second[name], name
        assert len([file for file in first[name] if "records-" in file]) >= 3


def test_order_of_files_and_names_do_not_matter(tmp_path: Path) -> None:
    """A source elsewhere, under another name, its files written in another order."""
    checkpoint = nano_checkpoint(tmp_path / "ckpt")
    moved = tmp_path / "elsewhere" / "other name"
    moved.mkdir(parents=True)
    for name in sorted((file.name for file in checkpoint.iterdir()), reverse=True):
        (moved / name).write_bytes((checkpoint / name).read_bytes())
        os.utime(moved / name, (1, 1))
    for number, source in enumerate((checkpoint, moved)):
        build(source, tmp_path / f"build{number}.tol", progress=SilentProgress())
        compress(
            tmp_path / f"build{number}.tol",
            tmp_path / f"nf4-{number}.tol",
            CompressSpec(codec="nf4"),
            resources=Resources(threads=number + 1),
            progress=SilentProgress(),
        )
    for name in ("build", "nf4-"):
        assert tree_bytes(tmp_path / f"{name}0.tol") == tree_bytes(tmp_path / f"{name}1.tol")


def test_nothing_of_this_machine_is_in_a_bundle(tmp_path: Path) -> None:
    checkpoint = nano_checkpoint(tmp_path / "ckpt")
    build(checkpoint, tmp_path / "b.tol", progress=SilentProgress())
    content = b"".join(
        data
        for name, data in tree_bytes(tmp_path / "b.tol").items()
        if not name.endswith(".safetensors")
    )
    for secret in (str(tmp_path), os.uname().nodename, str(Path.home()), "b.tol"):
        assert secret.encode() not in content, secret
