"""Tokenizer and token ids of a run: training part, held-out part.

V vocabulary, T positions of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tolkit.data import Tokenizer, read_documents, tokens_of
from tolkit.errors import DataError, MismatchError
from tolkit.model import ModelConfig
from tolkit.progress import Progress
from tolkit.train.shape import default_vocab_size
from tolkit.train.spec import TrainSpec
from tolkit_formats import files

__all__ = ["Corpus", "choose_tokenizer", "encode_corpus", "text_parts"]

_HELD_OUT_SHARE = 50  # one in fifty, 2 %
_HELD_OUT_TOKENS = 65_536


@dataclass(frozen=True)
class Corpus:
    """train, valid: U32 ids, `valid` empty where nothing is held out. key: digest of text,
    tokenizer and split."""

    train: npt.NDArray[np.uint32]
    valid: npt.NDArray[np.uint32]
    key: str


def text_parts(spec: TrainSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and validation sources; plain "stdlib" alone splits itself."""
    if spec.text == ("stdlib",) and not spec.valid_text:
        return ("stdlib:train",), ("stdlib:valid",)
    return spec.text, spec.valid_text


def choose_tokenizer(
    spec: TrainSpec, init: ModelConfig | None, kept: Path | None, progress: Progress
) -> Tokenizer:
    """The tokenizer of a run: the init model's, the one given, or one trained on the text.

    Args:
        init: shape of the model at `spec.init`, to go on from.
        kept: folder with the tokenizer an unfinished run trained.

    Raises:
        MismatchError: the tokenizer given is not the init checkpoint's, or has ids above V.
        DataError: no tokenizer where one is needed, or one that cannot be read.
    """
    given = None if spec.tokenizer is None else Tokenizer.load(spec.tokenizer)
    if init is not None and spec.init is not None:
        return _init_tokenizer(spec.init, init.vocab_size, given)
    if given is not None:
        if spec.vocab_size is not None and spec.vocab_size < given.vocab_size:
            raise MismatchError(
                f"vocab_size: {spec.vocab_size}, the tokenizer {spec.tokenizer} has ids up to "
                f"{given.vocab_size - 1}",
                hint="leave --vocab-size out",
            )
        return given
    if kept is not None:
        return Tokenizer.load(kept)
    wanted = default_vocab_size(spec) if spec.vocab_size is None else spec.vocab_size
    tokenizer = Tokenizer.train(read_documents(text_parts(spec)[0]), wanted)
    if tokenizer.vocab_size < wanted:
        progress.warn(
            f"vocab_size: the text gives {tokenizer.vocab_size} ids, {wanted} were asked for"
        )
    return tokenizer


def _init_tokenizer(init: Path, vocab_size: int, given: Tokenizer | None) -> Tokenizer:
    own = Tokenizer.load(init) if (init / "tokenizer.json").exists() else None
    tokenizer = given if own is None else own
    if tokenizer is None:
        raise DataError(
            f"{init}: has no tokenizer.json", hint="name its tokenizer with --tokenizer"
        )
    if tokenizer.vocab_size > vocab_size:
        raise MismatchError(
            f"{tokenizer.where}: has ids up to {tokenizer.vocab_size - 1}, the checkpoint "
            f"{init} has {vocab_size} embedding rows",
            hint="use the tokenizer the checkpoint was trained with",
        )
    if own is not None and given is not None and given.digest != own.digest:
        raise MismatchError(
            f"{given.where}: is not the tokenizer of the init checkpoint {init}",
            hint="leave --tokenizer out, the checkpoint brings its own",
        )
    return tokenizer


def encode_corpus(
    spec: TrainSpec, tokenizer: Tokenizer, length: int, cache_dir: Path, progress: Progress
) -> Corpus:
    """Encode the text (or map it from `cache_dir`) and hold a part out.

    Args:
        length: T; a held-out part shorter than one window is not used.

    Raises:
        DataError: see `read_documents`.
    """
    files.make_dir(cache_dir)
    text, valid_text = text_parts(spec)
    stream = tokens_of(text, tokenizer, cache_dir)
    if valid_text:
        held_out = tokens_of(valid_text, tokenizer, cache_dir)
        train, valid, key = stream.ids, held_out.ids, f"{stream.key}+{held_out.key}"
    else:
        size = min(_HELD_OUT_TOKENS, len(stream.ids) // _HELD_OUT_SHARE)
        cut = len(stream.ids) - (size if size > length else 0)
        train, valid, key = stream.ids[:cut], stream.ids[cut:], f"{stream.key}:{cut}"
    if len(valid) <= length:
        progress.warn(
            f"valid_text: {len(valid)} tokens held out, fewer than one window of {length} + 1; "
            "no validation"
        )
        valid = valid[:0]
    return Corpus(train, valid, key)
