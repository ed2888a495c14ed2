"""Text of tokens as they come: whole characters only, and an end where a stop text begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["StopWatch", "TextStream", "TokenDecoder"]

_CONTEXT_TOKENS = 6
_MOST_TOKENS = 32
_LONGEST_WAIT_TOKENS = 16
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TokenDecoder(Protocol):
    """The part of a tokenizer this module needs."""

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """The text each new token adds.

    A token may hold part of a character, and some tokenizers write a token differently at the
    start of a text. So a few tokens are decoded together, beginning in the prompt, and what is
    new in their text is given out once it ends in a whole character. Bytes that never become one
    are given out as U+FFFD after some tokens, or at the end.
    """

    def __init__(self, tokenizer: TokenDecoder, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_MOST_TOKENS:])
        self._settle()

    def push(self, token: int) -> str:
        """What can be shown of the text now that `token` is there; often all of it, or ""."""
        self._ids.append(token)
        return self._new(wait=len(self._ids) - self._settled <= _LONGEST_WAIT_TOKENS)

    def finish(self) -> str:
        """What was held back."""
        return self._new(wait=False)

    def _new(self, *, wait: bool) -> str:
        text = self._tokenizer.decode(self._ids)
        if wait and text.endswith(_BROKEN):
            return ""
        new = text[len(self._shown) :]
        self._settle()
        return new

    def _settle(self) -> None:
        """From here on decode only the last tokens again, cut between two characters."""
        for count in range(_CONTEXT_TOKENS, min(len(self._ids), _MOST_TOKENS) + 1):
            self._shown = self._tokenizer.decode(self._ids[-count:])
            if _BROKEN not in self._shown:
                self._ids = self._ids[-count:]
                break
        else:
            self._ids = self._ids[-_MOST_TOKENS:]
            self._shown = self._tokenizer.decode(self._ids)
        self._settled = len(self._ids)


class StopWatch:
    """Finds stop texts in a text that comes in pieces, holding back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is surely no part of a stop text; `stopped` says whether one came."""
        if self.stopped:
            return ""
        self._held += piece
        starts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            kept, self._held = self._held[: min(starts)], ""
            return kept
        at = len(self._held) - self._overlap()
        kept, self._held = self._held[:at], self._held[at:]
        return kept

    def finish(self) -> str:
        """What was held back."""
        kept, self._held = self._held, ""
        return kept

    def _overlap(self) -> int:
        """Length of the longest end of the text that begins a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
