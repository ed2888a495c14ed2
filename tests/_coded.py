"""Bundles of entropy-coded rows made from drawn symbols, and the rows a reader must give.

The rows are worked out one value at a time from the page, so they are an oracle for the reader.
`stranger_symbols` reads records with struct, zlib and the naive coder alone.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _rans_oracle import drawn, naive_decode

from tolkit_formats import BundleWriter, Manifest
from tolkit_formats.codecs import Steps
from tolkit_formats.digests import json_digest
from tolkit_formats.entropy import Coding, stored_models, tier_coder
from tolkit_formats.manifest import Encoding, HistoryEntry, LayerDigests, LayerStatus, Sources
from tolkit_formats.rans import Models, normalised
from tolkit_formats.reader import shared_name
from tolkit_formats.records import lay_out
from tolkit_formats.strict_json import canonical

D = 8
BASIS = ((1, 8), (2, 4))  # 3 rows
OFFSETS = np.array([[0.1, 0.05, 0.0], [0.25, 0.125, 0.0625], [0.0, 0.0, 0.0]], np.float16)


def coded_models() -> Models:
    """A certain zero, a narrow model of three symbols and a wide one of seven."""
    weights = np.zeros((3, 7))
    weights[0, 0] = 1
    weights[1, :3] = 8, 1, 1
    weights[2] = 6, 4, 4, 2, 2, 1, 1
    return Models(normalised(weights))


@dataclass(frozen=True)
class Coded:
    """A bundle on disk, the symbols in it and the rows they stand for."""

    path: Path
    symbols: list[np.ndarray]  # of each tier [rows, positions]
    rows_VLD: np.ndarray


def write_coded(
    path: Path,
    *,
    tier_rows: tuple[int, ...] = (5, 12),
    counts: tuple[int, ...] = (3, 0, 2),
    hadamard: bool = False,
    lanes: int = 1,
    exponent: int = -2,
) -> Coded:
    """A bundle of len(counts) layers with so many coded coefficients each; 0 codes nothing.

    In the last tier of several the first layer codes one coefficient less.
    """
    rng = np.random.default_rng(7)
    models = coded_models()
    arrays = stored_models(models.freqs_KS)
    coding = Coding(lanes, 3, len(arrays["frequencies"]))
    stored: dict[str, tuple[str, np.ndarray]] = {
        "frequencies": ("U16", arrays["frequencies"]),
        "symbols": ("U8", arrays["symbols"]),
        "offsets": ("F16", OFFSETS),
    }
    basis = () if hadamard else BASIS
    codecs: list[list[Steps]] = []
    for layer, count in enumerate(counts):
        fewer = [count - (layer == 0 and t > 0 and count > 0) for t in range(len(tier_rows))]
        codecs.append(
            [Steps(D, t, len(tier_rows), n, basis, exponent) for t, n in enumerate(fewer)]
        )
        own: dict[str, tuple[str, np.ndarray]] = {
            "mean": ("F16", rng.standard_normal(D).astype(np.float16)),
            "steps": ("F32", np.geomspace(0.5, 0.125, len(tier_rows)).astype(np.float32)),
        }
        if not hadamard:
            own["basis"] = ("U8", _basis_bytes(rng))
            own["basis_scales"] = ("F16", np.array([0.01, 0.5, 0.25], np.float16))
        for t, n in enumerate(fewer):
            if n:
                own[f"classes.{t}"] = ("U8", np.array([2, 0, 1], np.uint8)[:n])
        stored |= {shared_name(layer, name): array for name, array in own.items()}
    tiers, coders, symbols, first_slot = [], [], [], 0
    for t, rows in enumerate(tier_rows):
        planes = [(layer, codec[t]) for layer, codec in enumerate(codecs)]
        tiers.append(lay_out(planes, rows, index=t, first_slot=first_slot, coded=True))
        classes = [
            stored[shared_name(layer, f"classes.{t}")][1] for layer, codec in planes if codec.count
        ]
        coders.append(tier_coder(models, classes, coding))
        symbols.append(drawn(rows, coders[-1].model_of_C, models, rng))
        first_slot += rows
    vocab_size = sum(tier_rows)
    config = {"model_type": "memoryllm", "vocab_size": vocab_size}
    digest = "0" * 64
    manifest = Manifest(
        vocab_size=vocab_size,
        num_layers=len(counts),
        hidden_size=D,
        layers=(LayerStatus("kept"),) * len(counts),
        tiers=tuple(tiers),
        encoding=Encoding(True, tuple(range(len(counts)))),
        sources=Sources(
            digest, None, json_digest(config), (LayerDigests(digest, digest),) * len(counts)
        ),
        files={},
        history=(HistoryEntry("compress", {}, None, "test"),),
        coding=coding,
    )
    with BundleWriter(path, fingerprint="test") as writer:
        writer.put_file("config.json", canonical(config))
        writer.put_tensors("backbone.safetensors", {"w": ("F32", np.zeros(2, np.float32))})
        for tier, coder, drawn_NC in zip(tiers, coders, symbols, strict=True):
            for shard in range(tier.num_shards):
                with writer.open_shard(tier, shard, coder) as out:
                    first = shard * tier.rows_per_shard
                    own_NC = drawn_NC[first : first + tier.shard_rows(shard)]
                    for start in range(0, len(own_NC), 512):
                        out.write(own_NC[start : start + 512])
        writer.put_tensors("tables/bases.safetensors", stored)
        writer.publish(manifest)
    rows = [_rows_by_hand(s, t, codecs, stored) for t, s in enumerate(symbols)]
    return Coded(path, symbols, np.concatenate(rows))


def _basis_bytes(rng: np.random.Generator) -> np.ndarray:
    wide = rng.integers(0, 255, 8, dtype=np.uint8)  # 0..254: 255 is no code
    narrow = rng.integers(0, 15, (2, 8), dtype=np.uint8)
    packed = narrow[:, ::2] << 4 | narrow[:, 1::2]
    return np.concatenate([wide, packed.reshape(-1)])


def _basis_by_hand(stored: dict[str, tuple[str, np.ndarray]], layer: int) -> np.ndarray:
    name = shared_name(layer, "basis")
    if name not in stored:
        signs = [[(-1) ** bin(i & j).count("1") for j in range(D)] for i in range(D)]
        return np.array(signs) / D**0.5
    data, scales = stored[name][1].tolist(), stored[shared_name(layer, "basis_scales")][1]
    rows = [[float(byte - 127) for byte in data[:8]]]
    for start in (8, 12):
        nibbles = [n for byte in data[start : start + 4] for n in (byte >> 4, byte & 15)]
        rows.append([float(n - 7) for n in nibbles])
    return np.array(rows) * scales.astype(np.float64)[:, None]


def _rows_by_hand(
    symbols: np.ndarray,
    tier: int,
    codecs: list[list[Steps]],
    stored: dict[str, tuple[str, np.ndarray]],
) -> np.ndarray:
    rows = np.zeros((len(symbols), len(codecs), D))
    place = 0
    for layer, per_tier in enumerate(codecs):
        codec = per_tier[tier]
        basis = _basis_by_hand(stored, layer)
        step = float(stored[shared_name(layer, "steps")][1][tier])
        mean = stored[shared_name(layer, "mean")][1].astype(np.float64)
        for n in range(len(symbols)):
            row = mean.copy()
            for c in range(codec.count):
                symbol = int(symbols[n, place + c])
                magnitude, sign = (symbol + 1) // 2, 1 if symbol % 2 else -1
                if magnitude:
                    group = int(stored[shared_name(layer, f"classes.{tier}")][1][c])
                    level = magnitude - float(OFFSETS[group, min(magnitude, 3) - 1])
                    row += sign * level * step * basis[c]
            rows[n, layer] = row * 2.0**codec.exponent
        place += codec.count
    return rows


def read_tensors(path: Path) -> dict[str, tuple[list[int], bytes]]:
    """Name -> (shape, bytes) of a safetensors file, with struct and json."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    return {
        name: (entry["shape"], body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def stranger_symbols(folder: Path) -> list[list[list[int]]]:
    """The symbols of every record of every tier, as someone reads them who has only the page."""
    manifest: dict[str, Any] = json.loads((folder / "tol.json").read_text())
    bases = read_tensors(folder / "tables" / "bases.safetensors")
    numbers = list(struct.unpack(f"<{bases['frequencies'][0][0]}H", bases["frequencies"][1]))
    tables = []
    for length in bases["symbols"][1]:
        tables.append(numbers[:length] + [0] * (max(bases["symbols"][1]) - length))
        numbers = numbers[length:]
    result = []
    for t, tier in enumerate(manifest["tiers"]):
        model_of: list[int] = []
        for plane in tier["planes"]:
            name = f"layer.{plane['layer']}.classes.{t}"
            model_of += list(bases[name][1]) if name in bases else []
        rows = []
        for path in sorted((folder / "tables").glob(f"records-{t}-*")):
            tensors = read_tensors(path)
            (count,), lengths = tensors["lengths"]
            at = 0
            for length in struct.unpack(f"<{count}H", lengths):
                record = tensors["records"][1][at : at + length]
                at += length
                slot = tier["first_slot"] + len(rows)
                crc = zlib.crc32(record[:-4], zlib.crc32(slot.to_bytes(4, "little")))
                assert crc == int.from_bytes(record[-4:], "little")
                lanes = manifest["coding"]["lanes"]
                rows.append(naive_decode(record[:-4], model_of, tables, lanes))
        result.append(rows)
    return result
