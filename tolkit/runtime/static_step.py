"""One decoding step whose shapes never change, so that a GPU can replay it as a CUDA graph.

A step of a small model is hundreds of kernels of a few microseconds; launched one by one, their
launches are what takes the time. B rows, S positions of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tolkit.model import Decoder, DistinctTokens, KVCache, RowSource
from tolkit.model.layers import KeyValueStore

__all__ = ["StaticStep"]

_WARM_UPS = 2


class _StaticCache:
    """A KVCache written at a position that lies on the device, and read whole.

    What is read of positions not yet written must be hidden by the caller's mask.
    """

    def __init__(self, cache: KVCache, at_1: Tensor) -> None:
        self._cache, self._at_1 = cache, at_1

    @property
    def length(self) -> int:
        """Positions filled before the step; the decoder is given the rotary ones instead."""
        return self._cache.length

    def layer(self, layer: int) -> KeyValueStore:
        keys_BHSC, values_BHSC = self._cache.keys_LBHSC[layer], self._cache.values_LBHSC[layer]

        def store(keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]:
            keys_BHSC.index_copy_(2, self._at_1, keys_BHTC.to(keys_BHSC.dtype))
            values_BHSC.index_copy_(2, self._at_1, values_BHTC.to(values_BHSC.dtype))
            return keys_BHSC, values_BHSC

        return store

    def advance(self, count: int) -> None:
        """Nothing: the step counts."""

    def check_room(self, count: int) -> None:
        """Nothing: the step looks before it runs."""


class StaticStep:
    """Steps of a batch after its prompts, through buffers that stay where they are.

    Args:
        model: on the device; unchanged.
        rows: a source that neither waits for the device nor allocates anew for other ids.
        cache: filled by the prompts; its unwritten part must be finite. Written.
        mask_BS: False for padding, bool [B, S].
        next_B1: the rotary position of each row's next token.
        graph: capture the first step and replay it afterwards; needs CUDA.
    """

    def __init__(
        self,
        model: Decoder,
        rows: RowSource | None,
        cache: KVCache,
        mask_BS: Tensor,
        next_B1: Tensor,
        *,
        graph: bool,
    ) -> None:
        self._model, self._rows, self._cache = model, rows, cache
        device = model.embedding.device
        written_S = torch.arange(mask_BS.shape[1], device=device) < cache.length
        self._visible_B11S = (mask_BS & written_S)[:, None, None].contiguous()
        self._positions_B1 = next_B1.clone()
        self._ids_B1 = torch.zeros_like(next_B1)
        self._at_1 = torch.tensor([cache.length], dtype=torch.int64, device=device)
        self._static = _StaticCache(cache, self._at_1)
        self._wants_graph = graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_BV: Tensor | None = None

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Logits [B, V] after one more token of every row; overwritten by the next call."""
        self._cache.check_room(1)
        self._ids_B1.copy_(torch.tensor(ids, dtype=torch.int64)[:, None])
        self._visible_B11S[..., self._cache.length] = True
        if self._wants_graph:
            logits_BV = self._replayed()
        else:
            logits_BV = self._run()
        self._cache.advance(1)
        self._positions_B1 += 1
        self._at_1 += 1
        return logits_BV

    def rewind(self, length: int) -> None:
        """Go on behind `length` positions, all of them visible; for benchmarks."""
        self._visible_B11S[..., :length] = True
        self._visible_B11S[..., length:] = False
        self._positions_B1.fill_(length)
        self._at_1.fill_(length)

    def _run(self) -> Tensor:
        hidden_B1D = self._model.hidden(
            self._ids_B1,
            rows=self._rows,
            cache=self._static,
            positions_BT=self._positions_B1,
            visible_B1TS=self._visible_B11S,
            tokens=DistinctTokens.each(self._ids_B1),
        )
        return self._model.logits(hidden_B1D[:, -1])

    def _replayed(self) -> Tensor:
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        assert self._logits_BV is not None
        self._graph.replay()
        return self._logits_BV

    def _capture(self) -> None:
        """Record a step; the runs before it let libraries set up what may not be recorded.

        Running a step again writes the same keys and values to the same place.
        """
        device = self._model.embedding.device
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UPS):
                self._run()
        torch.cuda.current_stream(device).wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BV = self._run()
