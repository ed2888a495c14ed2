"""The page cache: what lies in it, and that cold and warm are what they are called."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from _pages import require_evictable
from _tiny_bundles import write_bundle

from tolkit.bench import residency
from tolkit.bench.residency import evict, make_cold, make_warm, record_paths, resident_share
from tolkit.errors import InputError, ResourceError
from tolkit_formats import open_bundle
from tolkit_formats.files import map_bytes

PAGE = mmap.PAGESIZE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    require_evictable(tmp_path)
    path = tmp_path / "some.bin"
    path.write_bytes(bytes(256 * PAGE + 5))
    return path


def test_a_page_that_is_read_is_counted(file: Path) -> None:
    assert resident_share([file]) == 1, "just written"
    evict([file])
    assert resident_share([file]) == 0
    map_bytes(file, random_access=True)[100 * PAGE]
    assert resident_share([file]) == 1 / 257, "one of 257 pages, the last one 5 bytes"
    assert resident_share([file]) == 1 / 257, "looking brings nothing in"


def test_shares_are_of_all_files_together(file: Path) -> None:
    other = file.with_name("other.bin")
    other.write_bytes(bytes(257 * PAGE))
    evict([file])
    assert resident_share([file, other]) == 0.5
    assert resident_share([]) == 0
    (file.with_name("empty.bin")).touch()
    assert resident_share([file.with_name("empty.bin")]) == 0


def test_parts_of_a_large_file_are_looked_at_one_by_one(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_PART_BYTES", 64 * PAGE)
    evict([file])
    map_bytes(file, random_access=True)[200 * PAGE]
    assert resident_share([file]) == 1 / 257


def test_pages_this_process_maps_leave_too(file: Path) -> None:
    mapped = map_bytes(file)
    assert not mapped.any()
    assert make_cold([file]) == 0
    assert not mapped.any(), "and come back when they are asked for"


def test_warm_reads_all(file: Path) -> None:
    make_cold([file])
    assert make_warm([file]) == 1


def test_what_stays_is_not_called_cold(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "evict", lambda paths: None)
    monkeypatch.setattr(residency, "_PAUSE_S", 0)
    with pytest.raises(ResourceError, match=r"100\.0 % of the records stay in memory") as caught:
        make_cold([file])
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("share", [0.5, None])
def test_what_is_not_known_or_not_there_is_refused(
    file: Path, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "resident_share", lambda paths: share)
    monkeypatch.setattr(residency, "_PAUSE_S", 0)
    with pytest.raises(ResourceError, match="cold"):
        make_cold([file])
    if share is None:
        assert make_warm([file]) is None
    else:
        with pytest.raises(ResourceError, match="would not be warm"):
            make_warm([file])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises((InputError, ResourceError), match="gone"):
        resident_share([tmp_path / "gone"])


def test_the_files_of_a_bundle(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "b.tol"))
    assert [path.name for path in record_paths(bundle)] == ["records-0-00001-of-00001.safetensors"]
    assert all(path.is_file() for path in record_paths(bundle))
