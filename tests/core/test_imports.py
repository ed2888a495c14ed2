"""Every module can be the first one that is imported: no circle of imports shows by chance."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator

import pytest

import tolkit
import tolkit_formats

# Their classes are registered with torch or triton, once a process.
KERNELS = "tolkit.runtime.kernels."


def names() -> Iterator[str]:
    for package in (tolkit, tolkit_formats):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.startswith((KERNELS, "tolkit.hf")):
                yield module.name


@pytest.fixture
def afresh() -> Iterator[None]:
    """Modules of ours are put back afterwards: other tests hold their classes."""
    before = {name: module for name, module in sys.modules.items() if name.startswith("tolkit")}
    yield
    for name in [name for name in sys.modules if name.startswith("tolkit")]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("name", sorted(names()))
def test_a_module_can_be_imported_first(name: str, afresh: None) -> None:
    for loaded in [loaded for loaded in sys.modules if loaded.startswith("tolkit")]:
        del sys.modules[loaded]
    importlib.import_module(name)
