"""Safetensors files, read with suspicion and written as a stream.

The header is parsed here, not by the safetensors package, because that package accepts a
duplicate name (the last wins) and reads no bf16 in numpy (measured with 0.8.0). Layout: 8-byte
little-endian header length, JSON header starting with ``{`` and padded with spaces, then the
tensors without holes, in the order of their offsets, to the end of the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tolkit_formats import files, strict_json
from tolkit_formats.errors import BundleError
from tolkit_formats.limits import MAX_INTEGER, MAX_TENSOR_HEADER_BYTES

__all__ = [
    "ITEM_BYTES",
    "TensorFile",
    "TensorInfo",
    "TensorStream",
    "header_bytes",
    "read_header",
    "write_tensors",
]

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_NUMPY = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "F16": "<f2",
    "BF16": "<u2", "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8",
    "F64": "<f8",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,255}\Z")
_ALIGN = 64


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype in safetensors' spelling, byte range within the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(
    path: Path, *, max_header_bytes: int = MAX_TENSOR_HEADER_BYTES
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (in file order) and metadata of a safetensors file.

    Raises:
        BundleError: any deviation from the layout above; the message names file and tensor.
        InputError: not a regular file.
    """
    files.require_regular(path)
    return _parse_header(files.map_bytes(path), path, max_header_bytes)


def _parse_header(
    data: npt.NDArray[np.uint8], path: Path, max_header_bytes: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size_bytes = len(data)
    if size_bytes < 10:
        raise BundleError(f"{path}: {size_bytes} bytes, too short for a safetensors header")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    if length > max_header_bytes:
        raise BundleError(f"{path}: header of {length:,} bytes, limit {max_header_bytes:,}")
    if length < 2 or 8 + length > size_bytes:
        raise BundleError(f"{path}: header of {length:,} bytes in a file of {size_bytes:,}")
    raw = data[8 : 8 + length].tobytes()
    if raw[:1] != b"{":
        raise BundleError(f"{path}: header does not start with '{{'")
    if not raw.rstrip(b" ").endswith(b"}"):
        raise BundleError(f"{path}: header is not closed by '}}' and spaces")
    header = strict_json.parse(raw, f"{path}: header", max_depth=4)
    metadata = _metadata(header.pop("__metadata__", {}), path)
    infos = [(name, _entry(name, entry, 8 + length, path)) for name, entry in header.items()]
    infos.sort(key=lambda item: (item[1].start, item[1].end))
    position = 8 + length
    for name, info in infos:
        if info.start != position:
            raise BundleError(
                f"{path}: tensor {name!r} starts at byte {info.start}, expected {position} "
                "(hole or overlap)"
            )
        position = info.end
    if position != size_bytes:
        raise BundleError(f"{path}: {size_bytes:,} bytes, tensors end at byte {position:,}")
    return dict(infos), metadata


def _metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise BundleError(f"{path}: __metadata__ must map strings to strings")
    return value


def _entry(name: str, entry: object, data_start: int, path: Path) -> TensorInfo:
    where = f"{path}: tensor {name[:80]!r}"
    if not _NAME.match(name) or ".." in name:
        raise BundleError(f"{where}: name not allowed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BundleError(f"{where}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BundleError(f"{where}: unknown dtype {str(dtype)[:20]!r}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_size, shape)):
        raise BundleError(f"{where}: shape must be up to 8 non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise BundleError(f"{where}: data_offsets must be two non-negative integers")
    if math.prod(max(1, n) for n in shape) * ITEM_BYTES[dtype] > MAX_INTEGER:
        # Also where an axis of 0 hides it: numpy cannot make such a shape.
        raise BundleError(f"{where}: shape {shape} is too large")
    start, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != expected:
        raise BundleError(
            f"{where}: {end - start} bytes, expected {expected} for {dtype} {list(shape)}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + end)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class TensorFile:
    """A safetensors file with its tensors mapped read-only.

    The file is opened once: header and tensors are of one generation even if it is replaced.

    Args:
        path: the file.
        random_access: advise the kernel that rows will be read in no order.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_header_bytes: int = MAX_TENSOR_HEADER_BYTES,
        random_access: bool = False,
    ) -> None:
        self.path = Path(path)
        files.require_regular(self.path)
        self._bytes = files.map_bytes(self.path, random_access=random_access)
        self.infos, self.metadata = _parse_header(self._bytes, self.path, max_header_bytes)

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in file order."""
        return tuple(self.infos)

    def block_sha256(self, start: int = 0, stop: int | None = None) -> bytes:
        """SHA-256 of the file's bytes `start`..`stop` as mapped, by default of all of them."""
        return hashlib.sha256(files.bytes_view(self._bytes)[start:stop]).digest()

    @property
    def size_bytes(self) -> int:
        """Size of the file when it was opened."""
        return len(self._bytes)

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """The tensor as a read-only mapped array; BF16 comes as its uint16 bit patterns."""
        info = self.infos.get(name)
        if info is None:
            raise BundleError(f"{self.path}: tensor {name!r} is missing")
        raw = self._bytes[info.start : info.end]
        return raw.view(_NUMPY[info.dtype]).reshape(info.shape)

    def expect(self, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
        """`array(name)`, or BundleError when dtype or shape differ from what the caller needs."""
        info = self.infos.get(name)
        if info is not None and (info.dtype, info.shape) != (dtype, shape):
            raise BundleError(
                f"{self.path}: tensor {name!r} is {info.dtype} {list(info.shape)}, "
                f"expected {dtype} {list(shape)}"
            )
        return self.array(name)


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length prefix and header for `(name, dtype, shape)` in the order their data will follow."""
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    for name, dtype, shape in tensors:
        assert _NAME.match(name) and ".." not in name, name
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    raw += b" " * (-(8 + len(raw)) % _ALIGN)
    return struct.pack("<Q", len(raw)) + raw


class TensorStream:
    """Writes one safetensors file front to back without holding a tensor whole.

    Give the directory first, then the bytes of each tensor in that order.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        directory = list(tensors)
        head = header_bytes(directory, metadata)
        self.total_bytes = len(head) + sum(
            math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in directory
        )
        self._writer = files.FileWriter(path, expected_bytes=self.total_bytes)
        self._writer.write(head)

    def write(self, data: files.Buffer) -> None:
        """Append the next bytes."""
        self._writer.write(data)

    def close(self) -> None:
        """Fsync and close; the directory must be filled exactly."""
        assert self._writer.written_bytes == self.total_bytes, (
            f"{self._writer.path}: {self._writer.written_bytes} of {self.total_bytes} bytes written"
        )
        self._writer.close()

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, tb: object) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.__exit__(kind, None, None)


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[str, npt.NDArray[np.generic]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write whole arrays as a safetensors file, names sorted, through a fsynced temporary file.

    Args:
        tensors: name -> (dtype in safetensors' spelling, array; for BF16 its uint16 bits).
    """
    path = Path(path)
    items = sorted(tensors.items())
    directory = [(name, dtype, tuple(array.shape)) for name, (dtype, array) in items]
    with files.replacing(path) as temporary, TensorStream(temporary, directory, metadata) as stream:
        for _, (dtype, array) in items:
            assert array.dtype.itemsize == ITEM_BYTES[dtype], (dtype, array.dtype)
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
