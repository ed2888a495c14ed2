"""Whether this machine can be asked about, and rid of, pages of files in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tolkit.bench.residency import evict, resident_share


def require_evictable(folder: Path) -> None:
    """Skip where files in `folder` cannot leave memory (a memory file system, not Linux)."""
    probe = folder / "probe.bin"
    probe.write_bytes(bytes(1 << 20))
    evict([probe])
    share = resident_share([probe])
    probe.unlink()
    if share is None or share > 0:
        pytest.skip(f"the file system of {folder} keeps pages in memory ({share})")
