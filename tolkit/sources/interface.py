"""What a source of tables has to offer, and the order of its slots.

V vocabulary, L layers, D hidden, N rows of a block, B bytes of a plane. Rows are addressed by
slot: slot 0 is the most frequent token where counts are known (SPEC section 5), the token with
id 0 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tolkit.errors import UsageError
from tolkit_formats import files
from tolkit_formats.codecs import Codec
from tolkit_formats.entropy import Coding
from tolkit_formats.layer_errors import LayerErrors
from tolkit_formats.manifest import HistoryEntry, LayerStatus, Sources
from tolkit_formats.predictor import Predictor
from tolkit_formats.tensorfile import TensorInfo, TensorStream

__all__ = [
    "COPY_BYTES",
    "PlaneReader",
    "RowSource",
    "TableSource",
    "slots_by_count",
    "unknown_counts",
    "write_weights",
]

COPY_BYTES = 8 << 20
"""Backbones are written in pieces of this size."""

PlaneReader = Callable[[int, int], Tensor]
"""`reader(first_slot, stop_slot)` -> float32 [N, D]; safe to call from several threads."""


class RowSource(Protocol):
    """What encoding reads: planes and embeddings, by slot."""

    path: Path
    num_layers: int
    hidden_size: int
    statuses: tuple[LayerStatus, ...]

    def plane(self, layer: int) -> PlaneReader:
        """Get ready to read one layer's table."""

    def embedded(self, first_slot: int, stop_slot: int) -> Tensor:
        """Embedding rows of the tokens in a run of slots: float32 [N, D]."""

    def token_at(self, slot: int) -> int:
        """Token id whose rows lie in a slot."""

    def stored_plane(self, layer: int, first_slot: int, stop_slot: int) -> npt.NDArray[np.uint8]:
        """A stored plane's bytes U8 [N, B], for copying (bundles only)."""


class TableSource(RowSource, Protocol):
    """Where planes come from, and everything of the source that a bundle keeps.

    `num_rows` of the slots, the first ones, get a record in what is written: V, or fewer once
    `keep_rows` said so; of a partial bundle what it has. Every slot of 0..V-1 can be read.
    """

    vocab_size: int
    num_rows: int
    combine: str
    lookup_scale: float
    out_of_range: str
    identity: str | None
    history: tuple[HistoryEntry, ...]
    token_counts_V: npt.NDArray[np.uint64] | None
    slot_of_token_V: npt.NDArray[np.uint32] | None
    tier_ranges: tuple[tuple[int, int], ...]
    predictors: Mapping[int, Predictor]
    coding: Coding | None
    errors: tuple[LayerErrors, ...]

    def use_counts(self, counts_V: npt.NDArray[np.uint64]) -> None:
        """From now on order slots by these counts, and keep them; before anything is read."""

    def keep_rows(self, count: int) -> None:
        """From now on only the first `count` slots are written; after `use_counts`."""

    def plane_codecs(self, layer: int) -> tuple[Codec, ...]:
        """How the layer is stored in each tier, empty when it is computed from weights."""

    def stored_shared(self, layer: int) -> Mapping[str, tuple[str, npt.NDArray[Any]]]:
        """A stored plane's shared arrays, name -> (dtype, array), for copying (bundles only)."""

    def stored_common(self) -> Mapping[str, tuple[str, npt.NDArray[Any]]]:
        """Arrays all stored planes share (the entropy coder's), for copying."""

    def sources(self) -> Sources:
        """Digests of weights, tokenizer and config; reads all weights once."""

    def root_files(self) -> Mapping[str, bytes]:
        """config.json and tokenizer files."""

    def write_backbone(self, path: Path) -> None:
        """Write backbone.safetensors."""

    def write_ffn(self, path: Path, layers: Sequence[int]) -> None:
        """Write ffn.safetensors with the weights of these layers (not of whole bundles)."""

    def require_unchanged(self) -> None:
        """Raise when what was read is no longer what the source holds."""


def slots_by_count(counts_V: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Token -> slot, count descending, id ascending: U32 [V]."""
    order = np.lexsort((np.arange(len(counts_V)), ~counts_V))
    slot_of_token_V = np.empty(len(counts_V), np.uint32)
    slot_of_token_V[order] = np.arange(len(counts_V), dtype=np.uint32)
    return slot_of_token_V


def write_weights(
    path: Path,
    infos: Mapping[str, TensorInfo],
    array: Callable[[str], npt.NDArray[np.generic]],
) -> None:
    """A file of tensors as they are stored, written piece by piece."""
    directory = [(name, info.dtype, info.shape) for name, info in infos.items()]
    with TensorStream(path, directory, {"format": "pt"}) as stream:
        for name in infos:
            view = files.bytes_view(array(name))
            for start in range(0, len(view), COPY_BYTES):
                stream.write(view[start : start + COPY_BYTES])


def unknown_counts(path: Path) -> UsageError:
    """Nobody says which tokens are frequent."""
    return UsageError(
        f"--keep-rows: how often tokens stand in text is not known of {path}",
        hint=f"run: tol count DATA --tokenizer {path} -o counts.safetensors, then "
        "tol compress with --keep-rows and --weights counts.safetensors",
    )
