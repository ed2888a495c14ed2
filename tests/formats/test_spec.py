"""SPEC.md is what the code does: constants compared, and a reader written from the page alone."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _pico import pico_checkpoint

from tolkit.build import build
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.compress.spec import BandsWish
from tolkit.progress import SilentProgress
from tolkit_formats import FORMAT_VERSION, limits, open_bundle
from tolkit_formats.codecs.fourbit import CODE_ORDER, CODEBOOKS, DECISION_BOUNDS, GROUP_SIZES
from tolkit_formats.tensorfile import write_tensors

PAGE = (Path(__file__).parents[2] / "formats" / "SPEC.md").read_text()


def numbers_after(heading: str) -> list[float]:
    """The indented block that follows a line starting with `heading`."""
    (block,) = re.findall(rf"^{re.escape(heading)}[^\n]*\n\n((?:    [^\n]+\n)+)", PAGE, flags=re.M)
    return [float.fromhex(word) if "x" in word else float(word) for word in block.split()]


def test_constants_stand_on_the_page() -> None:
    assert numbers_after("codebook of nf4") == CODEBOOKS["nf4"].tolist()
    assert numbers_after("codebook of fp4") == CODEBOOKS["fp4"].tolist()
    assert numbers_after("decision bounds of nf4") == DECISION_BOUNDS["nf4"].tolist()
    bounds_and_order = numbers_after("decision bounds and code order of fp4")
    assert bounds_and_order[:15] == DECISION_BOUNDS["fp4"].tolist()
    assert tuple(bounds_and_order[15:]) == CODE_ORDER["fp4"]
    assert f"version {FORMAT_VERSION[0]}.{FORMAT_VERSION[1]}" in PAGE.splitlines()[0]
    sizes = [str(size) for size in GROUP_SIZES]
    assert f"`group_size` G: {', '.join(sizes[:-1])} or {sizes[-1]}" in PAGE


def test_limits_stand_on_the_page() -> None:
    assert limits.MAX_MANIFEST_BYTES == 4 << 20 and "4 MiB, nesting 16" in PAGE
    assert limits.MAX_JSON_DEPTH == 16 and limits.MAX_INTEGER == 2**53 - 1
    shape = (limits.MAX_VOCAB_SIZE, limits.MAX_HIDDEN_SIZE, limits.MAX_LAYERS)
    assert shape == (2**24, 65_536, 1_024) and "2^24, 65,536, 1,024" in PAGE
    assert limits.MAX_TENSOR_HEADER_BYTES == 1 << 20 and limits.MAX_SHARDS == 65_536
    assert limits.MAX_SHARD_BYTES == 1 << 30 and limits.BLOCK_ROWS == 1_024


class Bits:
    """Fields of a byte string, the first in the highest bits."""

    def __init__(self, data: bytes) -> None:
        self.left, self.number = 8 * len(data), int.from_bytes(data, "big")

    def take(self, bits: int) -> int:
        self.left -= bits
        return (self.number >> self.left) % (1 << bits)


class StrangersReader:
    """Rows of a bundle with struct, zlib and the page; slow, one value at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = (folder / "tol.json").read_text()
        self.manifest: dict[str, Any] = json.loads(text)
        assert json.dumps(self.manifest, sort_keys=True, indent=1, ensure_ascii=True) + "\n" == text
        without = {k: v for k, v in self.manifest.items() if k != "identity"}
        form = json.dumps(without, sort_keys=True, indent=1, ensure_ascii=True) + "\n"
        assert hashlib.sha256(form.encode()).hexdigest() == self.manifest["identity"]

    def tensor(self, name: str, key: str) -> tuple[list[int], bytes]:
        data = (self.folder / name).read_bytes()
        entry = self.manifest["files"][name]
        assert len(data) == entry["bytes"] and hashlib.sha256(data).hexdigest() == entry["sha256"]
        (length,) = struct.unpack("<Q", data[:8])
        info = json.loads(data[8 : 8 + length])[key]
        start, end = info["data_offsets"]
        return info["shape"], data[8 + length + start : 8 + length + end]

    def row(self, token: int) -> list[list[float]]:
        slot = token
        if self.manifest["slots"] == "mapped":
            _, slots = self.tensor("tables/slots.safetensors", "slots")
            (slot,) = struct.unpack_from("<I", slots, 4 * token)
        number, tier = next(
            (i, t)
            for i, t in enumerate(self.manifest["tiers"])
            if t["first_slot"] <= slot < t["first_slot"] + t["num_rows"]
        )
        shard, place = divmod(slot - tier["first_slot"], tier["rows_per_shard"])
        count = -(-tier["num_rows"] // tier["rows_per_shard"])
        name = f"tables/records-{number}-{shard + 1:05d}-of-{count:05d}.safetensors"
        _, data = self.tensor(name, "records")
        record = data[place * tier["stride"] : (place + 1) * tier["stride"]]
        (crc,) = struct.unpack("<I", record[-4:])
        assert crc == zlib.crc32(struct.pack("<I", slot) + record[:-4])
        width = self.manifest["hidden_size"]
        rows = []
        for plane in tier["planes"]:
            piece = record[plane["offset"] : plane["offset"] + plane["length"]]
            row = self.decode(plane["codec"], piece, width, plane["layer"])
            for predictor in self.manifest.get("predictors", []):
                if predictor["layer"] == plane["layer"]:
                    row = [
                        a + b for a, b in zip(row, self.predicted(predictor, token), strict=True)
                    ]
            rows.append(row)
        return rows

    def shared(self, layer: int, name: str) -> bytes:
        return self.tensor("tables/bases.safetensors", f"layer.{layer}.{name}")[1]

    def halves(self, layer: int, name: str) -> list[float]:
        data = self.shared(layer, name)
        return list(struct.unpack(f"<{len(data) // 2}e", data))

    def integers(self, data: bytes, count: int, bits: int, width: int) -> list[list[int]]:
        """Rows of integers -m..m, each from a byte of its own."""
        size = (bits * width + 7) // 8
        assert len(data) >= count * size
        rows = [Bits(data[i * size : (i + 1) * size]) for i in range(count)]
        return [[row.take(bits) - 2 ** (bits - 1) + 1 for _ in range(width)] for row in rows]

    def bands(self, codec: dict[str, Any], data: bytes, width: int, layer: int) -> list[float]:
        runs = [[int(n) for n in word.split("x")] for word in codec["runs"].split()]
        basis = [[int(n) for n in word.split("x")] for word in codec["basis"].split()]
        rank = sum(count for count, _ in basis) or width
        bits = [b for count, b in runs for _ in range(count)]
        bits += [0] * (rank - len(bits))
        books: dict[int, list[float]] = {}
        values = self.halves(layer, "codebooks") if codec["codebooks"] else []
        for b in codec["codebooks"]:
            books[b], values = values[: 2**b], values[2**b :]
        scales = iter(self.halves(layer, f"scales.{codec['tier']}") if any(bits) else [])
        codes = Bits(data)
        coeffs = [books[b][codes.take(b)] * next(scales) if b else 0.0 for b in bits]
        row = self.halves(layer, "mean")
        packed = self.shared(layer, "basis") if basis else b""
        rows: list[list[float]] = []
        for count, b in basis:
            rows += self.integers(packed, count, b, width)
            packed = packed[count * ((b * width + 7) // 8) :]
        assert not packed
        for r, coeff in enumerate(coeffs):
            line = self.turned(r, width)
            if basis:
                scale = self.halves(layer, "basis_scales")[r]
                line = [n * scale for n in rows[r]]
            row = [a + coeff * b for a, b in zip(row, line, strict=True)]
        return [value * 2.0 ** codec["exponent"] for value in row]

    def turned(self, r: int, width: int) -> list[float]:
        size = 1
        while width % (2 * size) == 0:
            size *= 2
        line = [0.0] * width
        for j in range(size):
            odd = (r % size & j).bit_count() % 2
            line[r // size * size + j] = (-1 if odd else 1) / size**0.5
        return line

    def predicted(self, predictor: dict[str, Any], token: int) -> list[float]:
        width = self.manifest["hidden_size"]
        name = "model.embed_tokens.weight"
        shape, weight = self.tensor("backbone.safetensors", name)
        size = 4 * width
        digest = hashlib.sha256(f"F32:{shape[0]}x{shape[1]}".encode() + b"\0" + weight)
        assert digest.hexdigest() == self.manifest["sources"]["embedding"]
        row = struct.unpack(f"<{width}f", weight[token * size : (token + 1) * size])
        mean = sum(value * value for value in row) / width
        unit = [value / mean**0.5 for value in row] if mean else list(row)
        layer, power = predictor["layer"], 2.0 ** predictor["exponent"]
        weights = self.integers(self.shared(layer, "predictor"), width, predictor["bits"], width)
        scales = self.halves(layer, "predictor_scales")
        return [
            sum(n * u for n, u in zip(line, unit, strict=True)) * scale * power
            for line, scale in zip(weights, scales, strict=True)
        ]

    def decode(self, codec: dict[str, Any], data: bytes, width: int, layer: int) -> list[float]:
        name = codec["name"]
        if name == "raw" and codec["dtype"] == "bf16":
            raw = struct.unpack(f"<{width}H", data[: 2 * width])
            return [struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in raw]
        if name == "raw":
            letter = {"f32": "f", "f16": "e"}[codec["dtype"]]
            return list(struct.unpack_from(f"<{width}{letter}", data))
        if name == "int8":
            (scale,) = struct.unpack_from("<e", data)
            return [
                float(np.float32(c) * np.float32(scale))
                for c in struct.unpack_from(f"<{width}b", data, 4)
            ]
        if name == "svd":
            coeffs = self.decode(codec["inner"], data, codec["rank"], layer)
            shape, raw_basis = self.tensor("tables/bases.safetensors", f"layer.{layer}.basis")
            basis = np.frombuffer(raw_basis, "<f2").reshape(shape).astype(np.float64)
            return list(np.array(coeffs) @ basis)
        if name == "bands":
            return self.bands(codec, data, width, layer)
        group = codec["group_size"]
        groups = -(-width // group)
        absmax = struct.unpack_from(f"<{groups}f", data)
        if name == "int4":
            book = [(c - 8) / 7 for c in range(16)]
        else:
            book = numbers_after(f"codebook of {name}")
        values = []
        for i in range(width):
            byte = data[4 * groups + i // 2]
            code = byte >> 4 if i % 2 == 0 else byte & 15
            values.append(float(np.float32(book[code]) * np.float32(absmax[i // group])))
        return values


@pytest.mark.parametrize("codec", ["f32", "f16", "bf16", "int8", "int4", "nf4", "fp4"])
@pytest.mark.parametrize("rank", [None, "13"])
def test_a_stranger_reads_the_same_rows(tmp_path: Path, codec: str, rank: str | None) -> None:
    checkpoint = pico_checkpoint(tmp_path / "ckpt", hidden_size=72, num_hidden_layers=3)
    compress(
        checkpoint,
        tmp_path / "b.tol",
        CompressSpec(rank=rank, codec=codec, drop=(1,)),
        progress=SilentProgress(),
    )
    stranger, bundle = StrangersReader(tmp_path / "b.tol"), open_bundle(tmp_path / "b.tol")
    for token in (0, 1, 47, 95):
        want = np.array(stranger.row(token))
        got = bundle.rows([token])[0].astype(np.float64)
        if rank is None:
            assert np.array_equal(got, want)
        else:
            norm = np.linalg.norm(want, axis=1, keepdims=True)
            assert (abs(got - want) <= 1e-6 * norm).all()


def test_a_stranger_reads_folded_tables(tmp_path: Path) -> None:
    checkpoint = pico_checkpoint(tmp_path / "ckpt", counts=False, num_hidden_layers=3)
    build(checkpoint, tmp_path / "b.tol", dtype="f32", progress=SilentProgress())
    drop_layers(tmp_path / "b.tol", tmp_path / "f.tol", DropSpec((0,)), progress=SilentProgress())
    raw, folded = StrangersReader(tmp_path / "b.tol"), StrangersReader(tmp_path / "f.tol")
    assert folded.manifest["layers"][0] == {"status": "folded", "into": 1}
    first, second, third = (np.array(row, np.float32) for row in raw.row(5))
    assert np.array_equal(np.array(folded.row(5), np.float32), [first + second, third])


def test_the_example_of_packing_on_the_page() -> None:
    found = re.search(r"Widths 1, 2 and 7 with codes 1, 0 and 5: bytes (0x\w\w) (0x\w\w)", PAGE)
    assert found is not None
    bits = Bits(bytes(int(word, 16) for word in found.groups()))
    assert [bits.take(1), bits.take(2), bits.take(7), bits.take(6)] == [1, 0, 5, 0]


@pytest.mark.parametrize("transform", ["klt", "hadamard"])
@pytest.mark.parametrize("predictor_bits", [0, 3])
def test_a_stranger_reads_bands(tmp_path: Path, transform: str, predictor_bits: int) -> None:
    checkpoint = pico_checkpoint(tmp_path / "ckpt", hidden_size=24, num_hidden_layers=3)
    counts = np.repeat([1000, 30, 1], 32).astype(np.uint64)
    write_tensors(checkpoint / "token_counts.safetensors", {"token_counts": ("U64", counts)})
    compress(
        checkpoint,
        tmp_path / "b.tol",
        CompressSpec(bits_per_value=9.0, bands=BandsWish(transform, predictor_bits), drop=(1,)),
        progress=SilentProgress(),
    )
    stranger, bundle = StrangersReader(tmp_path / "b.tol"), open_bundle(tmp_path / "b.tol")
    assert len(stranger.manifest["tiers"]) == 3
    assert len(stranger.manifest.get("predictors", [])) == (2 if predictor_bits else 0)
    for token in (0, 31, 32, 95):
        want = np.array(stranger.row(token))
        got = bundle.rows([token])[0].astype(np.float64)
        norm = np.linalg.norm(want, axis=1, keepdims=True)
        assert (abs(got - want) <= 1e-6 * norm).all()
