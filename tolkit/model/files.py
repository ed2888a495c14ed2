"""A checkpoint folder opened without loading it: names, shapes, mapped tensors.

V vocabulary, D hidden. The folder is a Hugging Face one: config.json, model.safetensors (or an
index and shards), tokenizer.json, tokenizer_config.json, token_counts.safetensors (one tensor,
"token_counts", U64 [V]). Nothing in it is ever executed: pickle files are refused unopened,
`auto_map` is ignored.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.errors import (
    BundleError,
    CheckpointError,
    InputError,
    NonFiniteError,
    UnsafeInputError,
)
from tolkit.model.config import ModelConfig
from tolkit.model.decoder import Decoder
from tolkit_formats import files, strict_json
from tolkit_formats.tensorfile import TensorFile, TensorInfo

__all__ = [
    "COUNTS_FILE",
    "COUNTS_NAME",
    "TOKENIZER_FILES",
    "TORCH_DTYPES",
    "CheckpointFiles",
    "as_tensor",
    "checkpoint_tensors",
    "expected_shapes",
    "mapped_tensor",
    "require_finite",
]

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
COUNTS_FILE = "token_counts.safetensors"
COUNTS_NAME = "token_counts"

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")
_CONFIG_LIMIT_BYTES = 1 << 20
_INDEX_LIMIT_BYTES = 64 << 20
_HEADER_LIMIT_BYTES = 16 << 20
_FINITE_CHUNK_VALUES = 1 << 18  # temporaries stay in the cache, and off the heap's top


def expected_shapes(config: ModelConfig, *, with_ffn: bool = True) -> dict[str, tuple[int, ...]]:
    """Tensor names of a checkpoint and their shapes, in the model's own order."""
    with torch.device("meta"):
        model = Decoder(config, with_ffn=with_ffn)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def require_finite(tensor: Tensor, name: str, where: Path | str) -> None:
    """Raise NonFiniteError naming tensor and row (first axis) of the first NaN or infinity."""
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    step = max(1, _FINITE_CHUNK_VALUES // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        finite = torch.isfinite(rows[start : start + step])
        if not finite.all():
            row, column = (int(i) for i in (~finite).nonzero()[0])
            place = f"row {start + row}" if tensor.dim() > 1 else f"entry {column}"
            raise NonFiniteError(
                f"{where}: tensor {name!r} holds {rows[start + row, column].item()} in {place}, "
                "expected finite weights"
            )


def mapped_tensor(file: TensorFile, name: str) -> Tensor:
    """A tensor mapped from a safetensors file, in its stored dtype; writing to it crashes."""
    return as_tensor(file.array(name), TORCH_DTYPES[file.infos[name].dtype])


def as_tensor(stored: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
    """A mapped array of the reader's (BF16 as its uint16 bits) as a tensor of `dtype`."""
    if stored.ctypes.data % dtype.itemsize:
        stored = stored.copy()  # a header whose length is not a multiple of the item size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable": documented above
        return torch.from_numpy(stored.view(np.dtype(f"i{dtype.itemsize}"))).view(dtype)


class CheckpointFiles:
    """The tensors of one checkpoint, mapped read-only from its files.

    Opening reads headers only and checks every name and shape against config.json.
    Attributes: `path`, `config`, `names` (the model's order).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamps = _stamps(path)
        self.config = ModelConfig.from_json(_read_config(path), str(path / "config.json"))
        self._home = _open_shards(path)
        shapes = expected_shapes(self.config)
        self._check(shapes)
        self.names: tuple[str, ...] = tuple(shapes)

    def require_unchanged(self) -> None:
        """CheckpointError when a file of the folder is not the one that was opened.

        A mapped file that is written in place gives new values without a word.
        """
        now = _stamps(self.path)
        for name in sorted(self._stamps.keys() | now.keys()):
            if self._stamps.get(name) != now.get(name):
                raise CheckpointError(
                    f"{self.path / name}: changed while it was read",
                    hint="run the same command again once nothing writes to the checkpoint",
                )

    def info(self, name: str) -> TensorInfo:
        """Stored dtype and shape of a tensor, and its byte range in its file."""
        return self._shard(name).infos[name]

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """The stored bytes as a read-only mapped array (bf16 as uint16), for digests."""
        return self._shard(name).array(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor mapped from its file, in its stored dtype; writing to it crashes."""
        return mapped_tensor(self._shard(name), name)

    def stored_dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every stored tensor exactly."""
        result = TORCH_DTYPES[self.info(self.names[0]).dtype]
        for name in self.names[1:]:
            result = torch.promote_types(result, TORCH_DTYPES[self.info(name).dtype])
        return result

    def check_finite(self, names: tuple[str, ...] | None = None) -> None:
        """NonFiniteError when one of `names` (default: all) holds NaN or infinity."""
        for name in self.names if names is None else names:
            require_finite(self.tensor(name), name, self.path)

    @property
    def tokenizer_bytes(self) -> bytes | None:
        """tokenizer.json as stored, or None."""
        return self.tokenizer_files().get(TOKENIZER_FILES[0])

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer files present, by name."""
        return {
            name: files.read_bytes(self.path / name, limit_bytes=256 << 20)
            for name in TOKENIZER_FILES
            if (self.path / name).is_file()
        }

    def token_counts(self) -> npt.NDArray[np.uint64] | None:
        """How often training saw each token, uint64 [V] in memory; None when not recorded."""
        path = self.path / COUNTS_FILE
        if not path.exists():
            return None
        file = _open(path)
        try:
            counts = file.expect(COUNTS_NAME, "U64", (self.config.vocab_size,))
        except BundleError as error:
            raise CheckpointError(error.message) from error
        return np.array(counts, dtype=np.uint64)

    def _shard(self, name: str) -> TensorFile:
        if name not in self._home:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self._home[name]

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            info = self.info(name)
            where = f"{self._home[name].path}: tensor {name!r}"
            if info.shape != shape:
                raise CheckpointError(
                    f"{where}: shape {list(info.shape)}, expected {list(shape)} from config.json"
                )
            if info.dtype not in TORCH_DTYPES:
                raise CheckpointError(
                    f"{where}: dtype {info.dtype} is not read, expected {', '.join(TORCH_DTYPES)}"
                )
        for name in sorted(set(self._home) - set(shapes)):
            if not self._harmless(name):
                raise CheckpointError(f"{self._home[name].path}: unexpected tensor {name!r}")

    def _harmless(self, name: str) -> bool:
        """Tensors older writers add: rotary constants, and the tied head's second copy."""
        if name.endswith(".rotary_emb.inv_freq"):
            return True
        return (
            name == "lm_head.weight"
            and self.config.tie_word_embeddings
            and np.array_equal(self.array(name), self.array("model.embed_tokens.weight"))
        )


def checkpoint_tensors(path: Path | str) -> CheckpointFiles:
    """Open a checkpoint folder without loading its weights.

    Raises:
        CheckpointError: missing folder, config or tensor, truncated file, wrong name or shape.
        UnsafeInputError: only pickle weights, or an index that points outside the folder.
    """
    return CheckpointFiles(Path(path))


def _stamps(path: Path) -> dict[str, tuple[int, int, int]]:
    """Identity, size and time of change of the files a checkpoint is read from."""
    result = {}
    for entry in sorted(path.iterdir()) if path.is_dir() else []:
        if entry.suffix in {".json", ".safetensors"} and entry.is_file():
            status = entry.stat()
            result[entry.name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return result


def _read_config(path: Path) -> Mapping[str, object]:
    if path.suffix.lower() in _PICKLES and path.is_file():
        raise _pickle_error(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file, expected a checkpoint folder")
    config = path / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{path}: no config.json, expected a checkpoint folder (config.json, {_WEIGHTS})"
        )
    return _read_json(config, _CONFIG_LIMIT_BYTES)


def _read_json(path: Path, limit_bytes: int) -> Mapping[str, object]:
    try:
        value: Any = strict_json.parse(files.read_bytes(path, limit_bytes=limit_bytes), str(path))
    except InputError as error:
        raise CheckpointError(error.message, hint=error.hint) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _pickle_error(path: Path) -> UnsafeInputError:
    return UnsafeInputError(
        f"{path}: pickle weights can run code and are never opened, expected {_WEIGHTS}",
        hint="convert it where you trust it: model.save_pretrained(DIR, safe_serialization=True)",
    )


def _open(path: Path) -> TensorFile:
    # Hub caches hold links to blobs, so links are followed here; what they lead to is only parsed.
    try:
        return TensorFile(path.resolve(), max_header_bytes=_HEADER_LIMIT_BYTES)
    except BundleError as error:
        raise CheckpointError(
            error.message, hint="fetch or save the checkpoint again; the file is damaged"
        ) from error
    except InputError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from error


def _open_shards(path: Path) -> dict[str, TensorFile]:
    """Tensor name -> the file that holds it."""
    if (path / _WEIGHTS).exists():
        whole = _open(path / _WEIGHTS)
        return dict.fromkeys(whole.names, whole)
    if (path / _INDEX).exists():
        return _open_index(path)
    for entry in sorted(path.iterdir()):
        if entry.suffix.lower() in _PICKLES:
            raise _pickle_error(entry)
    raise CheckpointError(f"{path}: no weights, expected {_WEIGHTS} or {_INDEX}")


def _open_index(path: Path) -> dict[str, TensorFile]:
    index = path / _INDEX
    weight_map = _read_json(index, _INDEX_LIMIT_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: no weight_map object")
    shards: dict[str, TensorFile] = {}
    home: dict[str, TensorFile] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise UnsafeInputError(
                f"{index}: tensor {name!r} points to {shard!r}, expected a file name in the folder"
            )
        if Path(shard).suffix.lower() in _PICKLES:
            raise _pickle_error(path / shard)
        if shard not in shards:
            if not (path / shard).exists():
                raise CheckpointError(f"{index}: shard {shard} is missing")
            shards[shard] = _open(path / shard)
        if name not in shards[shard].infos:
            raise CheckpointError(f"{path / shard}: tensor {name!r} is missing, the index names it")
        home[name] = shards[shard]
    for shard, file in shards.items():
        for name in file.names:
            if home.get(name) is not file:
                raise CheckpointError(
                    f"{path / shard}: unexpected tensor {name!r}, not in the index"
                )
    return home


def _is_plain_name(name: str) -> bool:
    return bool(name) and name not in {".", ".."} and not set(name) & set("/\\\0")
