"""Bundles of any size that take no disk: every record zero, in files with holes.

Checksums are not those of zeros, so open them with ``check_crc=False``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tolkit_formats import Manifest
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
from tolkit_formats.records import lay_out
from tolkit_formats.strict_json import canonical
from tolkit_formats.tensorfile import header_bytes, write_tensors


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
    digest = "0" * 64
    manifest = Manifest(
        vocab_size=vocab_size,
        num_layers=num_layers,
        hidden_size=hidden_size,
        layers=(LayerStatus("kept"),) * num_layers,
        tiers=(tier,),
        encoding=Encoding(False, tuple(range(num_layers))),
        sources=Sources(
            digest, None, json_digest(config), (LayerDigests(digest, digest),) * num_layers
        ),
        files={},
        history=(HistoryEntry("build", {}, None, "sparse"),),
    )
    listed = {
        str(file.relative_to(path)): FileEntry(file.stat().st_size, digest)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    (path / "tol.json").write_bytes(replace(manifest, files=listed).to_bytes()[0])
    return path
