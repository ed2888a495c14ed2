"""Bundles of any size that take no disk: every record zero, in files with holes.

Checksums are not those of zeros, so open them with ``check_crc=False``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tolkit_formats import BundleWriter, Manifest
from tolkit_formats.codecs import codec_from_json
from tolkit_formats.digests import json_digest
from tolkit_formats.manifest import (
    Encoding,
    FileEntry,
    HistoryEntry,
    LayerDigests,
    LayerStatus,
    Sources,
)
from tolkit_formats.records import Tier, lay_out
from tolkit_formats.strict_json import canonical
from tolkit_formats.tensorfile import header_bytes, write_tensors

NO_DIGEST = "0" * 64


def write_sparse(
    path: Path, codec: Mapping[str, Any], *, vocab_size: int, num_layers: int, hidden_size: int
) -> Path:
    """A bundle of one codec without shared arrays; returns `path`."""
    tables = path / "tables"
    tables.mkdir(parents=True)
    stored = codec_from_json(codec, hidden_size)
    tier = lay_out([(layer, stored) for layer in range(num_layers)], vocab_size)
    for shard in range(tier.num_shards):
        header = header_bytes([("records", "U8", (tier.shard_rows(shard), tier.stride))])
        with (tables / tier.shard_name(shard)).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + tier.shard_rows(shard) * tier.stride)
    write_tensors(tables / "checksums.safetensors", {"none": ("U8", np.zeros(1, np.uint8))})
    write_tensors(path / "backbone.safetensors", {"none": ("U8", np.zeros(1, np.uint8))})
    config = {"model_type": "memoryllm", "vocab_size": vocab_size}
    (path / "config.json").write_bytes(canonical(config))
    manifest = _manifest(tier, hidden_size, config, "sparse")
    listed = {
        str(file.relative_to(path)): FileEntry(file.stat().st_size, NO_DIGEST)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    (path / "tol.json").write_bytes(replace(manifest, files=listed).to_bytes()[0])
    return path


def write_drawn(
    path: Path, codec: Mapping[str, Any], *, vocab_size: int, num_layers: int, hidden_size: int
) -> Path:
    """A real bundle of drawn bytes, every layer with its own basis; returns `path`."""
    rng = np.random.default_rng(0)
    stored = codec_from_json(codec, hidden_size)
    tier = lay_out([(layer, stored) for layer in range(num_layers)], vocab_size)
    config = {"model_type": "memoryllm", "vocab_size": vocab_size}
    manifest = _manifest(tier, hidden_size, config, "drawn")
    with BundleWriter(path, fingerprint="drawn") as writer:
        writer.put_file("config.json", canonical(config))
        writer.put_tensors("backbone.safetensors", {"w": ("F32", np.zeros(2, np.float32))})
        with writer.open_shard(tier, 0) as out:
            for first in range(0, vocab_size, 512):
                rows = min(512, vocab_size - first)
                out.write(_drawn_records(rng, tier, rows))
        shared = {
            f"layer.{layer}.{name}": (dtype, _drawn_array(rng, dtype, shape))
            for layer in range(num_layers)
            for name, (dtype, shape) in stored.shared_shapes().items()
        }
        if shared:
            writer.put_tensors("tables/bases.safetensors", shared)
        writer.publish(manifest)
    return path


def _manifest(tier: Tier, hidden_size: int, config: Mapping[str, Any], tool: str) -> Manifest:
    """Every layer kept, in one tier; sources that no digest fits, files still to be listed."""
    num_layers = len(tier.planes)
    layer = LayerDigests(NO_DIGEST, NO_DIGEST)
    return Manifest(
        vocab_size=tier.num_rows,
        num_layers=num_layers,
        hidden_size=hidden_size,
        layers=(LayerStatus("kept"),) * num_layers,
        tiers=(tier,),
        encoding=Encoding(False, tuple(range(num_layers))),
        sources=Sources(NO_DIGEST, None, json_digest(config), (layer,) * num_layers),
        files={},
        history=(HistoryEntry("build", {}, None, tool),),
    )


def _drawn_records(rng: np.random.Generator, tier: Tier, rows: int) -> np.ndarray:
    """Bytes below 64: as scales or values they are finite, as codes they are allowed."""
    records = np.zeros((rows, tier.stride), np.uint8)
    drawn = rng.integers(16, 60, (rows, tier.payload_bytes), dtype=np.uint8)
    records[:, : tier.payload_bytes] = drawn
    return records


def _drawn_array(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == "U8":
        return rng.integers(0, 256, shape, dtype=np.uint8) & 0x55  # no packed field is all ones
    values = np.sort(rng.uniform(0.01, 0.1, shape), axis=-1)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype])
