"""A model loaded to continue text: a checkpoint, or a bundle whose rows are fetched on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from tolkit.data import Tokenizer
from tolkit.errors import UsageError
from tolkit.evaluate.runnable import pick_device, pick_dtype
from tolkit.model import Decoder, RowSource, checkpoint_tensors, load_checkpoint
from tolkit.runtime.generate import Costs, Row, generate_batch
from tolkit.runtime.generation import Generation, GenerationStatistics
from tolkit.runtime.rows import TABLE_PLACES, open_table_rows
from tolkit.runtime.sampling import GenerateSpec
from tolkit.sources import is_bundle
from tolkit_formats.reader import open_bundle

__all__ = ["Session", "load_session"]

_NEW_TOKENS = 128

OnText = Callable[[int, str], None]
"""Called with a prompt's number and each new piece of its text."""


@dataclass(frozen=True)
class _Prompt:
    index: int
    text: str | None
    ids: tuple[int, ...]


class Session:
    """Continues prompts; made by `load_session`. Close it, or use it in a `with`.

    Attributes:
        model: the decoder, on its device and in its dtype.
        rows: where table rows come from; None where the model computes them or is dense.
        kind: ``checkpoint`` or ``bundle``.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, rows: RowSource | None, path: Path, kind: str
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.rows = rows
        self.path = path
        self.kind = kind
        ends = (tokenizer.eos_id, model.config.eos_token_id)
        self._eos = frozenset(i for i in ends if i is not None)
        self._costs = Costs(model, rows, self.device)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.embedding.device

    @property
    def statistics(self) -> GenerationStatistics:
        """Figures of the latest call, so far."""
        return self._costs.statistics()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        spec: GenerateSpec | None = None,
        *,
        on_text: OnText | None = None,
    ) -> list[Generation]:
        """Continue prompts, `spec.batch` of them together, each as if it were alone.

        Args:
            prompts: texts, or ids as the model reads them. A text's ids are those transformers'
                tokenizer gives: special tokens spelled out are meant, and what tokenizer.json
                puts around a text is put. A text without ids starts from bos.
            spec: how; by default greedily, at most 128 tokens.
            on_text: called with each piece of text as soon as it is known.

        Raises:
            UsageError: no ids to start from, an id outside the vocabulary, too many positions.
        """
        return list(self.generations(prompts, spec, on_text=on_text))

    def generations(
        self,
        prompts: Sequence[str | Sequence[int]],
        spec: GenerateSpec | None = None,
        *,
        on_text: OnText | None = None,
    ) -> Iterator[Generation]:
        """The same, each batch's results as soon as it has ended, in the order of the prompts."""
        spec = spec or GenerateSpec()
        ready = [self._prompt(i, prompt) for i, prompt in enumerate(prompts)]
        rows = self._rows(ready, spec)
        self._costs = Costs(self.model, self.rows, self.device)
        for start in range(0, len(rows), spec.batch):
            batch = rows[start : start + spec.batch]
            for row, piece in self._pieces(batch, spec):
                if piece and on_text is not None:
                    on_text(row.prompt.index, piece)
            yield from (row.result() for row in batch)

    def stream(
        self, prompt: str | Sequence[int], spec: GenerateSpec | None = None
    ) -> Iterator[str]:
        """Pieces of one prompt's text as they come; joined they are what `generate` gives."""
        spec = spec or GenerateSpec()
        rows = self._rows([self._prompt(0, prompt)], spec)
        self._costs = Costs(self.model, self.rows, self.device)
        return (piece for _, piece in self._pieces(rows, spec) if piece)

    def close(self) -> None:
        """Give back what the source of rows holds open."""
        close: Callable[[], None] | None = getattr(self.rows, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _pieces(self, rows: Sequence[Row], spec: GenerateSpec) -> Iterator[tuple[Row, str]]:
        eos = frozenset[int]() if spec.ignore_eos else self._eos
        costs = self._costs
        yield from generate_batch(self.model, self.rows, rows, spec, eos=eos, costs=costs)
        costs.memory.look()

    def _prompt(self, index: int, prompt: str | Sequence[int]) -> _Prompt:
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str):
            _require_text(index, prompt)
            (ids,) = self.tokenizer.encode_batch_marked([prompt], add_special=True)
            if not ids and self.tokenizer.bos_id is not None:
                ids = [self.tokenizer.bos_id]
        else:
            ids = [int(i) for i in prompt]
        if not ids:
            raise UsageError(
                f"prompt {index}: has no tokens, and the tokenizer no bos to start from",
                hint="give at least a word",
            )
        most = self.model.config.vocab_size
        beyond = next((i for i in ids if not 0 <= i < most), None)
        if beyond is not None:
            raise UsageError(f"prompt {index}: token {beyond} is outside the vocabulary of {most}")
        return _Prompt(index, text, tuple(ids))

    def _rows(self, batch: Sequence[_Prompt], spec: GenerateSpec) -> list[Row]:
        """A row for each prompt, with the number of tokens it may get."""
        most = self.model.config.max_position_embeddings
        if spec.context is not None and spec.context > most:
            raise UsageError(f"context: expected at most the model's {most}, got {spec.context}")
        wanted = spec.max_new_tokens or _NEW_TOKENS
        rows = []
        for prompt in batch:
            room = (spec.context or most) - len(prompt.ids)
            if room < 1:
                raise _too_long(prompt, spec.context or most, most)
            if spec.max_new_tokens is not None and spec.context is None and wanted > room:
                raise UsageError(
                    f"max_new_tokens: {wanted} and the {len(prompt.ids)} tokens of prompt "
                    f"{prompt.index} exceed the model's {most} positions",
                    hint=f"give --max-new-tokens {room} or less, or --context {most} to stop there",
                )
            limit, reason = (wanted, "length") if wanted <= room else (room, "context")
            rows.append(Row(prompt, self.tokenizer, spec.stop, limit, reason))
        return rows


def _require_text(index: int, prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are not UTF-8
        raise UsageError(
            f"prompt {index}: not UTF-8 text (character {error.start})",
            hint="write it to a file in UTF-8 and give that as --prompts",
        ) from error


def _too_long(prompt: _Prompt, positions: int, most: int) -> UsageError:
    raise_context = " or raise --context" if positions < most else ""
    return UsageError(
        f"prompt {prompt.index}: has {len(prompt.ids)} tokens, which leaves no room for a new one "
        f"in {positions} positions",
        hint=f"shorten it to {positions - 1} tokens{raise_context}",
    )


def load_session(
    path: str | Path,
    *,
    tables: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    max_table_bytes: int | None = None,
) -> Session:
    """Load a bundle or a checkpoint (memory, flex, dense) to continue text.

    Args:
        path: NAME.tol, or a checkpoint folder; its FFNs then compute the rows.
        tables: a bundle's rows come from ``disk`` (None means this), ``host`` or ``device``.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of weights and activations; None: as stored. Scores are chosen from in float32.
        max_table_bytes: the most memory the source of rows may take; None: its own choice.

    Raises:
        InputError and its kin: missing or damaged files; CheckpointError without a tokenizer.
        UsageError: unknown names, or tables of a checkpoint.
        ResourceError: no such device, or the tables do not fit in the memory allowed.
    """
    # That module imports the sources of rows from here.
    from tolkit.tables import bundle_decoder, bundle_tokenizer, checkpoint_tokenizer

    path = Path(path)
    where = pick_device(device)
    kind = None if dtype is None else pick_dtype(dtype)
    if tables is not None and tables not in TABLE_PLACES:
        raise UsageError(f"tables: expected one of {', '.join(TABLE_PLACES)}, got {tables!r}")
    if is_bundle(path):
        bundle = open_bundle(path)
        tokenizer = bundle_tokenizer(bundle)
        model = bundle_decoder(bundle, dtype=kind, device=where).eval()
        rows = open_table_rows(
            bundle,
            tables or "disk",
            device=where,
            dtype=model.embedding.dtype,
            max_table_bytes=max_table_bytes,
        )
        return Session(model, tokenizer, rows, path, "bundle")
    for name, value in (("tables", tables), ("max_table_bytes", max_table_bytes)):
        if value is not None:
            raise UsageError(
                f"{name}: {path} is a checkpoint, which computes its rows",
                hint="build a bundle with tol build, or leave it out",
            )
    config = checkpoint_tensors(path).config
    tokenizer = checkpoint_tokenizer(path, config.vocab_size)
    model = load_checkpoint(path, dtype=kind, device=where).eval()
    return Session(model, tokenizer, None, path, "checkpoint")
