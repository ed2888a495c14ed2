"""Rows that partial tables do not store: computed from the FFN weights kept beside them.

n token ids, D hidden. SPEC section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tolkit.errors import BundleError
from tolkit.model import LayerFfn, ModelConfig
from tolkit.model.files import TORCH_DTYPES, as_tensor, expected_shapes, mapped_tensor
from tolkit_formats.layer_errors import stood_for
from tolkit_formats.partial import FFN_FILE, ffn_layers, ffn_names
from tolkit_formats.reader import Bundle

__all__ = ["ColdPlanes"]

_EMBEDDING = "model.embed_tokens.weight"
_DTYPE_OF_ITEM = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


class ColdPlanes:
    """Any token's row of any plane, computed in float32 from a partial bundle's own weights.

    A row is what the record would hold if nothing had been lost: the output of the layer's FFN,
    and of those folded into it, in ascending order of layers. Equal blocks of ids give the bits of
    the checkpoint's FFN path (`LayerFfn`). Weights stay mapped from the file where it stores
    float32; others are widened, 12 K D bytes a layer, and kept while they fit `keep_bytes`.

    Raises:
        BundleError: weights of another shape than config.json says.
    """

    def __init__(
        self, bundle: Bundle, *, device: torch.device | str = "cpu", keep_bytes: int = 256 << 20
    ) -> None:
        self._bundle = bundle
        self._device = torch.device(device)
        self._files = _BundleFfns(bundle)
        self._free_bytes = keep_bytes
        self._ffns: dict[int, LayerFfn] = {}

    def plane(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Rows of a kept layer: int64 [n] on the CPU -> float32 [n, D] on the device.

        What it gives may be called from several threads.
        """
        members = [self._ffn(i) for i in stood_for(self._bundle.manifest.layers, layer)]

        def rows(ids_n: Tensor) -> Tensor:
            rows_nD = members[0](ids_n)
            for other in members[1:]:
                rows_nD += other(ids_n)
            return rows_nD

        return rows

    def _ffn(self, layer: int) -> LayerFfn:
        known = self._ffns.get(layer)
        if known is not None:
            return known
        made = LayerFfn(self._files, layer, device=self._device)
        size_bytes = self._files.held_bytes(layer, self._device)
        if size_bytes <= self._free_bytes:
            self._free_bytes -= size_bytes
            self._ffns[layer] = made
        return made


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

    def held_bytes(self, layer: int, device: torch.device) -> int:
        """What float32 copies of a layer's weights take; none where the file's pages serve."""
        file = self._bundle.ffn_file(layer)
        if device.type == "cpu" and all(file.infos[n].dtype == "F32" for n in _names(layer)):
            return 0
        return sum(4 * file.array(name).size for name in _names(layer))


def _names(layer: int) -> tuple[str, ...]:
    return tuple(ffn_names(layer).values())
