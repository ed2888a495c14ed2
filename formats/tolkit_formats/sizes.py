"""Bytes under tables/ before anything is written: what `bytes` and a budget mean, to the byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tolkit_formats.entropy import length_dtype
from tolkit_formats.limits import CHECKSUM_BLOCK_BYTES
from tolkit_formats.records import Tier
from tolkit_formats.tensorfile import ITEM_BYTES, header_bytes

__all__ = [
    "SharedShapes",
    "coded_file_bytes",
    "coded_shard_bytes",
    "table_bytes",
    "tensor_file_bytes",
]

SharedShapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Full names in tables/bases.safetensors -> dtype and shape."""


def tensor_file_bytes(tensors: SharedShapes) -> int:
    """Size of the file `write_tensors` makes of these arrays."""
    directory = [(name, dtype, shape) for name, (dtype, shape) in sorted(tensors.items())]
    data = sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in tensors.values())
    return len(header_bytes(directory)) + data


def table_bytes(
    tiers: Sequence[Tier],
    shared: SharedShapes,
    *,
    mapped_vocab_size: int | None,
    shard_bytes: Mapping[str, int] | None = None,
) -> int:
    """All files under tables/: shards, shared arrays, slots, checksums.

    Args:
        mapped_vocab_size: V where there is a slot map, None where slot = token id.
        shard_bytes: of the files of coded tiers, by name.
    """
    files: dict[str, int] = {}
    for tier in tiers:
        for shard in range(tier.num_shards):
            name = tier.shard_name(shard)
            if tier.coded:
                assert shard_bytes is not None, "how long coded records are is known to the caller"
                files[name] = shard_bytes[name]
                continue
            shape = (tier.shard_rows(shard), tier.stride)
            files[name] = tensor_file_bytes({"records": ("U8", shape)})
    if shared:
        files["bases.safetensors"] = tensor_file_bytes(shared)
    if mapped_vocab_size is not None:
        slots: SharedShapes = {"slots": ("U32", (mapped_vocab_size,))}
        files["slots.safetensors"] = tensor_file_bytes(slots)
    blocks = {name: -(-size // CHECKSUM_BLOCK_BYTES) for name, size in files.items()}
    checksums = {name: ("U8", (count, 32)) for name, count in blocks.items()}
    return sum(files.values()) + tensor_file_bytes(checksums)


def coded_shard_bytes(tier: Tier, mean_record_bytes: float) -> dict[str, int]:
    """File name -> bytes of a coded tier's shards, if records have this mean length."""
    sizes = {}
    for shard in range(tier.num_shards):
        record_bytes = round(tier.shard_rows(shard) * mean_record_bytes)
        sizes[tier.shard_name(shard)] = coded_file_bytes(tier, shard, record_bytes)
    return sizes


def coded_file_bytes(tier: Tier, shard: int, record_bytes: int) -> int:
    """Bytes of a coded tier's shard whose records, checksums included, take that much together."""
    shapes: SharedShapes = {
        "lengths": (length_dtype(tier.stride), (tier.shard_rows(shard),)),
        "records": ("U8", (record_bytes,)),
    }
    return tensor_file_bytes(shapes)
