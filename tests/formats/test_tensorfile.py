"""Safetensors files: equal to the safetensors package on valid ones, stricter on the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _nano import tensor_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load, save

from tolkit_formats.errors import BundleError, InputError
from tolkit_formats.tensorfile import (
    ITEM_BYTES,
    TensorFile,
    TensorStream,
    read_header,
    write_tensors,
)

DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
    "F16": np.float16, "U32": np.uint32, "I32": np.int32, "F32": np.float32,
    "U64": np.uint64, "I64": np.int64, "F64": np.float64,
}  # fmt: skip
SHAPES = [(), (1,), (0,), (3, 0, 2), (5,), (2, 3), (1, 2, 3, 4)]


def arrays(seed: int) -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    result = {}
    for i, (dtype, kind) in enumerate(DTYPES.items()):
        shape = SHAPES[i % len(SHAPES)]
        values = np.asarray(rng.random(shape) * 100)
        result[f"layer.{i}.{dtype.lower()}"] = (dtype, np.asarray(values.astype(kind)))
    return result


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    tensors = arrays(0)
    write_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    with safe_open(tmp_path / "a.safetensors", "numpy") as peer:
        assert sorted(peer.keys()) == sorted(tensors)
        assert peer.metadata() == {"format": "pt"}
        for name, (_, array) in tensors.items():
            np.testing.assert_array_equal(peer.get_tensor(name), array)


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    tensors = {name: array for name, (_, array) in arrays(1).items()}
    (tmp_path / "a.safetensors").write_bytes(save(tensors, {"format": "np"}))
    file = TensorFile(tmp_path / "a.safetensors")
    assert sorted(file.names) == sorted(tensors) and file.metadata == {"format": "np"}
    for name, array in tensors.items():
        got = file.array(name)
        assert got.dtype == array.dtype and got.shape == array.shape
        np.testing.assert_array_equal(got, array)
        assert not got.flags.writeable


@given(
    st.dictionaries(
        st.from_regex(r"[a-z0-9][a-z0-9._]{0,20}", fullmatch=True).filter(lambda s: ".." not in s),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_round_trip_agrees_with_the_package(
    tmp_path_factory: pytest.TempPathFactory, directory: dict[str, tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("t") / "a.safetensors"
    rng = np.random.default_rng(len(directory))
    tensors = {
        name: (dtype, (rng.random(shape) * 50).astype(DTYPES[dtype]))
        for name, (dtype, shape) in directory.items()
    }
    write_tensors(path, tensors)
    theirs, ours = load(path.read_bytes()), TensorFile(path)
    assert set(theirs) == set(ours.names)
    for name, (dtype, array) in tensors.items():
        np.testing.assert_array_equal(ours.expect(name, dtype, array.shape), theirs[name])


def test_bf16_comes_as_bit_patterns(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)
    write_tensors(tmp_path / "a.safetensors", {"w": ("BF16", bits)})
    np.testing.assert_array_equal(TensorFile(tmp_path / "a.safetensors").array("w"), bits)


def test_same_tensors_give_the_same_bytes_with_an_aligned_header(tmp_path: Path) -> None:
    tensors = arrays(2)
    write_tensors(tmp_path / "a.safetensors", tensors, {"b": "2", "a": "1"})
    write_tensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())), {"a": "1", "b": "2"})
    data = (tmp_path / "a.safetensors").read_bytes()
    assert data == (tmp_path / "b.safetensors").read_bytes()
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_expect_names_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w": ("F32", np.zeros((2, 3), np.float32))})
    file = TensorFile(path)
    for name, dtype, shape, words in (
        ("w", "F32", (3, 2), ["'w'", "F32 [2, 3]", "F32 [3, 2]"]),
        ("w", "F16", (2, 3), ["'w'", "F32 [2, 3]", "F16 [2, 3]"]),
        ("v", "F32", (2, 3), ["'v'", "missing"]),
    ):
        with pytest.raises(BundleError) as caught:
            file.expect(name, dtype, shape)
        assert all(word in caught.value.message for word in [str(path), *words])


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(tensor_bytes({}) + b"")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "folder").mkdir()
    for name, word in (("link", "link"), ("folder", "not a regular"), ("gone", "no such file")):
        with pytest.raises(InputError, match=word):
            read_header(tmp_path / name)


def test_stream_must_be_filled_exactly(tmp_path: Path) -> None:
    stream = TensorStream(tmp_path / "a", [("w", "U8", (4,))])
    stream.write(b"123")
    with pytest.raises(AssertionError, match="bytes written"):
        stream.close()


def test_item_bytes_are_numpys() -> None:
    for dtype, kind in DTYPES.items():
        assert ITEM_BYTES[dtype] == np.dtype(kind).itemsize
    assert ITEM_BYTES["BF16"] == 2
