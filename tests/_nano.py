"""Bundles and checkpoints small enough to break thousands of times.

`write_nano` makes a bundle of any codecs through BundleWriter with numpy alone: codes and scales
are drawn, and the rows a reader must give are worked out here by hand, value by value, so they are
an oracle for the reader. `reseal` and `refresh` make a changed bundle consistent again, so that
the rule a change breaks is what is tested and not a digest. `nano_checkpoint` is a small memory
model for the commands (needs torch).

V vocabulary, L layers, D hidden, N rows, R rank, B bytes of a plane.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tolkit_formats import BundleWriter, Manifest, files
from tolkit_formats.codecs import codec_from_json
from tolkit_formats.codecs.fourbit import CODEBOOKS
from tolkit_formats.digests import json_digest, tokenizer_digest
from tolkit_formats.manifest import Encoding, HistoryEntry, LayerDigests, LayerStatus, Sources
from tolkit_formats.records import lay_out
from tolkit_formats.strict_json import canonical

RAW_F32: dict[str, Any] = {"name": "raw", "dtype": "f32"}
RAW_F16: dict[str, Any] = {"name": "raw", "dtype": "f16"}
RAW_BF16: dict[str, Any] = {"name": "raw", "dtype": "bf16"}
INT8: dict[str, Any] = {"name": "int8"}
INT4: dict[str, Any] = {"name": "int4", "group_size": 64}
NF4: dict[str, Any] = {"name": "nf4", "group_size": 64}
FP4: dict[str, Any] = {"name": "fp4", "group_size": 32}


def svd(rank: int, inner: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": "svd", "rank": rank, "inner": dict(inner)}


ALL_CODECS = (RAW_F32, RAW_F16, RAW_BF16, INT8, INT4, NF4, FP4, svd(4, RAW_F16), svd(5, NF4))
MIXED = (RAW_F16, INT8, NF4, svd(4, INT8))


@dataclass(frozen=True)
class Nano:
    """A bundle on disk and what reading it must give."""

    path: Path
    identity: str
    rows_VKD: np.ndarray
    counts_V: np.ndarray | None
    slot_of_token_V: np.ndarray | None


def nano_config(vocab_size: int, num_layers: int, hidden_size: int) -> dict[str, Any]:
    return {
        "architecture_kind": "memory",
        "hidden_size": hidden_size,
        "memory_intermediate_size": 12,
        "model_type": "memoryllm",
        "num_attention_heads": 1,
        "num_hidden_layers": num_layers,
        "vocab_size": vocab_size,
    }


def nano_tokenizer(vocab_size: int) -> bytes:
    """A word-level tokenizer of `vocab_size` tokens, the last two of them added ones."""
    vocabulary = {f"w{i}": i for i in range(vocab_size - 2)}
    added = [{"id": vocab_size - 2, "content": "<a>"}, {"id": vocab_size - 1, "content": "<b>"}]
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    return json.dumps({"version": "1.0", "added_tokens": added, "model": model}).encode()


def draw_plane(
    codec: Mapping[str, Any], num_rows: int, width: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Bytes U8 [N, B] of a drawn plane, the float32 rows they stand for, and its shared arrays.

    Written from SPEC's words, one row at a time, without the codec modules.
    """
    name = codec["name"]
    if name == "svd":
        plane, coeffs, _ = draw_plane(codec["inner"], num_rows, codec["rank"], rng)
        basis = rng.standard_normal((codec["rank"], width)).astype(np.float16)
        rows = [sum(c * b for c, b in zip(row, basis.astype(float), strict=True)) for row in coeffs]
        return plane, np.asarray(rows, np.float32).reshape(num_rows, width), {"basis": basis}
    planes, rows = [], []
    for _ in range(num_rows):
        if name == "raw":
            scales, codes, values = b"", *_draw_raw(codec["dtype"], width, rng)
        elif name == "int8":
            scale = np.float16(abs(rng.standard_normal()) / 64 + 1e-3)
            numbers = rng.integers(-127, 128, width).astype(np.int8)
            scales, codes = scale.tobytes(), numbers.tobytes()
            values = [np.float32(scale) * np.float32(n) for n in numbers]
        else:
            scales, codes, values = _draw_four_bit(name, codec["group_size"], width, rng)
        planes.append(_padded(scales) + _padded(codes))
        rows.append(values)
    plane = np.frombuffer(b"".join(planes), np.uint8).reshape(num_rows, -1)
    return plane, np.asarray(rows, np.float32).reshape(num_rows, width), {}


def _draw_raw(dtype: str, width: int, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    values = rng.standard_normal(width).astype(np.float32)
    if dtype == "f32":
        return values.tobytes(), values
    if dtype == "f16":
        return values.astype(np.float16).tobytes(), values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32) >> 16
    return bits.astype("<u2").tobytes(), (bits << 16).astype(np.uint32).view(np.float32)


def _draw_four_bit(
    name: str, group_size: int, width: int, rng: np.random.Generator
) -> tuple[bytes, bytes, list[np.float32]]:
    codes = rng.integers(1 if name == "int4" else 0, 16, width)
    scales = b""
    values = []
    for start in range(0, width, group_size):
        absmax = np.float32(abs(rng.standard_normal()) + 0.1)
        scales += absmax.tobytes()
        values += [CODEBOOKS[name][code] * absmax for code in codes[start : start + group_size]]
    nibbles = [*codes.tolist(), 0]
    packed = [nibbles[i] << 4 | nibbles[i + 1] for i in range(0, width, 2)]
    return scales, bytes(packed), values


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def write_nano(
    path: Path,
    codecs: Sequence[Mapping[str, Any]] = MIXED,
    *,
    vocab_size: int = 40,
    hidden_size: int = 24,
    gone: Mapping[int, int | None] | None = None,
    counts: bool = True,
    tokenizer: bool = True,
    max_shard_bytes: int = 1 << 30,
    seed: int = 0,
    force: bool = False,
    fingerprint: str = "nano",
) -> Nano:
    """Write a bundle with one layer for each of `codecs`.

    Args:
        gone: layers without a table: index -> the layer they are folded into, None for dropped.
        counts: store token counts, and records in the order of falling counts.
    """
    rng = np.random.default_rng(seed)
    gone = dict(gone or {})
    num_layers = len(codecs)
    kept = [i for i in range(num_layers) if i not in gone]
    drawn = {i: draw_plane(codecs[i], vocab_size, hidden_size, rng) for i in kept}
    tier = lay_out(
        [(i, codec_from_json(codecs[i], hidden_size)) for i in kept],
        vocab_size,
        max_shard_bytes=max_shard_bytes,
    )
    counts_V = slots_V = None
    by_slot = np.arange(vocab_size)
    if counts:
        counts_V = rng.integers(0, 1000, vocab_size).astype(np.uint64)
        by_slot = np.array(sorted(range(vocab_size), key=lambda i: (-int(counts_V[i]), i)))
        slots_V = np.empty(vocab_size, np.uint32)
        slots_V[by_slot] = np.arange(vocab_size)
    config = nano_config(vocab_size, num_layers, hidden_size)
    digest = hashlib.sha256(str(seed).encode()).hexdigest()
    manifest = Manifest(
        vocab_size=vocab_size,
        num_layers=num_layers,
        hidden_size=hidden_size,
        layers=tuple(
            LayerStatus("kept")
            if i in kept
            else LayerStatus("dropped" if gone[i] is None else "folded", gone[i])
            for i in range(num_layers)
        ),
        tiers=(tier,),
        encoding=Encoding(True, tuple(kept)),
        sources=Sources(
            digest,
            tokenizer_digest(nano_tokenizer(vocab_size), vocab_size) if tokenizer else None,
            json_digest(config),
            (LayerDigests(digest, digest),) * num_layers,
        ),
        files={},
        history=(HistoryEntry("build", {"dtype": "f16", "seed": seed}, None, "test 1"),),
        mapped_slots=counts,
    )
    shared = {
        f"layer.{i}.{name}": ("F16", array)
        for i, (_, _, arrays) in drawn.items()
        for name, array in arrays.items()
    }
    with BundleWriter(path, fingerprint=fingerprint, force=force) as writer:
        for shard in range(tier.num_shards):
            if writer.shard_done(tier, shard):
                continue
            first = shard * tier.rows_per_shard
            tokens = by_slot[first : first + tier.shard_rows(shard)]
            records = np.zeros((len(tokens), tier.stride), np.uint8)
            for place in tier.planes:
                plane = drawn[place.layer][0][tokens]
                records[:, place.offset : place.offset + place.length] = plane
            with writer.open_shard(tier, shard) as out:
                for start in range(0, len(records), 1000):
                    out.write(records[start : start + 1000])
        writer.put_file("config.json", canonical(config))
        if tokenizer:
            writer.put_file("tokenizer.json", nano_tokenizer(vocab_size))
            writer.put_file("tokenizer_config.json", b"{}\n")
        writer.put_file("README.md", b"# nano\n")
        backbone = rng.standard_normal((2, hidden_size)).astype(np.float32)
        writer.put_tensors("backbone.safetensors", {"w": ("F32", backbone)})
        if shared:
            writer.put_tensors("tables/bases.safetensors", shared)
        if slots_V is not None and counts_V is not None:
            writer.put_tensors("tables/slots.safetensors", {"slots": ("U32", slots_V)})
            writer.put_tensors("token_counts.safetensors", {"token_counts": ("U64", counts_V)})
        published = writer.publish(manifest)
    rows = np.zeros((vocab_size, len(kept), hidden_size), np.float32)
    for k, layer in enumerate(kept):
        rows[:, k] = drawn[layer][1]
    return Nano(path, published.identity, rows, counts_V, slots_V)


# Changing a finished bundle.


def seal_json(manifest: Mapping[str, Any]) -> bytes:
    """tol.json of a manifest with its identity worked out anew, without the library's help."""
    fields = {k: v for k, v in manifest.items() if k != "identity"}
    identity = hashlib.sha256(_plain_json(fields)).hexdigest()
    return _plain_json({**fields, "identity": identity})


def _plain_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the parsed tol.json of a bundle and give it a matching identity."""
    manifest = json.loads((path / "tol.json").read_bytes())
    change(manifest)
    (path / "tol.json").write_bytes(seal_json(manifest))


def tensor_bytes(tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> bytes:
    """A safetensors file by hand: name -> (dtype, shape, bytes)."""
    header, data = {}, b""
    for name, (dtype, shape, payload) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(payload)],
        }
        data += payload
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """Length prefix, header, data."""
    return struct.pack("<Q", len(header)) + header + data


def refresh(path: Path) -> None:
    """Make every digest of a changed bundle fit again: block digests, file list, identity."""
    tables = path / "tables"
    sums = {}
    for file in sorted(tables.iterdir()):
        if file.name != "checksums.safetensors":
            data = file.read_bytes()
            blocks = [data[i : i + (1 << 20)] for i in range(0, len(data), 1 << 20)]
            payload = b"".join(hashlib.sha256(block).digest() for block in blocks)
            sums[file.name] = ("U8", (len(blocks), 32), payload)
    (tables / "checksums.safetensors").write_bytes(tensor_bytes(sums))

    def list_files(manifest: dict[str, Any]) -> None:
        manifest["files"] = {
            str(file.relative_to(path)): {
                "bytes": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in sorted(path.rglob("*"))
            if file.is_file() and file.name not in ("tol.json", "quality.jsonl")
        }

    reseal(path, list_files)


def edit_record(path: Path, slot: int, change: Callable[[bytearray], object]) -> None:
    """Change one record of a one-shard bundle and give it a fitting CRC (not the digests)."""
    (shard,) = (path / "tables").glob("records-*")
    (tier,) = json.loads((path / "tol.json").read_bytes())["tiers"]
    data = bytearray(shard.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0] + slot * tier["stride"]
    record = data[start : start + tier["stride"]]
    change(record)
    record[-4:] = struct.pack("<I", zlib.crc32(record[:-4], zlib.crc32(struct.pack("<I", slot))))
    data[start : start + tier["stride"]] = record
    shard.write_bytes(data)


def assert_rows(got: np.ndarray, want: np.ndarray) -> None:
    """Within 1e-6 of each row's norm, as basis products of two readers may differ."""
    assert got.dtype == np.float32 and got.shape == want.shape
    norm = np.linalg.norm(want, axis=-1, keepdims=True)
    assert (np.abs(got - want) <= 1e-6 * norm).all()


def tree_bytes(path: Path) -> dict[str, bytes]:
    """Every file below `path` by relative name."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@contextmanager
def fault_hook(hook: Callable[[str, str], None]) -> Iterator[None]:
    """Call `hook(operation, path)` around every I/O call inside."""
    files.set_fault_hook(hook)
    try:
        yield
    finally:
        files.set_fault_hook(None)


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: only the time of these tests depends on the disk."""
    shm = Path("/dev/shm")
    place = shm if shm.is_dir() and os.access(shm, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="tolkit-test-", dir=place) as name:
        yield Path(name)


# A checkpoint for the commands.


def nano_checkpoint(
    path: Path, *, vocab_size: int = 96, seed: int = 0, counts: bool = True, **overrides: Any
) -> Path:
    """A memory model of L 3, D 16, K 24 with the pico tokenizer; returns `path`."""
    from _pico import pico_model, pico_tokenizer_files

    from tolkit.model import save_checkpoint

    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "memory_intermediate_size": 24,
    }
    model = pico_model("memory", seed=seed, **{**values, **overrides})
    counts_V = None
    if counts:
        ranks = np.random.default_rng(seed).permutation(vocab_size) + 1
        counts_V = (50_000 / ranks).astype(np.uint64)
    save_checkpoint(model, path, pico_tokenizer_files(), counts_V)
    return path
