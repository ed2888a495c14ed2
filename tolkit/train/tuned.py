"""A bundle's table rows with a gradient to what they share, every record as it is.

V vocabulary, n ids, K kept layers, L layers, D hidden, S record stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tolkit.decode.record_decoder import unit_rows
from tolkit.errors import UsageError
from tolkit.model.rows import LazyPlanes
from tolkit.train.tuned_layer import TunedLayer, count_tuned
from tolkit_formats.codecs import Bands, Steps
from tolkit_formats.reader import Bundle, shared_name

__all__ = ["TunedTables", "require_tunable", "tuned_numbers"]

BASES = "tables/bases.safetensors"


class TunedTables(nn.Module):
    """Rows of a bundle as functions of parameters; at first they are the bundle's own.

    Args:
        bundle: open; its records are read, and checked, as rows are asked for.
        embedding_VD: the model's, on `device`, which no step changes.

    Raises:
        UsageError: see `require_tunable`.
    """

    def __init__(self, bundle: Bundle, embedding_VD: Tensor, device: torch.device) -> None:
        super().__init__()
        require_tunable(bundle)
        self._bundle = bundle
        self._device = device
        self._embedding_VD = embedding_VD.detach()
        self.layers = nn.ModuleDict(
            {
                str(layer): TunedLayer(
                    codecs,
                    {**bundle.shared(layer), **bundle.common},
                    bundle.manifest.predictors.get(layer),
                    device,
                )
                for layer, codecs in _codecs(bundle).items()
            }
        )

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """See RowSource; differentiable, float32."""
        bundle = self._bundle
        slots = bundle.slots_of(ids_n.cpu().numpy())
        pieces = []
        places: list[npt.NDArray[np.int64]] = []
        for tier, where in bundle.by_tier(slots):
            records = bundle.shards.take(tier, slots[where])
            pieces.append((tier.index, torch.from_numpy(records).to(self._device)))
            places.append(np.arange(len(slots))[where])
        order = np.concatenate(places)
        back_n = torch.from_numpy(np.argsort(order)).to(self._device)
        there_n = ids_n[torch.from_numpy(order).to(ids_n.device)]
        unit_nD: Tensor | None = None
        if bundle.manifest.predictors:
            unit_nD = unit_rows(self._embedding_VD.index_select(0, there_n))

        def plane(layer: int) -> Tensor | None:
            if str(layer) not in self.layers:
                return None
            tuned = self.layers[str(layer)]
            assert isinstance(tuned, TunedLayer)
            with torch.autocast(self._device.type, enabled=False):
                return tuned.rows(pieces, unit_nD).index_select(0, back_n)

        return LazyPlanes(bundle.num_layers, plane)

    def stored(self) -> dict[str, tuple[str, npt.NDArray[Any]]]:
        """All of tables/bases.safetensors: name -> (dtype, array).

        Raises:
            BundleError: arrays that grew beyond what the format holds.
        """
        file = self._bundle.tensor_file(BASES)
        arrays = {
            name: (info.dtype, np.array(file.array(name))) for name, info in file.infos.items()
        }
        for layer, tuned in self.layers.items():
            assert isinstance(tuned, TunedLayer)
            new = tuned.stored()
            number = int(layer)
            tuned.check({**self._bundle.shared(number), **self._bundle.common, **new})
            for name, array in new.items():
                full = shared_name(number, name)
                dtype, old = arrays[full]
                assert array.shape == old.shape and array.dtype == old.dtype, full
                arrays[full] = (dtype, array)
        return arrays


def require_tunable(bundle: Bundle) -> None:
    """UsageError unless every plane of `bundle` is coefficients in something its rows share."""
    for tier in bundle.manifest.tiers:
        for plane in tier.planes:
            if not isinstance(plane.codec, Bands | Steps):
                raise UsageError(
                    f"tune_tables: {bundle.path}: layer {plane.layer} is {plane.codec.name}, whose "
                    "rows share nothing that can be trained, expected bands or steps",
                    hint="make one with: tol compress CKPT -o B.tol --bits-per-value 0.5",
                )


def tuned_numbers(bundle: Bundle) -> int:
    """How many numbers `TunedTables` trains; headers only."""
    predictors = bundle.manifest.predictors
    return sum(
        count_tuned([codec for codec, _ in codecs], predictors.get(layer))
        for layer, codecs in _codecs(bundle).items()
    )


def _codecs(bundle: Bundle) -> dict[int, list[tuple[Bands | Steps, int]]]:
    """By layer: (codec, offset in the record) of every tier."""
    found: dict[int, list[tuple[Bands | Steps, int]]] = {}
    for tier in bundle.manifest.tiers:
        for plane in tier.planes:
            assert isinstance(plane.codec, Bands | Steps)
            found.setdefault(plane.layer, []).append((plane.codec, plane.offset))
    return found
