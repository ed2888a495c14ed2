"""Tables that a checkpoint's memory FFNs compute.

V vocabulary, D hidden, N rows of a block, B bytes of a plane.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.errors import CheckpointError
from tolkit.model import CheckpointFiles, LayerFfn, checkpoint_tensors
from tolkit.model.files import require_finite
from tolkit.parallel import all_intra_op_threads
from tolkit.sources.interface import (
    PlaneReader,
    slots_by_count,
    unknown_counts,
    write_weights,
)
from tolkit_formats import digests, files
from tolkit_formats.codecs import Codec
from tolkit_formats.entropy import Coding
from tolkit_formats.layer_errors import LayerErrors
from tolkit_formats.manifest import HistoryEntry, LayerDigests, LayerStatus, Sources
from tolkit_formats.partial import ffn_names
from tolkit_formats.predictor import Predictor

__all__ = ["CheckpointSource"]


class CheckpointSource:
    """Planes computed by the checkpoint's memory FFNs, weights mapped from file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: CheckpointFiles = checkpoint_tensors(path)
        config = self._files.config
        if not config.has_tables:
            raise CheckpointError(
                f"{path}: is a dense checkpoint, its FFNs read the residual stream, "
                "so it has no token-wise tables",
                hint="train one with: tol train DATA -o CKPT --arch memory",
            )
        self.vocab_size = self.num_rows = config.vocab_size
        self.num_layers = config.num_hidden_layers
        self.hidden_size = config.hidden_size
        self.statuses = (LayerStatus("kept"),) * self.num_layers
        self.combine = "residual_add"
        self.lookup_scale: float = 1
        self.out_of_range = "error"
        self.identity: str | None = None
        self.history: tuple[HistoryEntry, ...] = ()
        self.token_counts_V = self._files.token_counts()
        self.slot_of_token_V: npt.NDArray[np.uint32] | None = None
        self.tier_ranges: tuple[tuple[int, int], ...] = ((0, self.vocab_size),)
        self.predictors: Mapping[int, Predictor] = {}
        self.coding: Coding | None = None
        self.errors: tuple[LayerErrors, ...] = ()
        self._sources: Sources | None = None
        self._token_of_slot = torch.arange(self.vocab_size)
        if self.token_counts_V is not None:
            self.use_counts(self.token_counts_V)

    def use_counts(self, counts_V: npt.NDArray[np.uint64]) -> None:
        """See TableSource."""
        self.token_counts_V = counts_V
        self.slot_of_token_V = slots_by_count(counts_V)
        order = np.argsort(self.slot_of_token_V)
        self._token_of_slot = torch.from_numpy(order.astype(np.int64))

    def keep_rows(self, count: int) -> None:
        """See TableSource. UsageError where no counts say which."""
        if self.token_counts_V is None and count < self.vocab_size:
            raise unknown_counts(self.path)
        self.num_rows = count

    def plane(self, layer: int) -> PlaneReader:
        """Loads this layer's FFN (LayerFfn states the memory); `sources` has checked it."""
        with all_intra_op_threads():  # widening weights rounds nothing, so threads change no bit
            ffn = LayerFfn(self._files, layer, checked=self._sources is not None)
        token_of_slot = self._token_of_slot

        def read(first_slot: int, stop_slot: int) -> Tensor:
            return ffn(token_of_slot[first_slot:stop_slot])

        return read

    def embedded(self, first_slot: int, stop_slot: int) -> Tensor:
        """See TableSource."""
        weight_VD = self._files.tensor("model.embed_tokens.weight")
        return weight_VD[self._token_of_slot[first_slot:stop_slot]].float()

    def plane_codecs(self, layer: int) -> tuple[Codec, ...]:
        """None: rows are computed."""
        return ()

    def token_at(self, slot: int) -> int:
        """See TableSource."""
        return int(self._token_of_slot[slot])

    def stored_plane(self, layer: int, first_slot: int, stop_slot: int) -> npt.NDArray[np.uint8]:
        """Never: a checkpoint stores no planes."""
        raise AssertionError("a checkpoint has no stored planes")

    def stored_shared(self, layer: int) -> Mapping[str, tuple[str, npt.NDArray[Any]]]:
        """Never: a checkpoint stores no planes."""
        raise AssertionError("a checkpoint has no stored planes")

    def stored_common(self) -> Mapping[str, tuple[str, npt.NDArray[Any]]]:
        """None."""
        return {}

    def sources(self) -> Sources:
        """See TableSource. NonFiniteError names the tensor of a NaN or infinite weight."""
        if self._sources is None:
            self._sources = self._read_sources()
        return self._sources

    def _read_sources(self) -> Sources:
        # Everything is looked at before hours of encoding, the backbone too.
        self._files.check_finite(self._backbone_names())
        tokenizer = self._files.tokenizer_bytes
        layers = []
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}.memory_"
            weights = [
                self._digest(f"{prefix}mlp.{part}_proj.weight") for part in ("gate", "up", "down")
            ]
            layers.append(
                LayerDigests(
                    self._digest(f"{prefix}layernorm.weight"), digests.json_digest(weights)
                )
            )
        return Sources(
            embedding=self._digest("model.embed_tokens.weight"),
            tokenizer=None
            if tokenizer is None
            else digests.tokenizer_digest(
                tokenizer, self.vocab_size, f"{self.path}/tokenizer.json"
            ),
            config=digests.json_digest(json.loads(self.root_files()["config.json"])),
            layers=tuple(layers),
        )

    def _digest(self, name: str) -> str:
        require_finite(self._files.tensor(name), name, self.path)
        info = self._files.info(name)
        return digests.array_digest(info.dtype, info.shape, [self._files.array(name)])

    def _backbone_names(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self._files.names if ".memory_" not in name))

    def root_files(self) -> Mapping[str, bytes]:
        """config.json and the tokenizer files as stored."""
        config = files.read_bytes(self.path / "config.json", limit_bytes=1 << 20)
        return {"config.json": config, **self._files.tokenizer_files()}

    def write_backbone(self, path: Path) -> None:
        """All tensors but the memory FFNs and their norms, in their stored dtypes.

        `sources` has checked that they are finite.
        """
        self._write(path, self._backbone_names())

    def write_ffn(self, path: Path, layers: Sequence[int]) -> None:
        """Memory FFNs and their norms in their stored dtypes; `sources` has checked them."""
        names = [name for layer in layers for name in ffn_names(layer).values()]
        self._write(path, sorted(names))

    def _write(self, path: Path, names: Sequence[str]) -> None:
        infos = {name: self._files.info(name) for name in names}
        write_weights(path, infos, self._files.array)

    def require_unchanged(self) -> None:
        """CheckpointError when a file was written to since it was opened."""
        self._files.require_unchanged()
