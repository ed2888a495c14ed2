"""Start-up times as a user meets them: medians over fresh processes, printed, asserted by nobody.

Targets: `tol --help` below 0.3 s, `tol inspect` below 0.5 s, the reader's import below 50 ms beyond
numpy's. Run alone on a quiet machine: python tests/bench/startup.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "cli"), str(ROOT / "formats"), str(ROOT / "tests")]

from _tiny_bundles import write_bundle  # noqa: E402  # the path comes first

ROUNDS = 15
TOL = "import sys; from tolkit_cli.main import main; sys.exit(main())"
NUMPY = "import numpy, hashlib, json, zlib, fcntl"


def median_s(arguments: list[str], environment: dict[str, str]) -> float:
    """Median wall time of a fresh Python process, after one that warms the file cache."""
    times_s = []
    for _ in range(ROUNDS + 1):
        started_s = time.perf_counter()
        subprocess.run([sys.executable, *arguments], env=environment, capture_output=True)
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s[1:])


def main() -> None:
    """Print one line a case: name, median, target."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:4])}
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(write_bundle(Path(folder) / "a.tol"))
        cases = [
            ("tol --help", ["-c", TOL, "--help"], "0.300"),
            ("tol inspect", ["-c", TOL, "inspect", bundle], "0.500"),
            ("tol verify (tiny bundle)", ["-c", TOL, "verify", bundle], "-"),
            ("python -c pass", ["-c", "pass"], "-"),
        ]
        for name, arguments, target in cases:
            sys.stdout.write(f"{name:<28} {median_s(arguments, environment):.3f} s  {target}\n")
    alone = median_s(["-c", NUMPY], environment)
    with_reader = median_s(["-c", f"{NUMPY}; import tolkit_formats"], environment)
    sys.stdout.write(f"{'reader beyond numpy':<28} {with_reader - alone:.3f} s  0.050\n")


if __name__ == "__main__":
    main()
