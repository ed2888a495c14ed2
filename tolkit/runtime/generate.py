"""The loop of generation: read a batch of prompts, choose, step, until every row has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from tolkit.evaluate.runnable import full_float32
from tolkit.model import Decoder, RowSource
from tolkit.runtime.decoding import Decoding, step_kind
from tolkit.runtime.generation import Generation, GenerationStatistics
from tolkit.runtime.memory import MemoryWatch
from tolkit.runtime.sampling import GenerateSpec, Sampler
from tolkit.runtime.statistics import TableStatistics
from tolkit.runtime.text import StopWatch, TextStream, TokenDecoder

__all__ = ["Costs", "Prompt", "Row", "generate_batch"]

_LOOK_EVERY_STEPS = 32


class Prompt(Protocol):
    """One prompt of a call: its number, its text where it has one, and its ids."""

    @property
    def index(self) -> int: ...
    @property
    def text(self) -> str | None: ...
    @property
    def ids(self) -> Sequence[int]: ...


class Costs:
    """Figures of one call while it runs.

    Args:
        model, rows: what runs; rows may keep no statistics.
        device: where.
    """

    def __init__(self, model: Decoder, rows: RowSource | None, device: torch.device) -> None:
        self.prompts = self.prompt_tokens = self.new_tokens = self.steps = 0
        self.prompt_s = self.decode_s = 0.0
        self.memory = MemoryWatch(device)
        self._device = device
        self._rows = rows
        self._before = self._table_statistics()
        weights = {p.data_ptr(): p.nbytes for p in model.parameters()}
        self._weights_bytes = sum(weights.values())

    @contextmanager
    def timing(self, key: str) -> Iterator[None]:
        """Adds the block's seconds to `prompt_s` or `decode_s`; choosing ids waits for a GPU."""
        started_s = time.perf_counter()
        yield
        setattr(self, key, getattr(self, key) + time.perf_counter() - started_s)

    def statistics(self) -> GenerationStatistics:
        """The figures so far."""
        after, tables = self._table_statistics(), None
        if after is not None and self._before is not None:
            tables = after.since(self._before)
        return GenerationStatistics(
            prompts=self.prompts,
            prompt_tokens=self.prompt_tokens,
            prompt_s=self.prompt_s,
            new_tokens=self.new_tokens,
            steps=self.steps,
            decode_s=self.decode_s,
            tables=tables,
            weights_bytes=self._weights_bytes,
            peak_anonymous_bytes=self.memory.peak_anonymous_bytes,
            peak_device_bytes=self.memory.peak_device_bytes,
        )

    def _table_statistics(self) -> TableStatistics | None:
        found = getattr(self._rows, "statistics", None)
        return found if isinstance(found, TableStatistics) else None


class Row:
    """One prompt on its way: the ids chosen, the text shown, and why it ended.

    Args:
        stops: texts before which it ends.
        limit: ids it may get, at least 1; `limit_reason`: its way of ending when it has them.
    """

    def __init__(
        self,
        prompt: Prompt,
        tokenizer: TokenDecoder,
        stops: Sequence[str],
        limit: int,
        limit_reason: str,
    ) -> None:
        self.prompt = prompt
        self.limit = limit
        self.ids: list[int] = []
        self.finish = ""
        self._limit_reason = limit_reason
        self._stream = TextStream(tokenizer, prompt.ids)
        self._watch = StopWatch(stops)
        self._pieces: list[str] = []

    def push(self, token: int, eos: frozenset[int]) -> str:
        """The text that `token` lets out; sets `finish` where it is the last."""
        self.ids.append(token)
        piece = "" if token in eos else self._watch.push(self._stream.push(token))
        if self._watch.stopped:
            self.finish = "stop"
        elif token in eos or len(self.ids) == self.limit:
            self.finish = "eos" if token in eos else self._limit_reason
            piece += self._rest()
        self._pieces.append(piece)
        return piece

    def result(self) -> Generation:
        """What came of it."""
        return Generation(
            index=self.prompt.index,
            prompt=self.prompt.text,
            prompt_ids=tuple(self.prompt.ids),
            ids=tuple(self.ids),
            text="".join(self._pieces),
            finish=self.finish,
        )

    def _rest(self) -> str:
        piece = self._watch.push(self._stream.finish())
        if self._watch.stopped:
            self.finish = "stop"
        return piece + self._watch.finish()


def generate_batch(
    model: Decoder,
    rows: RowSource | None,
    batch: Sequence[Row],
    spec: GenerateSpec,
    *,
    eos: frozenset[int],
    costs: Costs,
) -> Iterator[tuple[Row, str]]:
    """Continue `batch` to its end; yields each row with its new piece of text, "" included.

    Args:
        batch: changed: their ids, texts and reasons of ending are filled in.
        eos: ids that end a row.
    """
    sampler = Sampler(spec, [row.prompt.index for row in batch])
    seen = [_Seen(row, model, wanted=sampler.needs_seen) for row in batch]
    active = list(range(len(batch)))
    costs.prompts += len(batch)
    costs.prompt_tokens += sum(len(row.prompt.ids) for row in batch)
    capacity = max(len(row.prompt.ids) for row in batch) + max(row.limit for row in batch)
    with _computing(costs, "prompt_s"):
        prompts = [row.prompt.ids for row in batch]
        static = step_kind(model, rows)
        decoding = Decoding(model, rows, prompts, capacity, static=static)
        scores_BV = decoding.prompt_scores(costs.memory.look)
        ids = sampler.choose(scores_BV, active, [seen[i].ids_S for i in active])
    while True:
        going: list[int] = []
        for i, token in zip(active, ids, strict=True):
            costs.new_tokens += 1
            yield batch[i], batch[i].push(token, eos)
            if not batch[i].finish:
                going.append(i)
        if not going:
            break
        with _computing(costs, "decode_s"):
            kept = [at for at, i in enumerate(active) if i in going]
            if len(kept) < len(active):
                decoding.keep(kept)
            active, ids = going, [ids[at] for at in kept]
            for i, token in zip(active, ids, strict=True):
                seen[i].add(token)
            scores_BV = decoding.step(ids)
            ids = sampler.choose(scores_BV, active, [seen[i].ids_S for i in active])
            decoding.announce(ids)
        costs.steps += 1
        if costs.steps % _LOOK_EVERY_STEPS == 1:
            costs.memory.look()


@contextmanager
def _computing(costs: Costs, key: str) -> Iterator[None]:
    with costs.timing(key), torch.inference_mode(), full_float32():
        yield


class _Seen:
    """Ids a row has seen, grown on the device; empty where nobody asks."""

    def __init__(self, row: Row, model: Decoder, *, wanted: bool) -> None:
        self._wanted = wanted
        ids = list(row.prompt.ids) if wanted else []
        self.ids_S: Tensor = torch.tensor(ids, dtype=torch.int64, device=model.embedding.device)

    def add(self, token: int) -> None:
        if self._wanted:
            self.ids_S = torch.cat((self.ids_S, self.ids_S.new_tensor([token])))
