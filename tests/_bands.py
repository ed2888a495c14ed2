"""Bundles of codec `bands` in three tiers with predictions, written with numpy alone.

`write_bands` draws fields, codebooks, scales, bases and weights; the rows a reader must give are
worked out here from SPEC's words, bit by bit and in float64, so they are an oracle for the reader.

V vocabulary, L layers, D hidden, N rows, R rows of a basis, B bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _nano import NF4, draw_plane, nano_config, nano_tokenizer, refresh

from tolkit_formats import BundleWriter, Manifest
from tolkit_formats.codecs import codec_from_json
from tolkit_formats.digests import array_digest, json_digest, tokenizer_digest
from tolkit_formats.manifest import Encoding, HistoryEntry, LayerDigests, LayerStatus, Sources
from tolkit_formats.predictor import Predictor
from tolkit_formats.records import lay_out
from tolkit_formats.strict_json import canonical
from tolkit_formats.tensorfile import TensorFile, write_tensors

WIDTH = 12
TIER_ROWS = (20, 33, 11)
VOCAB_SIZE = sum(TIER_ROWS)
EMBEDDING = "model.embed_tokens.weight"

Shared = dict[str, tuple[str, np.ndarray]]


def field_bits(data: bytes, widths: Sequence[int]) -> list[int]:
    """Fields of these widths, the first in the highest bits: a loop over a string of bits."""
    bits = "".join(f"{byte:08b}" for byte in data)
    fields, at = [], 0
    for width in widths:
        fields.append(int(bits[at : at + width], 2) if width else 0)
        at += width
    return fields


def packed_bits(fields: Sequence[int], widths: Sequence[int]) -> bytes:
    """The inverse, zero bits to the end of the last byte."""
    bits = "".join(f"{f:0{w}b}" for f, w in zip(fields, widths, strict=True) if w)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


def runs_in(text: str) -> list[list[int]]:
    """[count, bits] of ``3x5 2x0``."""
    return [[int(number) for number in word.split("x")] for word in text.split()]


def widths_of(text: str, total: int) -> list[int]:
    """Bits of each of `total` coefficients."""
    widths = [bits for count, bits in runs_in(text) for _ in range(count)]
    return widths + [0] * (total - len(widths))


def draw_signed(
    rng: np.random.Generator, runs: Sequence[Sequence[int]], width: int
) -> tuple[bytes, np.ndarray]:
    """Packed rows of numbers -m..m, every row from a byte of its own; and the numbers."""
    packed, rows = b"", []
    for count, bits in runs:
        largest = (1 << (bits - 1)) - 1
        for _ in range(count):
            numbers = rng.integers(-largest, largest + 1, width)
            numbers[0], numbers[-1] = -largest, largest
            packed += packed_bits((numbers + largest).tolist(), [bits] * width)
            rows.append(numbers)
    return packed, np.array(rows).reshape(-1, width)


def draw_shared(
    rng: np.random.Generator, codecs: Sequence[Mapping[str, Any]], width: int
) -> Shared:
    """Shared arrays of one layer, whose tiers have `codecs`."""
    first = codecs[0]
    shared: Shared = {"mean": ("F16", rng.standard_normal(width).astype(np.float16))}
    if first["codebooks"]:
        books = [np.sort(rng.standard_normal(1 << bits)) for bits in first["codebooks"]]
        shared["codebooks"] = ("F16", np.concatenate(books).astype(np.float16))
    rank = width
    if first["basis"]:
        packed, numbers = draw_signed(rng, runs_in(first["basis"]), width)
        rank = len(numbers)
        shared["basis"] = ("U8", np.frombuffer(packed, np.uint8))
        shared["basis_scales"] = ("F16", rng.uniform(0.01, 0.1, rank).astype(np.float16))
    for codec in codecs:
        stored = sum(1 for bits in widths_of(codec["runs"], rank) if bits)
        if stored:
            scales = rng.uniform(0.1, 2.0, stored).astype(np.float16)
            shared[f"scales.{codec['tier']}"] = ("F16", scales)
    return shared


def sylvester(size: int) -> np.ndarray:
    """H of a power of two by its definition: the parity of common bits of row and column."""
    signs = [[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return np.array(signs, float) / size**0.5


def slow_row(codec: Mapping[str, Any], shared: Shared, data: bytes, width: int) -> np.ndarray:
    """One row in float64 from SPEC's words."""
    books, start = {}, 0
    for bits in codec["codebooks"]:
        books[bits] = shared["codebooks"][1][start : start + (1 << bits)].astype(float)
        start += 1 << bits
    if codec["basis"]:
        basis = slow_signed(shared["basis"][1].tobytes(), runs_in(codec["basis"]), width)
        basis = basis * shared["basis_scales"][1].astype(float)[:, None]
    else:
        size = max(n for n in (1 << k for k in range(17)) if width % n == 0)
        basis = np.kron(np.eye(width // size), sylvester(size))
    widths = widths_of(codec["runs"], len(basis))
    row, place = shared["mean"][1].astype(float), 0
    for r, field in enumerate(field_bits(data, widths)):
        if widths[r]:
            scale = float(shared[f"scales.{codec['tier']}"][1][place])
            row = row + books[widths[r]][field] * scale * basis[r]
            place += 1
    return row * 2.0 ** codec["exponent"]


def slow_signed(packed: bytes, runs: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Packed rows as numbers -m..m."""
    rows, at = [], 0
    for count, bits in runs:
        for _ in range(count):
            size = -(-bits * width // 8)
            fields = field_bits(packed[at : at + size], [bits] * width)
            rows.append([field - (1 << (bits - 1)) + 1 for field in fields])
            at += size
    return np.array(rows, float)


def draw_codes(rng: np.random.Generator, codec: Mapping[str, Any], rows: int, width: int) -> bytes:
    """Planes [rows x B] of drawn fields, padded to four bytes."""
    rank = sum(count for count, _ in runs_in(codec["basis"])) or width
    widths = widths_of(codec["runs"], rank)
    planes = b""
    for _ in range(rows):
        data = packed_bits([int(rng.integers(1 << bits)) for bits in widths], widths)
        planes += data + bytes(-len(data) % 4)
    return planes


def bands(
    runs: Sequence[Sequence[int]],
    *,
    tier: int = 0,
    codebooks: Sequence[int] | None = None,
    basis: Sequence[Sequence[int]] = (),
    exponent: int = 0,
) -> dict[str, Any]:
    """Manifest parameters; by default the codebooks that `runs` need."""
    return {
        "name": "bands",
        "tier": tier,
        "runs": " ".join(f"{count}x{bits}" for count, bits in runs),
        "codebooks": sorted({b for _, b in runs if b}) if codebooks is None else list(codebooks),
        "basis": " ".join(f"{count}x{bits}" for count, bits in basis),
        "exponent": exponent,
    }


@dataclass(frozen=True)
class BandsBundle:
    """A bundle on disk and what reading it must give."""

    path: Path
    rows_VKD: np.ndarray
    slot_of_token_V: np.ndarray


KLT = {"codebooks": [1, 3, 5], "basis": [[2, 8], [4, 6], [3, 4]], "exponent": -3}
LAYERS: tuple[tuple[dict[str, Any], ...], ...] = (
    (
        bands([[6, 5], [1, 0], [2, 3]], tier=0, **KLT),
        bands([[1, 3], [5, 1]], tier=1, **KLT),
        bands([], tier=2, **KLT),
    ),
    (
        bands([[12, 8]], tier=0, codebooks=[2, 8], exponent=2),
        bands([[5, 0], [1, 8]], tier=1, codebooks=[2, 8], exponent=2),
        bands([[2, 8], [2, 2]], tier=2, codebooks=[2, 8], exponent=2),
    ),
    (NF4, NF4, NF4),
)
PREDICTORS = {0: Predictor(WIDTH, 3, -2), 2: Predictor(WIDTH, 8, -9)}


def write_bands(path: Path, *, seed: int = 0) -> BandsBundle:
    """Layer 0 in a basis, 1 rotated, 2 nf4; 0 and 2 with predictions; slots by falling counts."""
    rng = np.random.default_rng(seed)
    counts_V = rng.integers(0, 1000, VOCAB_SIZE).astype(np.uint64)
    token_of_slot = np.array(sorted(range(VOCAB_SIZE), key=lambda i: (-int(counts_V[i]), i)))
    slots_V = np.argsort(token_of_slot).astype(np.uint32)
    embedding_VD = rng.standard_normal((VOCAB_SIZE, WIDTH)).astype(np.float16)
    embedding_VD[token_of_slot[3]] = 0
    tiers, first = [], 0
    for index, rows in enumerate(TIER_ROWS):
        codecs = [(i, codec_from_json(layer[index], WIDTH)) for i, layer in enumerate(LAYERS)]
        tiers.append(lay_out(codecs, rows, index=index, first_slot=first))
        first += rows
    shared, rows_VKD, planes = _draw(rng, embedding_VD, token_of_slot)
    config = nano_config(VOCAB_SIZE, len(LAYERS), WIDTH)
    tokenizer = nano_tokenizer(VOCAB_SIZE)
    manifest = Manifest(
        vocab_size=VOCAB_SIZE,
        num_layers=len(LAYERS),
        hidden_size=WIDTH,
        layers=(LayerStatus("kept"),) * len(LAYERS),
        tiers=tuple(tiers),
        encoding=Encoding(True, tuple(range(len(LAYERS)))),
        sources=Sources(
            array_digest("F16", embedding_VD.shape, [embedding_VD]),
            tokenizer_digest(tokenizer, VOCAB_SIZE),
            json_digest(config),
            (LayerDigests("0" * 64, "1" * 64),) * len(LAYERS),
        ),
        files={},
        history=(HistoryEntry("compress", {"seed": seed}, None, "test 1"),),
        mapped_slots=True,
        predictors=PREDICTORS,
    )
    with BundleWriter(path, fingerprint="bands") as writer:
        for tier in tiers:
            records = np.zeros((tier.num_rows, tier.stride), np.uint8)
            for place in tier.planes:
                plane_NB = planes[tier.index, place.layer]
                records[:, place.offset : place.offset + place.length] = plane_NB
            with writer.open_shard(tier, 0) as out:
                out.write(records)
        writer.put_file("config.json", canonical(config))
        writer.put_file("tokenizer.json", tokenizer)
        writer.put_file("tokenizer_config.json", b"{}\n")
        writer.put_tensors("backbone.safetensors", {EMBEDDING: ("F16", embedding_VD)})
        writer.put_tensors("tables/bases.safetensors", shared)
        writer.put_tensors("tables/slots.safetensors", {"slots": ("U32", slots_V)})
        writer.put_tensors("token_counts.safetensors", {"token_counts": ("U64", counts_V)})
        writer.publish(manifest)
    return BandsBundle(path, rows_VKD, slots_V)


def _draw(
    rng: np.random.Generator, embedding_VD: np.ndarray, token_of_slot: np.ndarray
) -> tuple[Shared, np.ndarray, dict[tuple[int, int], np.ndarray]]:
    """Shared arrays under their full names, rows by token, and planes by (tier, layer)."""
    shared: Shared = {}
    planes = {}
    rows_VKD = np.zeros((VOCAB_SIZE, len(LAYERS), WIDTH))
    for layer, codecs in enumerate(LAYERS):
        own: Shared = draw_shared(rng, codecs, WIDTH) if codecs[0]["name"] == "bands" else {}
        first = 0
        for index, (codec, rows) in enumerate(zip(codecs, TIER_ROWS, strict=True)):
            if own:
                data = draw_codes(rng, codec, rows, WIDTH)
                plane_NB = np.frombuffer(data, np.uint8).reshape(rows, -1)
                values = [slow_row(codec, own, row.tobytes(), WIDTH) for row in plane_NB]
            else:
                plane_NB, values, _ = draw_plane(codec, rows, WIDTH, rng)
            planes[index, layer] = plane_NB
            rows_VKD[token_of_slot[first : first + rows], layer] = values
            first += rows
        if layer in PREDICTORS:
            bits, exponent = PREDICTORS[layer].bits, PREDICTORS[layer].exponent
            packed, numbers = draw_signed(rng, [[WIDTH, bits]], WIDTH)
            scales = rng.uniform(0.05, 0.2, WIDTH).astype(np.float16)
            own["predictor"] = ("U8", np.frombuffer(packed, np.uint8))
            own["predictor_scales"] = ("F16", scales)
            weights = numbers * scales.astype(float)[:, None] * 2.0**exponent
            rows_VKD[:, layer] += slow_unit(embedding_VD) @ weights.T
        shared |= {f"layer.{layer}.{name}": array for name, array in own.items()}
    return shared, rows_VKD.astype(np.float32), planes


def slow_unit(embedding_VD: np.ndarray) -> np.ndarray:
    """Rows over their root mean square, in float64; rows of zeros stay."""
    rows = embedding_VD.astype(float)
    return np.array([row / (np.mean(row**2) ** 0.5 or 1.0) for row in rows])


def edit_arrays(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A damage: change the shared arrays, name -> (dtype, array), all digests made to fit."""

    def damage(path: Path) -> None:
        file = path / "tables" / "bases.safetensors"
        read = TensorFile(file)
        arrays = {key: (info.dtype, np.array(read.array(key))) for key, info in read.infos.items()}
        change(arrays)
        file.unlink()
        write_tensors(file, arrays)
        refresh(path)

    return damage


def edit_array(name: str, change: Callable[[np.ndarray], object]) -> Callable[[Path], object]:
    """A damage: change one shared array in place, all digests made to fit."""
    return edit_arrays(lambda arrays: change(arrays[name][1]))
