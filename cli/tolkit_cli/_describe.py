"""A bundle's manifest in rows and words, for `tol inspect`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tolkit_cli._output import Column
from tolkit_cli._units import bytes_text

if TYPE_CHECKING:
    from tolkit_formats import Bundle, Manifest

__all__ = ["LAYER_COLUMNS", "layer_rows", "lineage_text", "record_bytes"]

LAYER_COLUMNS = (
    Column("layer", "layer"),
    Column("status", "status", right=False),
    Column("codec", "codec", right=False),
    Column("bytes_per_row", "bytes/row", lambda value: f"{value:,}"),
    Column("bits_per_value", "bits/value", lambda value: f"{value:.3f}"),
    Column("basis_bytes", "basis", bytes_text),
)


def layer_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """One row a layer of the source model. bits_per_value counts the layer's record bytes and
    basis over V x D; checksums and padding belong to no layer and count in the total only."""
    from tolkit_formats.codecs import codec_label

    rows: list[dict[str, Any]] = []
    kept = set(bundle.layer_ids)
    records = bundle.manifest.num_rows
    for layer, state in enumerate(bundle.manifest.layers):
        status = state.status if state.into is None else f"folded into {state.into}"
        row: dict[str, Any] = {"layer": layer, "status": status}
        if layer in kept:
            codec = bundle.plane_codec(layer)
            row["codec"] = codec_label(codec)
            row["basis_bytes"] = _shared_bytes(codec.shared_shapes()) or None
            if bundle.manifest.coding is not None:  # a row's bytes are those of all layers
                rows.append(row)
                continue
            row["bytes_per_row"] = sum(codec.segments())
            stored = row["bytes_per_row"] * records + (row["basis_bytes"] or 0)
            row["bits_per_value"] = 8 * stored / (bundle.vocab_size * bundle.hidden_size)
        rows.append(row)
    return rows


def record_bytes(manifest: Manifest) -> list[int]:
    """Bytes of a record in each tier; where they are entropy-coded the mean, rounded up."""
    sizes = []
    for tier in manifest.tiers:
        names = [f"tables/{tier.shard_name(shard)}" for shard in range(tier.num_shards)]
        mean = -(-sum(manifest.files[name].size_bytes for name in names) // tier.num_rows)
        sizes.append(mean if tier.coded else tier.stride)
    return sizes


def lineage_text(manifest: Manifest) -> str:
    """The commands that made it, oldest first: "build, compress, drop-layers"."""
    return ", ".join(step.command for step in manifest.history)


def _shared_bytes(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    from tolkit_formats.tensorfile import ITEM_BYTES

    return sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in shapes.values())
