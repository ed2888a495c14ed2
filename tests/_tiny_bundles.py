"""Tiny bundles written with numpy alone: raw float32 planes, so every row is known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tolkit_formats import BundleWriter, Manifest
from tolkit_formats.codecs import codec_from_json
from tolkit_formats.digests import json_digest
from tolkit_formats.limits import NO_SLOT
from tolkit_formats.manifest import Encoding, HistoryEntry, LayerDigests, LayerStatus, Sources
from tolkit_formats.reader import Bundle
from tolkit_formats.records import lay_out
from tolkit_formats.strict_json import canonical

V, L, D = 40, 3, 8


def known_rows(seed: int = 0) -> np.ndarray:
    """Float32 rows [V, L, D]."""
    return np.random.default_rng(seed).standard_normal((V, L, D)).astype(np.float32)


def stored_ids(bundle: Bundle) -> np.ndarray:
    """Tokens that have a record: all of them but in partial tables."""
    slots = bundle.slot_of_token
    return np.arange(bundle.vocab_size) if slots is None else np.flatnonzero(slots != NO_SLOT)


def write_bundle(
    path: Path, *, seed: int = 0, kept: Sequence[int] = (0, 1, 2), vocab_size: int = V
) -> Path:
    """A raw float32 bundle of `known_rows(seed)` with the `kept` layers; returns `path`."""
    codec = codec_from_json({"name": "raw", "dtype": "f32"}, D)
    tier = lay_out([(layer, codec) for layer in kept], vocab_size)
    config = {"model_type": "memoryllm", "vocab_size": vocab_size}
    digest = "0" * 64
    manifest = Manifest(
        vocab_size=vocab_size,
        num_layers=L,
        hidden_size=D,
        layers=tuple(LayerStatus("kept" if i in kept else "dropped") for i in range(L)),
        tiers=(tier,),
        encoding=Encoding(False, tuple(kept)),
        sources=Sources(digest, None, json_digest(config), (LayerDigests(digest, digest),) * L),
        files={},
        history=(HistoryEntry("build", {"dtype": "f32"}, None, "test"),),
    )
    with BundleWriter(path, fingerprint="test") as writer:
        writer.put_file("config.json", canonical(config))
        writer.put_tensors("backbone.safetensors", {"w": ("F32", np.zeros(2, np.float32))})
        with writer.open_shard(tier, 0) as shard:
            records = np.zeros((vocab_size, tier.stride), np.uint8)
            planes = np.ascontiguousarray(known_rows(seed)[:vocab_size, list(kept)])
            records[:, : tier.payload_bytes] = planes.reshape(vocab_size, -1).view(np.uint8)
            shard.write(records)
        writer.publish(manifest)
    return path
