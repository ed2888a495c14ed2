"""One layer's table from a checkpoint that stays on disk.

D hidden, K FFN inner size, n token ids.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu

from tolkit.errors import NonFiniteError, UsageError
from tolkit.model.config import ModelConfig
from tolkit.model.files import require_finite
from tolkit.model.layers import rms_norm

__all__ = ["FfnFiles", "LayerFfn"]

_buffers = threading.local()


class FfnFiles(Protocol):
    """Where a layer's weights come from: a checkpoint's files, or those a partial bundle keeps."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> ModelConfig: ...
    def tensor(self, name: str) -> Tensor: ...


class LayerFfn:
    """Computes table rows FFN_L(LN_L(E[ids])) of one layer (paper, section 2.9) in float32.

    The embedding stays mapped from the file; only this layer's norm and FFN are held, as
    float32: 12 K D bytes (134 MB at 1B) where the file stores 16 bits, nothing where it stores
    float32 on the CPU, because then the file's own pages are used. A call needs another
    4 n (2 D + 2 K) bytes. Equal blocks of ids give equal bits, and the bits of
    `Decoder.ffn_plane` in float32.

    Raises:
        UsageError: the checkpoint has no memory FFN (dense).
        NonFiniteError: a weight of this layer is NaN or infinite.
    """

    def __init__(
        self,
        files: FfnFiles,
        layer: int,
        *,
        device: torch.device | str = "cpu",
        checked: bool = False,
    ) -> None:
        if not files.config.has_tables:
            raise UsageError(f"{files.path}: a dense model has no token-indexed FFN")
        self.layer = layer
        self._files = files
        self._device = torch.device(device)
        self._checked = checked
        self._eps = files.config.rms_norm_eps
        self._embedding_VD = files.tensor("model.embed_tokens.weight")
        prefix = f"model.layers.{layer}.memory_"
        self._norm_D, self._gate_KD, self._up_KD, self._down_DK = (
            self._load(prefix + suffix)
            for suffix in (
                "layernorm.weight",
                "mlp.gate_proj.weight",
                "mlp.up_proj.weight",
                "mlp.down_proj.weight",
            )
        )

    def _load(self, name: str) -> Tensor:
        weight = self._files.tensor(name).to(self._device, torch.float32)
        if not self._checked:
            require_finite(weight, name, self._files.path)
        return weight

    @torch.no_grad()
    def __call__(self, ids_n: Tensor) -> Tensor:
        """Rows of `ids_n` (int64 [n], on the CPU): float32 [n, D] on the device given.

        Raises:
            NonFiniteError: an embedding row is not finite, or the FFN overflows; the token is
                named.
        """
        embedded_nD = self._embedding_VD[ids_n].to(self._device, torch.float32)
        normed_nD = rms_norm(embedded_nD, self._norm_D, self._eps)
        rows_nD = self._swiglu(normed_nD)
        finite_n = torch.isfinite(rows_nD).all(dim=1)
        if not finite_n.all():
            self._explain(embedded_nD, ids_n, int((~finite_n).nonzero()[0, 0]))
        return rows_nD

    def _swiglu(self, normed_nD: Tensor) -> Tensor:
        """layers.swiglu, bit for bit, in two [n, K] buffers that each thread keeps.

        Buffers of this size freed and taken again would stay with the allocator several times
        over (measured: 190 MB at the 1B shape with two threads).
        """
        shape = (len(normed_nD), len(self._gate_KD))
        kept: tuple[Tensor, Tensor] | None = getattr(_buffers, "pair", None)
        if kept is None or kept[0].shape != shape or kept[0].device != self._device:
            kept = torch.empty(shape, device=self._device), torch.empty(shape, device=self._device)
            _buffers.pair = kept
        inner_nK, up_nK = kept
        torch.mm(normed_nD, self._gate_KD.T, out=inner_nK)
        torch.mm(normed_nD, self._up_KD.T, out=up_nK)
        silu(inner_nK, inplace=True).mul_(up_nK)
        return inner_nK @ self._down_DK.T

    def _explain(self, embedded_nD: Tensor, ids_n: Tensor, position: int) -> None:
        token = int(ids_n[position])
        if not torch.isfinite(embedded_nD[position]).all():
            raise NonFiniteError(
                f"{self._files.path}: tensor 'model.embed_tokens.weight' is not finite in row "
                f"{token}, expected finite weights"
            )
        raise NonFiniteError(
            f"{self._files.path}: layer {self.layer}'s FFN gives a non-finite row for token {token}"
        )
