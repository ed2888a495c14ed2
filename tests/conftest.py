"""For all tests: numbers drawn without a generator of their own are the same in every run."""

from __future__ import annotations

import sys

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _repeatable_numbers() -> None:
    np.random.seed(0)
    if "torch" in sys.modules:  # the tests of the format do without it
        sys.modules["torch"].manual_seed(0)
