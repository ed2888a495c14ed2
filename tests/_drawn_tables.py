"""Tables of any shape and codec without a bundle on disk, for measuring look-ups and trying shapes.

`DrawnBundle` answers what the runtime asks an open bundle: codes and shared arrays are drawn,
scales are ones a codec could have. V vocabulary, L layers, D hidden, S record stride.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tolkit_formats.codecs import Bands, Codec, FourBit, Int8, Raw, Steps, Svd
from tolkit_formats.codecs.expansion import MAX_WIDTH
from tolkit_formats.records import Tier, lay_out

CLASSES, SYMBOLS = 8, 31

Arrays = Mapping[str, np.ndarray]


def shapes_of_codecs(width: int) -> dict[str, Codec]:
    """The codecs worth measuring at a hidden size, by the name in the report."""
    half, eighth = width // 2, width // 8
    basis = ((eighth, 8), (width - eighth, 5))
    runs = ((eighth, 5), (eighth, 3), (half - 2 * eighth, 1))
    return {
        "f16": Raw(width, "f16"),
        "int8": Int8(width),
        "int4": FourBit("int4", width),
        "nf4": FourBit("nf4", width),
        "fp4": FourBit("fp4", width),
        "rank 1/4 x int8": Svd(width, Int8(width // 4)),
        "rank 1/4 x nf4": Svd(width, FourBit("nf4", width // 4)),
        "bands": Bands(width, 0, runs, (1, 3, 5), basis),
        "bands hadamard": Bands(width, 0, runs, (1, 3, 5), ()),
        "steps": Steps(width, 0, 1, half, basis),
        "steps in two symbols": Steps(width, 0, 1, half, basis, 0, ((eighth, 3), (1, 0), (2, 7))),
        "steps hadamard": Steps(width, 0, 1, half, (), -1, ((eighth, 1),)),
    }


@dataclass(frozen=True)
class _Manifest:
    tiers: tuple[Tier, ...]
    predictors: Mapping[int, Any]


class _Shards:
    def __init__(self, records_VS: np.ndarray) -> None:
        self._records_VS = records_VS

    def take(self, tier: Tier, slots: np.ndarray) -> np.ndarray:
        return self._records_VS[slots]


class DrawnBundle:
    """L equal planes of one codec, slots in drawn order; see the module."""

    path = Path("drawn.tol")

    def __init__(self, codec: Codec, *, vocab_size: int, num_layers: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.codec = codec
        self.vocab_size, self.hidden_size = vocab_size, codec.width
        self.num_layers = num_layers
        self.layer_ids = tuple(range(num_layers))
        coded = isinstance(codec, Steps)
        tier = lay_out([(layer, codec) for layer in self.layer_ids], vocab_size, coded=coded)
        self.manifest = _Manifest((tier,), {})
        self.slot_of_token = rng.permutation(vocab_size).astype(np.uint32)
        self.table_bytes = vocab_size * tier.stride
        records_VS = rng.integers(0, SYMBOLS if coded else 256, (vocab_size, tier.stride), np.uint8)
        for plane in tier.planes:
            _legal_scales(codec, records_VS[:, plane.offset : plane.offset + plane.length], rng)
        self.shards = _Shards(records_VS)
        self.common: Arrays = {}
        if coded:
            offsets = rng.uniform(0, 0.25, (CLASSES, 3)).astype(np.float16)
            self.common = {"symbols": np.full(CLASSES, SYMBOLS, np.uint8), "offsets": offsets}
        self._shared = {layer: _drawn_shared(codec, rng) for layer in self.layer_ids}

    def shared(self, layer: int) -> Arrays:
        return self._shared[layer]

    def predictor_weights(self, layer: int) -> None:
        return None


def _legal_scales(codec: Codec, plane_VB: np.ndarray, rng: np.random.Generator) -> None:
    if isinstance(codec, Svd):
        _legal_scales(codec.inner, plane_VB, rng)
    elif isinstance(codec, Int8):
        plane_VB[:, :2] = rng.uniform(1e-3, 1e-2, (len(plane_VB), 1)).astype("<f2").view(np.uint8)
    elif isinstance(codec, FourBit):
        absmax = rng.uniform(0.1, 1, (len(plane_VB), codec.num_groups)).astype("<f4")
        plane_VB[:, : 4 * codec.num_groups] = absmax.view(np.uint8)
    elif isinstance(codec, Raw):
        values = rng.standard_normal((len(plane_VB), codec.width), np.float32).astype("<f2")
        plane_VB[:, : 2 * codec.width] = values.view(np.uint8)


def _drawn_shared(codec: Codec, rng: np.random.Generator) -> Arrays:
    arrays = {}
    for name, (dtype, shape) in codec.shared_shapes().items():
        if name.startswith("classes"):
            arrays[name] = rng.integers(0, CLASSES, shape, np.uint8)
        elif dtype == "U8":
            # The largest field of a basis row stands for no number; these bytes hold none.
            arrays[name] = rng.integers(0, 256, shape, np.uint8) & np.uint8(0b01110111)
        else:
            kind = np.float32 if dtype == "F32" else np.float16
            arrays[name] = rng.uniform(0.01, 0.1, shape).astype(kind)
    return arrays


assert MAX_WIDTH == 8, "the mask of _drawn_shared is made for basis rows of up to eight bits"
