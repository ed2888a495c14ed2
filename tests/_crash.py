"""Commands run in forked children that end themselves with SIGKILL at a chosen I/O call.

A fork server imports torch once; every run is a fork of it, so a kill costs milliseconds. The
children share nothing with the test process but files.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

from tolkit_formats import files

_PRELOADED = [
    "tolkit.build",
    "tolkit.compress",
    "tolkit.bundling",
    "tolkit.train",
    "torch._dynamo",  # what the first optimiser of a process imports
    "_crash",
    "_pico",
]


def fork_server() -> ForkServerContext:
    """A context whose children start with torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}):
        first = context.Process(target=int)  # starts the server, in this environment
        first.start()
        first.join()
    return context


def run_command(name: str, inputs: Path, out: Path, *, force: bool, threads: int = 1) -> None:
    """One command into `out`, shards of one block each so that there are several.

    ``build``, ``compress``, ``bands``, ``drop-layers``;
    ``save`` and ``train`` write checkpoint folders.
    """
    from tolkit.build import build
    from tolkit.bundling import Resources
    from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
    from tolkit.progress import SilentProgress
    from tolkit_formats.records import lay_out

    common = {"resources": Resources(threads=threads, force=force), "progress": SilentProgress()}
    small_shards = functools.partial(lay_out, max_shard_bytes=1)
    with mock.patch("tolkit.compress.plan.lay_out", small_shards):
        if name == "build":
            build(inputs / "ckpt", out, **common)
        elif name == "compress":
            compress(inputs / "ckpt", out, CompressSpec(rank="50%", codec="nf4"), **common)
        elif name == "bands":
            compress(inputs / "ckpt", out, CompressSpec(bits_per_value=12.0), **common)
        elif name == "drop-layers":
            drop_layers(inputs / "coded.tol", out, DropSpec((1,)), **common)
        elif name == "save":
            _save(out, force=force)
        elif name == "train":
            _train(inputs, out, force=force)
        else:
            raise AssertionError(name)


def _save(out: Path, *, force: bool) -> None:
    from _pico import pico_counts, pico_model, pico_tokenizer_files

    from tolkit.model import save_checkpoint

    save_checkpoint(
        pico_model(), out, pico_tokenizer_files(), pico_counts(), force, max_shard_bytes=20_000
    )


def _train(inputs: Path, out: Path, *, force: bool) -> None:
    from tolkit.progress import SilentProgress
    from tolkit.train import TrainSpec, train

    text = inputs / "text.txt"
    if not text.exists():
        words = "sun moon star sky rises falls blue night".split()
        lines = [" ".join(words[i % 8 :] + words[: i % 5]) for i in range(300)]
        text.write_text("\n".join(lines))
    spec = TrainSpec(
        out=out,
        text=(str(text),),
        layers=1,
        hidden_size=32,
        vocab_size=270,
        steps=2,
        sequence=16,
        batch=2,
        micro_batch=2,
        eval_every=0,
        save_every=1,
        dtype="float32",
        force=force,
    )
    train(spec, SilentProgress())


def child(name: str, inputs: Path, out: Path, force: bool, kill_at: int, log: Path | None) -> None:
    """Run a command and die at I/O call `kill_at` (0: live). `log` gets the calls it made."""
    calls: list[str] = []

    def hook(operation: str, path: str) -> None:
        calls.append(f"{operation} {Path(path).name}")
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    files.set_fault_hook(hook)
    try:
        run_command(name, inputs, out, force=force)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if log is not None:
        log.write_text("\n".join(calls))
    os._exit(0)


def run(
    context: ForkServerContext,
    name: str,
    inputs: Path,
    out: Path,
    *,
    force: bool = False,
    kill_at: int = 0,
    log: Path | None = None,
) -> int:
    """Exit code of one child: 0 done, -9 killed, 1 an error (its traceback is on stderr)."""
    process = context.Process(target=child, args=(name, inputs, out, force, kill_at, log))
    process.start()
    process.join(60)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{name}: still running after 60 s")
    return process.exitcode
