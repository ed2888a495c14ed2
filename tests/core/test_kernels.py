"""The Triton kernels: in the interpreter against torch, and compiled for a device not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _kernels import WRITERS, require, run_case
from _nano import ALL_CODECS, write_nano

from tolkit.runtime.kernels.tuning import Blocks, Tuning

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def printed(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """What a script of tests/ prints; triton reads its environment once a process."""
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    read: dict[str, Any] = json.loads(done.stdout)
    return read


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kernels")
    return printed("_kernels.py", str(folder), TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_torchs(interpreted: dict[str, Any], name: str) -> None:
    require(name, interpreted[name], interpreted=True)


@needs_triton
def test_kernels_compile_for_sm_90(tmp_path: Path) -> None:
    """To machine code by the toolchain's own assembler, within the shared memory there is."""
    write_nano(tmp_path / "n.tol", ALL_CODECS, vocab_size=8, hidden_size=24)
    bands, steps = GOLDEN / "v1.0/bands-klt.tol", GOLDEN / "v1.1/steps-klt.tol"
    made = printed(
        "_kernel_compile.py",
        *(f"{tmp_path}/n.tol", "bfloat16", "1"),
        *(f"{bands}", "float32", "64"),
        *(f"{bands}", "float16", "1"),
        *(f"{steps}", "bfloat16", "2"),
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
        TRITON_INTERPRET="0",
    )
    kernels = [each["kernel"] for each in made.values()]
    assert kernels.count("element_kernel") >= 5 and kernels.count("expand_kernel") >= 5
    for each in made.values():
        assert each["for_sm_90"] and each["cubin_bytes"] > 1000
        assert each["shared_bytes"] <= 227 << 10
        assert each["tensor_core"] == (each["kernel"] == "expand_kernel")


@needs_triton
@no_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("name", WRITERS)
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    require(name, run_case(name, tmp_path, torch.device("cuda")), interpreted=False)


BLOCKS: list[Blocks] = [{"BLOCK": 64}, {"BLOCK": 128}, {"BLOCK": 256}]


class Timed:
    """Stands for a device: seconds by block, launches noted; a block of 0 s is refused."""

    def __init__(self, *elapsed_s: float) -> None:
        self._elapsed_s = dict(zip((64, 128, 256), elapsed_s, strict=True))
        self.launched: list[int] = []

    def launch(self, blocks: Blocks) -> None:
        self.launched.append(blocks["BLOCK"])
        if not self._elapsed_s[blocks["BLOCK"]]:
            raise OutOfResources("shared memory")

    def seconds(self, call: Any) -> float:
        call()
        return self._elapsed_s[self.launched[-1]]


class OutOfResources(Exception):  # noqa: N818
    """Named as triton's."""


def test_the_fastest_blocks_are_chosen_once_and_remembered(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernels.json"
    timed = Timed(3.0, 1.0, 2.0)
    tuning = Tuning("a device", path=path, seconds=timed.seconds)
    assert tuning.choose("rows 1", BLOCKS, timed.launch) == {"BLOCK": 128}
    before = len(timed.launched)
    assert tuning.choose("rows 1", BLOCKS, timed.launch) == {"BLOCK": 128}
    again = Tuning("a device", path=path, seconds=timed.seconds)
    assert again.choose("rows 1", BLOCKS, timed.launch) == {"BLOCK": 128}
    assert len(timed.launched) == before
    elsewhere = Timed(1.0, 2.0, 3.0)
    other = Tuning("another device", path=path, seconds=elsewhere.seconds)
    assert other.choose("rows 1", BLOCKS, elsewhere.launch) == {"BLOCK": 64}
    assert len(json.loads(path.read_text())) == 2


def test_a_block_the_device_refuses_is_passed_over(tmp_path: Path) -> None:
    timed = Timed(3.0, 0.0, 2.0)
    tuning = Tuning("a device", path=tmp_path / "k.json", seconds=timed.seconds)
    assert tuning.choose("rows 1", BLOCKS, timed.launch) == {"BLOCK": 256}


def test_a_fault_of_a_launch_is_not_swallowed(tmp_path: Path) -> None:
    def launch(blocks: Blocks) -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        Tuning("a device", path=tmp_path / "k.json").choose("rows 1", BLOCKS, launch)


@pytest.mark.parametrize("content", ["", "[1]", '{"a": "b"}', "\udcff", None])
def test_the_file_is_never_required(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "kernels.json"
    if content is None:
        path.mkdir()  # neither read nor written
    else:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    timed = Timed(3.0, 2.0, 1.0)
    tuning = Tuning("a device", path=path, seconds=timed.seconds)
    assert tuning.choose("rows 1", BLOCKS, timed.launch) == {"BLOCK": 256}


def test_a_remembered_number_out_of_range_is_timed_again(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    timed = Timed(3.0, 1.0, 2.0)
    Tuning("a device", path=path, seconds=timed.seconds).choose("rows 1", BLOCKS, timed.launch)
    path.write_text(path.read_text().replace(": 1", ": 7"))
    fresh = Tuning("a device", path=path, seconds=timed.seconds)
    assert fresh.choose("rows 1", BLOCKS, timed.launch) == {"BLOCK": 128}
