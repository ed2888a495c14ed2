"""Documents from files, patterns, folders, JSONL, zstd and the standard library."""

import json
from pathlib import Path

import pytest
import zstandard

from tolkit.data import read_documents
from tolkit.data.stdlib_corpus import is_held_out, stdlib_documents
from tolkit.errors import DataError


def texts(*specs: object) -> list[str]:
    return [d.text for d in read_documents([str(s) for s in specs])]


def names(*specs: object) -> list[str]:
    return [d.name for d in read_documents([str(s) for s in specs])]


def test_a_file_is_one_document_kept_to_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("one\r\n\n  two\u2028é\n".encode())
    assert texts(file) == ["one\r\n\n  two\u2028é\n"]
    assert names(file) == [str(file)]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfhello")
    assert texts(file) == ["hello"]


def test_form_feed_lines_split_and_blank_parts_vanish(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\f\nfirst\n\f\n \n\f\r\nsecond \f not a line\n\f\nthird")
    assert texts(file) == ["first\n", "second \f not a line\n", "third"]
    assert names(file) == [f"{file}#1", f"{file}#2", f"{file}#3"]


def test_jsonl_records_are_documents_form_feeds_included(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    records = [{"text": "one\n\f\nstill one"}, {"text": " "}, {"text": "two", "id": 7}]
    file.write_text("\n\n".join(json.dumps(r) for r in records) + "\n")
    assert texts(file) == ["one\n\f\nstill one", "two"]
    assert names(file) == [f"{file}:1", f"{file}:5"]


def test_zstd_of_several_frames_reads_as_the_plain_file(tmp_path: Path) -> None:
    frames = [zstandard.compress(part) for part in (b"one\n", b"\f\ntwo\n")]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "three"}\n'))
    assert texts(tmp_path / "a.txt.zst", tmp_path / "b.jsonl.zst") == ["one\n", "two\n", "three"]


def test_folders_and_patterns_are_sorted_and_skip_what_is_no_text(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.py", "sub/.hidden.txt", ".git/d.txt", "image.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert texts(tmp_path) == ["a.md", "b.txt", "sub/c.py"]
    assert texts(tmp_path / "*.??*") == ["a.md", "b.txt", "image.png"]
    assert texts(tmp_path / "**" / "*.py") == ["sub/c.py"]


def test_an_existing_file_wins_over_its_pattern_reading(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("bracket")
    assert texts(tmp_path / "a[1].txt") == ["bracket"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "a.txt: empty text"),
        ("a.txt", b" \n\f\n\t\n", "a.txt: empty text"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl: empty text"),
        ("a.txt", b"fine\n\xff\xfe", "a.txt: not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "a.jsonl:2: expected an object with a string"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 5}\n', "a.jsonl:3: expected an object"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: expected an object"),
        ("a.jsonl", b'{"text": \n', "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: text holds a lone surrogate"),
        ("a.txt.zst", b"not zstd at all", "a.txt.zst: damaged zstd data"),
    ],
)
def test_bad_content_names_file_and_line(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        texts(tmp_path / name)
    assert said in caught.value.message


def test_a_cut_zstd_file_is_an_error_not_a_shorter_text(tmp_path: Path) -> None:
    whole = zstandard.compress(bytes(range(97, 123)) * 4000)
    (tmp_path / "a.txt.zst").write_bytes(whole[:-6])
    with pytest.raises(DataError, match=r"a\.txt\.zst"):
        texts(tmp_path / "a.txt.zst")


@pytest.mark.parametrize("spec", ["nothing.txt", "*.none", "stdlib:test", "."])
def test_specs_that_stand_for_nothing(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        texts(spec)
    assert caught.value.message.startswith(spec)


def test_no_spec_at_all() -> None:
    with pytest.raises(DataError, match="no source given"):
        texts()


def test_the_standard_library_splits_by_name_into_disjoint_parts() -> None:
    everything = dict(stdlib_documents("all"))
    train, valid = dict(stdlib_documents("train")), dict(stdlib_documents("valid"))
    assert not train.keys() & valid.keys()
    assert {**train, **valid} == everything
    assert list(everything) == sorted(everything)
    assert is_held_out("stdlib/csv.py") == ("stdlib/csv.py" in valid)
    assert len(valid) * 60 > len(everything)


def test_the_standard_library_holds_sources_and_manual_but_no_tests() -> None:
    found = dict(stdlib_documents("all"))
    assert "stdlib/argparse.py" in found
    assert any(name.startswith("stdlib/manual/") for name in found)
    parts = {part for name in found for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings"}
    assert not any("_sysconfigdata" in name for name in found)
    assert all(text.strip() for text in found.values())
