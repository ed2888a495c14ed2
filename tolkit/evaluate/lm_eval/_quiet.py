"""Keeping lm-evaluation-harness to its work: no bars, no chatter, no seeds left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm.std import tqdm

__all__ = ["quietly"]

_TALKERS = ("lm_eval", "datasets", "transformers")
_ONE_PROCESS = "DISABLE_MULTIPROC"  # its bootstrap would fork a process with torch's threads


@contextlib.contextmanager
def quietly(device: torch.device) -> Iterator[None]:
    """What runs inside prints to stderr only, draws no progress bars, and reseeds nobody else.

    Everything is put back afterwards. Not for use from several threads at once.
    """
    seeds = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        contextlib.redirect_stdout(sys.stderr),
        _no_bars(),
        _errors_only(),
        _variable(_ONE_PROCESS, "1"),
    ):
        try:
            yield
        finally:
            random.setstate(seeds[0])
            np.random.set_state(seeds[1])


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    # The harness switches bars on at each call, so the class itself is told.
    original = tqdm.__init__

    def disabled(bar: Any, *args: Any, **kwargs: Any) -> None:
        original(bar, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
