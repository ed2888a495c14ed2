"""Partial tables (SPEC 1.2): records of the most frequent tokens, FFN weights for all others.

L layers, D hidden, K inner size of a memory FFN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tolkit_formats import digests
from tolkit_formats._fields import Fields
from tolkit_formats.errors import BundleError
from tolkit_formats.tensorfile import TensorFile

if TYPE_CHECKING:
    from tolkit_formats.manifest import LayerDigests, LayerStatus

__all__ = [
    "FEATURE",
    "FFN_FILE",
    "VERSION",
    "Partial",
    "check_ffn_header",
    "ffn_layers",
    "ffn_names",
    "require_ffn_digests",
    "require_ffn_finite",
]

FEATURE = "partial_rows"
VERSION = (1, 2)
FFN_FILE = "ffn.safetensors"
_NORM = "layernorm"
_MATRICES = ("gate_proj", "up_proj", "down_proj")
_CHECKED_ROWS = 256


@dataclass(frozen=True)
class Partial:
    """Which tokens have a record.

    Attributes:
        rows: how many, fewer than V.
        covered: their share of all counted tokens, 0 to 1; None where nothing was counted.
    """

    rows: int
    covered: float | None

    @classmethod
    def read(cls, entry: Fields, vocab_size: int) -> Partial:
        """From the manifest; BundleError names a wrong field."""
        rows = entry.integer("rows", 1, vocab_size - 1)
        covered = None if entry.get("covered") is None else float(entry.number("covered"))
        if covered is not None and not 0 <= covered <= 1:
            raise BundleError(f"{entry.where}: covered is {covered}, expected 0 to 1")
        entry.text("cold", ("ffn",))
        entry.done()
        return cls(rows, covered)

    def to_json(self) -> dict[str, object]:
        """The manifest's object."""
        return {"rows": self.rows, "covered": self.covered, "cold": "ffn"}


def ffn_layers(layers: Sequence[LayerStatus]) -> tuple[int, ...]:
    """Original layers whose FFN a row needs: all but those dropped without a trace."""
    return tuple(i for i, layer in enumerate(layers) if layer.status != "dropped")


def ffn_names(layer: int) -> dict[str, str]:
    """Part of a layer's memory FFN -> tensor name, as in the source checkpoint."""
    prefix = f"model.layers.{layer}.memory_"
    return {
        _NORM: f"{prefix}layernorm.weight",
        **{part: f"{prefix}mlp.{part}.weight" for part in _MATRICES},
    }


def check_ffn_header(file: TensorFile, layers: Sequence[int], hidden_size: int) -> None:
    """BundleError unless the file has the weights of `layers` and nothing else; one K a layer."""
    names = {name for layer in layers for name in ffn_names(layer).values()}
    for name in sorted(names ^ set(file.names)):
        what = "is missing" if name in names else "belongs to nothing"
        raise BundleError(f"{file.path}: tensor {name[:80]!r} {what}")
    for layer in layers:
        named = ffn_names(layer)
        gate = file.infos[named["gate_proj"]].shape
        inner = gate[0] if len(gate) == 2 and gate[0] > 0 else 1
        shapes = {
            _NORM: (hidden_size,),
            "gate_proj": (inner, hidden_size),
            "up_proj": (inner, hidden_size),
            "down_proj": (hidden_size, inner),
        }
        for part, name in named.items():
            info = file.infos[name]
            if info.dtype not in ("F32", "F16", "BF16") or info.shape != shapes[part]:
                raise BundleError(
                    f"{file.path}: tensor {name!r} is {info.dtype} {list(info.shape)}, expected "
                    f"F32, F16 or BF16 {list(shapes[part])}"
                )


def require_ffn_digests(file: TensorFile, layer: int, expected: LayerDigests) -> None:
    """BundleError unless a layer's weights are those the tables are for (`sources`)."""
    found = {}
    for part, name in ffn_names(layer).items():
        info = file.infos[name]
        found[part] = digests.array_digest(info.dtype, info.shape, [file.array(name)])
    ffn = digests.json_digest([found[part] for part in _MATRICES])
    if (found[_NORM], ffn) != (expected.norm, expected.ffn):
        raise BundleError(
            f"{file.path}: layer {layer}: its FFN is not the one the tables are for "
            "(sources.layers in tol.json)"
        )


def require_ffn_finite(file: TensorFile) -> None:
    """BundleError naming the tensor of a NaN or an infinity."""
    for name in file.names:
        weight = file.array(name)
        for first in range(0, len(weight), _CHECKED_ROWS):
            if not _finite(weight[first : first + _CHECKED_ROWS]):
                raise BundleError(f"{file.path}: tensor {name!r} holds NaN or infinity")


def _finite(values: npt.NDArray[Any]) -> bool:
    if values.dtype == np.uint16:  # bf16 as the reader maps it: all exponent bits set
        return bool(((values & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(values).all())
