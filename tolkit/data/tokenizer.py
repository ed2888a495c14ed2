"""A tokenizer: byte-level BPE trained here, or anything in Hugging Face's tokenizer.json form.

Text is data: the spelling of a special token inside a text is encoded as ordinary characters,
and nothing (no bos, no eos) is added by `encode`. Only `encode_batch_marked` does both, where
numbers must equal those of other programs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tolkit.data.documents import Document
from tolkit.errors import DataError, UsageError
from tolkit_formats import digests, files
from tolkit_formats.errors import InputError
from tolkit_formats.limits import MAX_SMALL_FILE_BYTES

__all__ = ["Tokenizer"]

BOS, EOS = "<bos>", "<eos>"
SMALLEST_VOCAB = 256 + 2  # every byte, bos and eos

# Looked for, in this order, among the special tokens of a tokenizer without a config.
_BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "[BOS]")
_EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "[EOS]")
_TRAINING_PIECE_CHARACTERS = 1 << 20


class Tokenizer:
    """Text to ids and back. Build one with `load` or `train`.

    vocab_size: largest id + 1. bos_id, eos_id: None where the tokenizer has no such token.
    """

    def __init__(self, tokenizer_json: bytes, config_json: bytes | None, where: str) -> None:
        self.where = where
        self._json = tokenizer_json
        self._core = _parse_tokenizer(tokenizer_json, where)
        self._core.encode_special_tokens = True
        self._core.no_padding()
        self._core.no_truncation()
        vocabulary = self._core.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{where}: has an empty vocabulary")
        self.vocab_size: int = max(vocabulary.values()) + 1
        config = _parse_config(config_json, where) if config_json is not None else {}
        specials = _special_tokens(self._core)
        self.bos_id = _named_token("bos_token", config, _BOS_NAMES, specials, vocabulary, where)
        self.eos_id = _named_token("eos_token", config, _EOS_NAMES, specials, vocabulary, where)
        self._config_json = config_json if config_json is not None else self._own_config()
        self._marking_core: tokenizers.Tokenizer | None = None

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """A folder with tokenizer.json (or GPT-2's vocab.json and merges.txt), or the file itself.

        A tokenizer_config.json beside it says which tokens are bos and eos; without it, known
        names among the special tokens are taken.

        Raises:
            DataError: missing, not a tokenizer, or a config that names an unknown token.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        config_file = file.with_name("tokenizer_config.json")
        if path.is_dir() and not file.exists() and (path / "vocab.json").exists():
            return cls(_gpt2_files(path), _read_optional(config_file), str(path))
        if not file.is_file():
            raise DataError(f"{path}: no tokenizer.json here")
        return cls(_read(file), _read_optional(config_file), str(file))

    @classmethod
    def train(cls, documents: Iterable[Document], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE of at most `vocab_size` ids; 0 is <bos>, 1 is <eos>.

        Short text gives fewer ids (merges need two occurrences): look at `vocab_size`.

        Raises:
            UsageError: `vocab_size` below 258 (the bytes and two special tokens).
        """
        if vocab_size < SMALLEST_VOCAB:
            raise UsageError(
                f"vocab_size: at least {SMALLEST_VOCAB} for a byte-level tokenizer, "
                f"got {vocab_size}"
            )
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[BOS, EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        core.train_from_iterator(_training_pieces(documents), trainer)
        return cls(core.to_str(pretty=True).encode(), None, "trained tokenizer")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added."""
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all threads; faster than `encode` in a loop."""
        encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_batch_marked(self, texts: Sequence[str], *, add_special: bool) -> list[list[int]]:
        """Ids of each text as transformers' tokenizer of the same files gives them.

        Args:
            texts: where they spell out a special token, that token is meant.
            add_special: put around each text what the post-processor of tokenizer.json says
                (bos in front, for most Llamas; transformers reads no other file for this).
        """
        if self._marking_core is None:
            self._marking_core = _parse_tokenizer(self._json, self.where)
            self._marking_core.no_padding()
            self._marking_core.no_truncation()
        encodings = self._marking_core.encode_batch_fast(
            list(texts), add_special_tokens=add_special
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out."""
        text: str = self._core.decode(list(ids), skip_special_tokens=False)
        return text

    def files(self) -> dict[str, bytes]:
        """What a checkpoint folder keeps: tokenizer.json and tokenizer_config.json."""
        return {"tokenizer.json": self._json, "tokenizer_config.json": self._config_json}

    @property
    def digest(self) -> str:
        """SHA-256 of the vocabulary in id order (SPEC section 7)."""
        return digests.tokenizer_digest(self._json, self.vocab_size, self.where)

    def _own_config(self) -> bytes:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if token_id is not None:
                config[name] = self._core.id_to_token(token_id)
        return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _parse_tokenizer(data: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the binding raises bare Exception for any fault in the file
        raise DataError(f"{where}: not a tokenizers file ({str(error)[:200]})") from error


def _parse_config(data: bytes, where: str) -> dict[str, Any]:
    name = os.path.join(os.path.dirname(where), "tokenizer_config.json")
    try:
        config = json.loads(data)  # not strict: real files hold 1e30 as an integer
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise DataError(f"{name}: expected a JSON object")
    return config


def _special_tokens(core: tokenizers.Tokenizer) -> dict[str, int]:
    added = core.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.special}


def _named_token(
    field: str,
    config: dict[str, Any],
    known_names: Sequence[str],
    specials: dict[str, int],
    vocabulary: dict[str, int],
    where: str,
) -> int | None:
    """Id of the token a config names; without a config entry, of a special token known by name."""
    if field not in config:
        return next((specials[name] for name in known_names if name in specials), None)
    named = config[field]
    content = named.get("content") if isinstance(named, dict) else named
    if content is None:
        return None
    if content not in vocabulary:
        raise DataError(f"{where}: tokenizer_config.json names {field} {content!r}, unknown to it")
    return vocabulary[content]


def _gpt2_files(folder: Path) -> bytes:
    """tokenizer.json for GPT-2's two files; <|endoftext|> becomes a special token."""
    _read(folder / "vocab.json")
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the binding raises bare Exception
        raise DataError(f"{folder}: vocab.json and merges.txt do not fit ({error})") from error
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if core.token_to_id("<|endoftext|>") is not None:
        core.add_special_tokens(["<|endoftext|>"])
    data: bytes = core.to_str(pretty=False).encode()
    return data


def _read(path: Path) -> bytes:
    try:
        return files.read_bytes(path, limit_bytes=MAX_SMALL_FILE_BYTES)
    except InputError as error:
        raise DataError(error.message) from error


def _read_optional(path: Path) -> bytes | None:
    return _read(path) if path.is_file() else None


def _training_pieces(documents: Iterable[Document]) -> Iterator[str]:
    """Documents cut at line ends into pieces of about a megabyte, so one huge file streams."""
    for document in documents:
        text, start = document.text, 0
        while len(text) - start > _TRAINING_PIECE_CHARACTERS:
            cut = text.find("\n", start + _TRAINING_PIECE_CHARACTERS) + 1
            if cut == 0:
                break
            yield text[start:cut]
            start = cut
        yield text[start:]
