"""Items to windows, token by token what lm-evaluation-harness' HFLM feeds a causal model.

- White space at a context's end belongs to the continuation. Both are encoded together and the
  context alone; what the whole has beyond the context's length is scored.
- Texts are encoded as transformers' tokenizer does, with the tokens its files say to add, unless
  a text already begins with the prefix token spelled out.
- An empty context is the prefix token (bos, else eos); where the continuation begins with that
  very token, its first token is the context instead. A tokenizer with neither bos nor eos, with
  which the harness does not run unless told a token, is treated as in the latter case.
- What does not fit is cut off on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from tolkit.errors import DataError, UsageError
from tolkit.evaluate.tasks.base import Item, Page, TaskItem
from tolkit.evaluate.windows import TextTokenizer, Window

__all__ = ["Requests", "prefix_of", "requests_of"]


@runtime_checkable
class _MarkingTokenizer(Protocol):
    def encode_batch_marked(
        self, texts: Sequence[str], /, *, add_special: bool
    ) -> Sequence[Sequence[int]]: ...


@dataclass(frozen=True)
class Requests:
    """The windows of some items.

    windows: each different one once, so that equal choices have equal likelihoods.
    of_item: for each item, the windows of its continuations, or all those of its page.
    scored_share: for each item, the share of its bytes that is scored: 1, but for pages without
        a prefix token, whose first token is context only.
    truncated: items of which some context was cut off.
    """

    windows: tuple[Window, ...]
    of_item: tuple[tuple[int, ...], ...]
    scored_share: tuple[float, ...]
    truncated: int


def prefix_of(tokenizer: TextTokenizer) -> int | None:
    """What stands before a text without context: bos, else eos, else nothing."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def requests_of(
    items: Sequence[TaskItem], tokenizer: TextTokenizer, length: int, prefix_id: int | None
) -> Requests:
    """The windows of `items`, each of at most `length` + 1 ids.

    Raises:
        UsageError: a continuation of more than `length` tokens.
        DataError: a continuation without a token to score.
    """
    encoder = _Encoder(tokenizer, prefix_id)
    pairs = [pair for item in items if isinstance(item, Item) for pair in item.pairs]
    encoded = iter(encoder.pairs(pairs))
    pages = iter(encoder.texts([item.text for item in items if isinstance(item, Page)]))

    collected = _Collected(length)
    for item in items:
        if isinstance(item, Item):
            collected.add_pairs(item.where, [next(encoded) for _ in item.pairs])
        else:
            collected.add_page(item.where, next(pages), tokenizer, prefix_id)
    return collected.requests()


class _Encoder:
    """Texts to ids, in batches."""

    def __init__(self, tokenizer: TextTokenizer, prefix_id: int | None) -> None:
        self._tokenizer = tokenizer
        self._prefix_id = prefix_id
        self._spelled_prefix = None if prefix_id is None else tokenizer.decode([prefix_id])

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with the tokenizer's own additions, but no second prefix before a spelled one."""
        spelled = self._spelled_prefix
        begun = [spelled is not None and text.startswith(spelled) for text in texts]
        found: list[list[int]] = [[] for _ in texts]
        for add_special in (True, False):
            places = [i for i, has in enumerate(begun) if has is not add_special]
            ids = self._encode([texts[i] for i in places], add_special)
            for i, of_text in zip(places, ids, strict=True):
                found[i] = of_text
        return found

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """Ids of context and continuation, and how many of them belong to the context."""
        split = [_moved_spaces(context, continuation) for context, continuation in pairs]
        bare = [i for i, (context, _) in enumerate(split) if not context]
        full = [i for i, (context, _) in enumerate(split) if context]
        found: dict[int, tuple[list[int], int]] = {}
        wholes = self.texts(["".join(split[i]) for i in full])
        contexts = self.texts([split[i][0] for i in full])
        for i, whole, context in zip(full, wholes, contexts, strict=True):
            # A context can be longer than the whole where tokens join: then nothing is scored.
            found[i] = (whole, len(context)) if context else self._alone(whole)
        for i, ids in zip(bare, self._encode([split[i][1] for i in bare], False), strict=True):
            found[i] = self._alone(ids)
        return [found[i] for i in range(len(pairs))]

    def _alone(self, ids: list[int]) -> tuple[list[int], int]:
        if self._prefix_id is None or ids[:1] == [self._prefix_id]:
            return ids, 1
        return [self._prefix_id, *ids], 1

    def _encode(self, texts: Sequence[str], add_special: bool) -> list[list[int]]:
        if isinstance(self._tokenizer, _MarkingTokenizer):
            found = self._tokenizer.encode_batch_marked(texts, add_special=add_special)
        else:
            found = self._tokenizer.encode_batch(texts)
        return [list(ids) for ids in found]


def _moved_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


class _Collected:
    """Windows as they come; mutated by `add_pairs` and `add_page`."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._windows: list[Window] = []
        self._known: dict[tuple[bytes, int], int] = {}
        self._of_item: list[tuple[int, ...]] = []
        self._shares: list[float] = []
        self._truncated = 0

    def add_pairs(self, where: str, pairs: Sequence[tuple[list[int], int]]) -> None:
        indices: list[int] = []
        for ids, context in pairs:
            scored = len(ids) - context
            if scored < 1:
                raise DataError(
                    f"{where}: a continuation without a token of its own to score",
                    hint="a tokenizer without bos and eos needs a context",
                )
            if scored > self._length:
                raise UsageError(
                    f"window: {self._length} tokens, expected at least {scored}: {where} has a "
                    "continuation of that length"
                )
            indices.append(self._window(ids[-(self._length + 1) :], scored))
        self._truncated += any(len(ids) > self._length + 1 for ids, _ in pairs)
        self._of_item.append(tuple(indices))
        self._shares.append(1.0)

    def add_page(
        self, where: str, text_ids: list[int], tokenizer: TextTokenizer, prefix_id: int | None
    ) -> None:
        """Windows end at every `length`-th target and at the last, and reach `length` back."""
        ids = text_ids if prefix_id is None else [prefix_id, *text_ids]
        last = len(ids) - 1
        if last < 1:
            raise DataError(f"{where}: nothing to score, expected a page of at least two tokens")
        ends = [*range(self._length, last, self._length), last]
        starts = [0, *ends[:-1]]
        self._of_item.append(
            tuple(
                self._window(ids[max(0, end - self._length) : end + 1], end - start)
                for start, end in zip(starts, ends, strict=True)
            )
        )
        self._shares.append(1.0 if prefix_id is not None else _share_after_first(ids, tokenizer))

    def requests(self) -> Requests:
        return Requests(
            tuple(self._windows), tuple(self._of_item), tuple(self._shares), self._truncated
        )

    def _window(self, ids: list[int], scored: int) -> int:
        array = np.array(ids, dtype=np.int32)
        key = (array.tobytes(), scored)
        if key not in self._known:
            self._known[key] = len(self._windows)
            self._windows.append(Window(array, scored, 0.0, 0.0, len(self._of_item)))
        return self._known[key]


def _share_after_first(ids: Sequence[int], tokenizer: TextTokenizer) -> float:
    first, rest = (
        len(tokenizer.decode(part).encode("utf-8", "surrogatepass")) for part in (ids[:1], ids[1:])
    )
    return rest / max(1, first + rest)
