"""Entropy-coded records: the manifest's `coding` and the coder of each tier (SPEC 1.1).

A tier's symbols are the bytes of its planes one after the other; their models, one a position, are
the `classes` of the planes. A record is the row of the rANS coder and a CRC-32 behind it.
K models, S symbols, C positions of a tier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tolkit_formats._fields import Fields
from tolkit_formats.codecs.steps import OFFSETS
from tolkit_formats.errors import BundleError
from tolkit_formats.rans import MAX_LANES, RowCoder
from tolkit_formats.rans_models import MAX_MODELS, MAX_SYMBOLS, Models

__all__ = ["FEATURE", "Coding", "length_dtype", "models_of", "stored_models", "tier_coder"]

FEATURE = "entropy_rows"
_SHORT_POSITIONS = 1 << 15


@dataclass(frozen=True)
class Coding:
    """Coder of all records of a bundle.

    Attributes:
        lanes: interleaved states of a record.
        num_models: K.
        num_frequencies: numbers in the tables of all models together.
    """

    lanes: int
    num_models: int
    num_frequencies: int

    @classmethod
    def read(cls, entry: Fields) -> Coding:
        """From the manifest; BundleError names a wrong field."""
        entry.text("name", ("rans",))
        coding = cls(
            entry.integer("lanes", 1, MAX_LANES),
            entry.integer("models", 1, MAX_MODELS),
            entry.integer("frequencies", 1, MAX_MODELS * MAX_SYMBOLS),
        )
        entry.done()
        return coding

    def to_json(self) -> dict[str, object]:
        """The manifest's object."""
        return {
            "name": "rans",
            "lanes": self.lanes,
            "models": self.num_models,
            "frequencies": self.num_frequencies,
        }

    def shared_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Arrays all planes share, under these very names in tables/bases.safetensors."""
        return {
            "frequencies": ("U16", (self.num_frequencies,)),
            "symbols": ("U8", (self.num_models,)),
            "offsets": ("F16", (self.num_models, OFFSETS)),
        }


def length_dtype(num_positions: int) -> str:
    """Of the stored lengths of records; a symbol takes at most 14 bits."""
    return "U16" if num_positions <= _SHORT_POSITIONS else "U32"


def models_of(common: Mapping[str, npt.NDArray[np.generic]]) -> Models:
    """The frequency tables, each filled up with zeros to the length of the longest.

    Args:
        common: the arrays of `Coding.shared_shapes`: the tables one after the other, and how many
            symbols each has.

    Raises:
        BundleError: lengths that do not add up, or what `Models` refuses.
    """
    lengths_K = np.asarray(common["symbols"], np.int64)
    stored = np.asarray(common["frequencies"], np.uint16)
    if lengths_K.sum() != len(stored) or lengths_K.min() < 1:
        raise BundleError(
            f"entropy models: {lengths_K.sum()} symbols in all, expected {len(stored)}, "
            "at least one each"
        )
    freqs_KS = np.zeros((len(lengths_K), lengths_K.max()), np.uint16)
    freqs_KS[np.arange(lengths_K.max()) < lengths_K[:, None]] = stored
    return Models(freqs_KS)


def stored_models(freqs_KS: npt.NDArray[np.uint16]) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays `models_of` reads: zeros behind a table's last symbol are left out."""
    used_KS = freqs_KS > 0
    lengths_K = freqs_KS.shape[1] - used_KS[:, ::-1].argmax(axis=1)
    inside_KS = np.arange(freqs_KS.shape[1]) < lengths_K[:, None]
    return {"frequencies": freqs_KS[inside_KS], "symbols": lengths_K.astype(np.uint8)}


def tier_coder(
    models: Models, classes: Sequence[npt.NDArray[np.generic]], coding: Coding
) -> RowCoder:
    """The coder of a tier's records, `classes` of its planes in order; BundleError for a class
    without a model."""
    model_of_C = np.concatenate([np.zeros(0, np.uint8), *classes]).astype(np.uint8)
    return RowCoder(model_of_C, models, coding.lanes)
