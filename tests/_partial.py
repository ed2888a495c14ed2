"""Partial bundles written with numpy alone, and the oracle of their cold rows.

V 40 tokens, L 4 layers (1 folded into 2, 3 dropped), D 8, K 5. Records are raw float32 draws that
have nothing to do with the FFNs, so that a row shows where it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tolkit_formats import BundleWriter, Manifest
from tolkit_formats.codecs import codec_from_json
from tolkit_formats.digests import array_digest, json_digest
from tolkit_formats.limits import NO_SLOT
from tolkit_formats.manifest import Encoding, HistoryEntry, LayerDigests, LayerStatus, Sources
from tolkit_formats.partial import Partial
from tolkit_formats.records import lay_out
from tolkit_formats.strict_json import canonical

V, L, D, K = 40, 4, 8, 5
LAYERS = (
    LayerStatus("kept"),
    LayerStatus("folded", 2),
    LayerStatus("kept"),
    LayerStatus("dropped"),
)
KEPT, EPS = (0, 2), 1e-5
PREFIX = "model.layers.{}.memory_"


@dataclass(frozen=True)
class TinyPartial:
    """A bundle on disk, its tokens with a record and what reading them gives, and all weights."""

    path: Path
    hot: np.ndarray
    rows_hKD: np.ndarray
    weights: dict[str, np.ndarray]
    embedding_VD: np.ndarray


def naive_row(weights: dict[str, np.ndarray], embedded_D: np.ndarray, layer: int) -> np.ndarray:
    """FFN(LN(e)) value by value, as SPEC section 5.1 writes it: float64 [D]."""
    norm, gate, up, down = (
        weights[PREFIX.format(layer) + name].astype(float)
        for name in (
            "layernorm.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
        )
    )
    e = embedded_D.astype(float)
    n = e / np.sqrt(sum(value * value for value in e) / len(e) + EPS) * norm
    inner = []
    for k in range(len(gate)):
        g = sum(gate[k, d] * n[d] for d in range(len(n)))
        u = sum(up[k, d] * n[d] for d in range(len(n)))
        inner.append(u * g / (1 + np.exp(-g)))
    return np.array([sum(down[d, k] * inner[k] for k in range(len(inner))) for d in range(len(n))])


def cold_row(tiny: TinyPartial, token: int) -> np.ndarray:
    """What a cold token's row is, [kept, D]: layer 1 is folded into 2, 3 is gone."""
    first, second, third = (
        naive_row(tiny.weights, tiny.embedding_VD[token], layer) for layer in (0, 1, 2)
    )
    return np.array([first, second + third])


def draw_weights(layers: Sequence[int] = range(L), seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {}
    for layer in layers:
        prefix = PREFIX.format(layer)
        weights[f"{prefix}layernorm.weight"] = rng.uniform(0.5, 1.5, D).astype(np.float32)
        for part, shape in (("gate", (K, D)), ("up", (K, D)), ("down", (D, K))):
            drawn = rng.standard_normal(shape).astype(np.float32)
            weights[f"{prefix}mlp.{part}_proj.weight"] = drawn
    return weights


def write_partial(
    path: Path, *, rows: int = 15, covered: float | None = 0.75, seed: int = 1
) -> TinyPartial:
    """A partial bundle of `rows` records; `seed` is that of the FFN weights alone."""
    rng = np.random.default_rng(0)
    hot = rng.permutation(V)[:rows]
    slots_V = np.full(V, NO_SLOT, np.uint32)
    slots_V[hot] = np.arange(rows, dtype=np.uint32)
    rows_hKD = rng.standard_normal((rows, len(KEPT), D)).astype(np.float32)
    embedding_VD = np.random.default_rng(2).standard_normal((V, D)).astype(np.float32)
    weights = draw_weights(seed=seed)
    config = {
        "model_type": "memoryllm",
        "architecture_kind": "memory",
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": L,
        "num_attention_heads": 1,
        "memory_intermediate_size": K,
        "rms_norm_eps": EPS,
    }
    codec = codec_from_json({"name": "raw", "dtype": "f32"}, D)
    tier = lay_out([(layer, codec) for layer in KEPT], rows)

    def digest(name: str) -> str:
        return array_digest("F32", weights[name].shape, [weights[name]])

    digests = []
    for layer in range(L):
        prefix = PREFIX.format(layer)
        ffn = [digest(f"{prefix}mlp.{part}_proj.weight") for part in ("gate", "up", "down")]
        digests.append(LayerDigests(digest(f"{prefix}layernorm.weight"), json_digest(ffn)))
    manifest = Manifest(
        vocab_size=V,
        num_layers=L,
        hidden_size=D,
        layers=LAYERS,
        tiers=(tier,),
        encoding=Encoding(False, KEPT),
        sources=Sources(
            array_digest("F32", (V, D), [embedding_VD]), None, json_digest(config), tuple(digests)
        ),
        files={},
        history=(HistoryEntry("compress", {"codec": "f32"}, None, "test"),),
        mapped_slots=True,
        partial=Partial(rows, covered),
    )
    with BundleWriter(path, fingerprint="test") as writer:
        writer.put_file("config.json", canonical(config))
        backbone = {"model.embed_tokens.weight": ("F32", embedding_VD)}
        writer.put_tensors("backbone.safetensors", backbone)
        needed = {n: ("F32", w) for n, w in weights.items() if not n.startswith(PREFIX.format(3))}
        writer.put_tensors("ffn.safetensors", needed)
        writer.put_tensors("tables/slots.safetensors", {"slots": ("U32", slots_V)})
        with writer.open_shard(tier, 0) as shard:
            records = np.zeros((rows, tier.stride), np.uint8)
            records[:, : tier.payload_bytes] = rows_hKD.reshape(rows, -1).view(np.uint8)
            shard.write(records)
        writer.publish(manifest)
    return TinyPartial(path, hot, rows_hKD, weights, embedding_VD)
