"""A batch of prompts running through the decoder: the prompts at once, then a token a step.

B rows of the batch, T positions of a call, S positions so far, V vocabulary, D hidden.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from tolkit.model import Decoder, KVCache, RowSource
from tolkit.model.padding import positions_of, visible_positions
from tolkit.runtime.device import DeviceRows
from tolkit.runtime.static_step import StaticStep

__all__ = ["Decoding", "StepKind", "step_kind"]

StepKind = Literal["no", "yes", "graph"]

_SWITCH = "TOLKIT_CUDA_GRAPHS"
_PROMPT_POSITIONS = 512  # of a prompt at once: what its activations and table rows need is bounded


class Decoding:
    """Rows decoded together. Shorter prompts are padded on the left, and the padding hidden.

    Padding repeats a row's own first token, so that it needs no table rows of its own.

    Args:
        model: on the device and in the dtype to run in; unchanged.
        rows: where table rows come from; None where the model computes them or is dense.
        prompts: ids of each row, at least one each, all in the vocabulary.
        capacity: positions of the key-value cache, at least the longest prompt's.
        static: steps of one shape; ``graph`` replays them as a CUDA graph. Needs rows that lie on
            the device, or computed ones.
    """

    def __init__(
        self,
        model: Decoder,
        rows: RowSource | None,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        *,
        static: StepKind = "no",
    ) -> None:
        self._model = model
        self._rows = rows
        device, dtype = model.embedding.device, model.embedding.dtype
        longest = max(map(len, prompts))
        padded = [[p[0]] * (longest - len(p)) + list(p) for p in prompts]
        self._prompt_BT = torch.tensor(padded, dtype=torch.int64, device=device)
        self._cache = KVCache(
            model.config, len(prompts), capacity, _cache_dtype(device, dtype), device
        )
        self._mask_BS: Tensor | None = None
        pads_B1 = torch.tensor([[longest - len(p)] for p in prompts], device=device)
        self._next_B1 = longest - pads_B1
        if any(len(p) < longest for p in prompts):
            self._mask_BS = torch.arange(capacity, device=device) >= pads_B1
        self._static = static
        self._static_step: StaticStep | None = None
        self._live = list(range(len(prompts)))
        if static != "no":  # hidden positions weigh nothing, but nothing times NaN is NaN
            self._cache.keys_LBHSC.zero_()
            self._cache.values_LBHSC.zero_()

    @property
    def length(self) -> int:
        """Positions stored, the padding of the longest row included."""
        return self._cache.length

    @property
    def cache_dtype(self) -> torch.dtype:
        """The format keys and values are kept in."""
        return self._cache.keys_LBHSC.dtype

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values, all positions of the capacity."""
        return self._cache.keys_LBHSC.nbytes + self._cache.values_LBHSC.nbytes

    def pretend(self, length: int) -> None:
        """Go on as if `length` positions had been read, the last ones decoded; for benchmarks.

        Positions never read hold zeros. Only for rows of equal length.
        """
        assert self._mask_BS is None
        if length > self.length:
            self._cache.keys_LBHSC[:, :, :, self.length : length] = 0
            self._cache.values_LBHSC[:, :, :, self.length : length] = 0
        self._cache.length = length
        self._next_B1 = torch.full_like(self._next_B1, length)
        if self._static_step is not None:
            self._static_step.rewind(length)

    def announce(self, ids: Sequence[int]) -> None:
        """Let the source of rows begin to read what will be asked for next."""
        prefetch: Callable[[Tensor], None] | None = getattr(self._rows, "prefetch", None)
        if prefetch is not None:
            prefetch(torch.tensor(ids, dtype=torch.int64))

    def prompt_scores(self, look: Callable[[], None] = lambda: None) -> Tensor:
        """Logits [B, V] after the prompts, in the model's dtype; `look` is called now and then."""
        self.announce(sorted({int(i) for i in self._prompt_BT.reshape(-1).tolist()}))
        length = self._prompt_BT.shape[1]
        hidden_BTD = self._prompt_BT.new_empty(0)
        for start in range(0, length, _PROMPT_POSITIONS):
            ids_BT = self._prompt_BT[:, start : start + _PROMPT_POSITIONS]
            positions_BT = visible_B1TS = None
            if self._mask_BS is not None:
                count = ids_BT.shape[1]
                seen_BS = self._mask_BS[:, : start + count]
                positions_BT = positions_of(seen_BS, count)
                visible_B1TS = visible_positions(seen_BS, count)
            hidden_BTD = self._model.hidden(
                ids_BT,
                rows=self._rows,
                cache=self._cache,
                positions_BT=positions_BT,
                visible_B1TS=visible_B1TS,
            )
            look()
        return self._model.logits(hidden_BTD[:, -1])

    def step(self, ids: Sequence[int]) -> Tensor:
        """Logits [B, V] after one more token of each row; `step` may overwrite the last ones."""
        if self._static != "no":
            return self._step_static(ids)
        ids_B1 = torch.tensor(ids, dtype=torch.int64, device=self._prompt_BT.device)[:, None]
        positions_B1 = visible_B11S = None
        if self._mask_BS is not None:
            positions_B1 = self._next_B1.clone()
            self._next_B1 += 1
            visible_B11S = self._mask_BS[:, None, None, : self.length + 1]
        hidden_B1D = self._model.hidden(
            ids_B1,
            rows=self._rows,
            cache=self._cache,
            positions_BT=positions_B1,
            visible_B1TS=visible_B11S,
        )
        return self._model.logits(hidden_B1D[:, -1])

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows of the batch go on."""
        if self._static != "no":  # the others run along unseen
            self._live = [self._live[at] for at in rows]
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self._prompt_BT.device)
        self._cache.keep_rows(index)
        self._next_B1 = self._next_B1[index]
        if self._mask_BS is not None:
            self._mask_BS = self._mask_BS[index]

    def _step_static(self, ids: Sequence[int]) -> Tensor:
        batch = self._prompt_BT.shape[0]
        if self._static_step is None:
            mask_BS = self._mask_BS
            if mask_BS is None:
                shape = (batch, self._cache.max_len)
                mask_BS = torch.ones(shape, dtype=torch.bool, device=self._prompt_BT.device)
            self._static_step = StaticStep(
                self._model,
                self._rows,
                self._cache,
                mask_BS,
                self._next_B1,
                graph=self._static == "graph",
            )
        whole = [ids[0]] * batch
        for row, token in zip(self._live, ids, strict=True):
            whole[row] = token
        logits_BV = self._static_step(whole)
        return logits_BV if len(self._live) == batch else logits_BV[self._live]


def step_kind(model: Decoder, rows: RowSource | None) -> StepKind:
    """CUDA graphs on a GPU, where nothing of a step waits for the host; plain steps elsewhere.

    TOLKIT_CUDA_GRAPHS=off in the environment turns them off.
    """
    if model.embedding.device.type != "cuda" or os.environ.get(_SWITCH, "").lower() == "off":
        return "no"
    return "graph" if rows is None or isinstance(rows, DeviceRows) else "no"


def _cache_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The format of keys and values.

    On the CPU float32 even for a narrower model: attention of one position over 256 took
    0.12 ms a layer in float32 and 0.83 ms in bfloat16 (32 heads of 64, one thread of an EPYC).
    """
    return torch.float32 if device.type == "cpu" else dtype
