"""Rows that partial tables do not store: computed from the FFN weights kept beside them.

n token ids, D hidden. SPEC section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tolkit.errors import BundleError, NonFiniteError
from tolkit.model import LayerFfn, ModelConfig
from tolkit.model.files import (
    TORCH_DTYPES,
    as_tensor,
    expected_shapes,
    mapped_tensor,
    require_finite,
)
from tolkit.model.layers import rms_norm, swiglu
from tolkit_formats.layer_errors import stood_for
from tolkit_formats.partial import FFN_FILE, ffn_layers, ffn_names
from tolkit_formats.reader import Bundle

__all__ = ["ColdPlanes"]

_EMBEDDING = "model.embed_tokens.weight"
_DTYPE_OF_ITEM = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


class ColdPlanes:
    """Any token's row of any plane, computed from a partial bundle's own weights.

    A row is what the record would hold if nothing had been lost: the output of the layer's FFN,
    and of those folded into it, in ascending order of layers. Equal blocks of ids give the bits of
    the checkpoint's FFN path in the same number format (`LayerFfn`, `FfnRows`).

    Args:
        dtype: of the rows. Weights that are stored in it stay mapped from the file on the CPU.
            All others are computed in float32: weights are widened, 12 K D bytes a layer, and
            rows rounded at the end.
        keep_bytes: for copies of weights, widened or on another device; a layer that does not fit
            is copied again at every call.

    Raises:
        BundleError: weights of another shape than config.json says.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        keep_bytes: int = 256 << 20,
    ) -> None:
        self._bundle = bundle
        self._device, self._dtype = torch.device(device), dtype
        self._files = _BundleFfns(bundle)
        self._free_bytes = keep_bytes
        self._ffns: dict[int, Callable[[Tensor], Tensor]] = {}

    def plane(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Rows of a kept layer: int64 [n] on the CPU -> `dtype` [n, D] on the device.

        What it gives may be called from several threads.
        """
        members = [self._ffn(i) for i in stood_for(self._bundle.manifest.layers, layer)]

        def rows(ids_n: Tensor) -> Tensor:
            rows_nD = members[0](ids_n)
            for other in members[1:]:
                rows_nD += other(ids_n)
            return rows_nD.to(self._dtype)

        return rows

    def _ffn(self, layer: int) -> Callable[[Tensor], Tensor]:
        known = self._ffns.get(layer)
        if known is not None:
            return known
        made: Callable[[Tensor], Tensor]
        stored = self._files.dtypes(layer)
        dtype = self._dtype if stored == {self._dtype} else torch.float32
        if dtype == torch.float32:
            made = LayerFfn(self._files, layer, device=self._device)
        else:
            made = _ShortFfn(self._files, layer, self._device)
        mapped = stored == {dtype} and self._device.type == "cpu"
        size_bytes = 0 if mapped else dtype.itemsize * self._files.num_weights(layer)
        if size_bytes <= self._free_bytes:
            self._free_bytes -= size_bytes
            self._ffns[layer] = made
        return made


class _ShortFfn:
    """One layer's FFN in the 16 bits it is stored in, as `Decoder.memory_ffn` computes it.

    Widening 67 million bytes a layer at the 1B shape for one token would take longer than the
    products.
    """

    def __init__(self, files: _BundleFfns, layer: int, device: torch.device) -> None:
        self._where, self._layer = files.path, layer
        self._eps, self._device = files.config.rms_norm_eps, device
        self._embedding_VD = files.tensor(_EMBEDDING)
        for name in _names(layer):
            require_finite(files.tensor(name), name, files.path)
        self._norm_D, self._gate_KD, self._up_KD, self._down_DK = (
            files.tensor(name).to(device) for name in _names(layer)
        )

    @torch.no_grad()
    def __call__(self, ids_n: Tensor) -> Tensor:
        embedded_nD = self._embedding_VD[ids_n].to(self._device)
        normed_nD = rms_norm(embedded_nD, self._norm_D, self._eps)
        rows_nD = swiglu(normed_nD, self._gate_KD, self._up_KD, self._down_DK)
        finite_n = torch.isfinite(rows_nD).all(dim=1)
        if not finite_n.all():
            raise NonFiniteError(
                f"{self._where}: layer {self._layer}'s FFN gives a non-finite row for token "
                f"{int(ids_n[~finite_n.cpu()][0])}"
            )
        return rows_nD


class _BundleFfns:
    """A partial bundle's weights under a checkpoint's names; shapes checked when made."""

    def __init__(self, bundle: Bundle) -> None:
        self.path: Path = bundle.path
        self.config = ModelConfig.from_json(bundle.config(), f"{bundle.path}/config.json")
        self._bundle = bundle
        file = bundle.ffn_file(ffn_layers(bundle.manifest.layers)[0])
        shapes = expected_shapes(self.config)
        for name, info in file.infos.items():
            if shapes.get(name) != info.shape:
                raise BundleError(
                    f"{bundle.path}/{FFN_FILE}: tensor {name!r} is {list(info.shape)}, expected "
                    f"{list(shapes.get(name, ()))} from config.json"
                )

    def tensor(self, name: str) -> Tensor:
        if name == _EMBEDDING:
            stored = self._bundle.embedding
            return as_tensor(stored, TORCH_DTYPES[_DTYPE_OF_ITEM[stored.dtype.name]])
        return mapped_tensor(self._bundle.ffn_file(int(name.split(".")[2])), name)

    def dtypes(self, layer: int) -> set[torch.dtype]:
        """Number formats of a layer's weights, and of the embedding."""
        return {self.tensor(name).dtype for name in (_EMBEDDING, *_names(layer))}

    def num_weights(self, layer: int) -> int:
        return sum(self.tensor(name).numel() for name in _names(layer))


def _names(layer: int) -> tuple[str, ...]:
    return tuple(ffn_names(layer).values())
