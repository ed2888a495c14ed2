"""Every script of tests/bench starts as its docstring says, without a path set by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"
SCRIPTS = sorted(path for path in BENCH.glob("*.py") if not path.name.startswith("_"))

# One process for all, which spares importing torch and lm_eval again and again; before each script
# the path is what `python tests/bench/NAME.py` makes it, and the tests' own modules are forgotten.
IMPORT_ALL = """
import runpy, sys
bench, *scripts = sys.argv[1:]
tests = bench.removesuffix("bench")
clean = [bench, *sys.path[1:]]
for script in scripts:
    sys.path[:] = clean
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(tests):
            del sys.modules[name]
    try:
        runpy.run_path(script, run_name="imported")
    except ImportError as error:
        print(script, error)
"""


def test_every_script_imports_what_it_needs() -> None:
    assert len(SCRIPTS) > 9
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(BENCH), *map(str, SCRIPTS)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
