"""Table rows that no step changes, for a model that trains around them and for its teacher.

V vocabulary, L layers, D hidden, n distinct ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tolkit.model import ModelConfig, RowSource
from tolkit.model.rows import LazyPlanes

__all__ = ["FrozenRows"]

_CACHE_BYTES = 1 << 30
_BLOCK_IDS = 256


class FrozenRows:
    """Rows of `inner`, which must stay the same; each is worked out once where all of them fit.

    Args:
        inner: a bundle's rows, or FFNs none of whose weights take a gradient.
        config: of the model the rows are for.
        device: where the rows stay.
        cache_bytes: larger tables are not kept: every fetch asks `inner` for its own rows.
    """

    def __init__(
        self,
        inner: RowSource,
        config: ModelConfig,
        device: torch.device,
        *,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        self._inner = inner
        self._device = device
        self._layers, self._vocab_size = config.num_hidden_layers, config.vocab_size
        self._cache: list[Tensor | None] | None = None
        values = self._layers * self._vocab_size * config.hidden_size
        if 4 * values <= cache_bytes:
            shape = (self._vocab_size, config.hidden_size)
            # Pages come to life when a row is written, so this costs what is used.
            self._cache = [torch.empty(shape, device=device) for _ in range(self._layers)]
            self._unknown = torch.ones(-(-self._vocab_size // _BLOCK_IDS), dtype=torch.bool)

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """See RowSource. The bits of a kept row do not depend on the ids it was asked with."""
        if self._cache is None:
            return self._inner.fetch(ids_n)
        blocks = torch.unique(ids_n // _BLOCK_IDS).cpu()
        for block in blocks[self._unknown[blocks]].tolist():
            self._work_out(block)
        cache = self._cache

        def plane(layer: int) -> Tensor | None:
            plane_VD = cache[layer]
            return None if plane_VD is None else plane_VD.index_select(0, ids_n)

        return LazyPlanes(self._layers, plane)

    @torch.no_grad()
    def _work_out(self, block: int) -> None:
        # Always whole blocks: a matrix product of other rows may round a row otherwise, and a
        # run that was interrupted would no longer end with the bits of one that was not.
        assert self._cache is not None
        start = block * _BLOCK_IDS
        stop = min(start + _BLOCK_IDS, self._vocab_size)
        with torch.autocast(self._device.type, enabled=False):
            planes = self._inner.fetch(torch.arange(start, stop, device=self._device))
            for layer in range(self._layers):
                plane_nD, kept_VD = planes[layer], self._cache[layer]
                if plane_nD is None or kept_VD is None:
                    self._cache[layer] = None
                else:
                    kept_VD[start:stop] = plane_nD
        self._unknown[block] = False
