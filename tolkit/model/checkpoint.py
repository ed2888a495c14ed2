"""Checkpoints in and out: a whole Decoder from a folder, and a folder from a Decoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.errors import MismatchError, NonFiniteError, OutputExistsError, UsageError
from tolkit.model.config import ModelConfig
from tolkit.model.decoder import Decoder
from tolkit.model.files import (
    COUNTS_FILE,
    COUNTS_NAME,
    TOKENIZER_FILES,
    TORCH_DTYPES,
    checkpoint_tensors,
    expected_shapes,
    require_finite,
)
from tolkit_formats import files
from tolkit_formats.tensorfile import write_tensors

__all__ = [
    "MAX_SHARD_BYTES",
    "as_stored",
    "decoder_from_tensors",
    "load_checkpoint",
    "save_checkpoint",
]

MAX_SHARD_BYTES = 5 << 30
_STORED = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_PT = {"format": "pt"}  # transformers 4 asks for it


def load_checkpoint(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    with_ffn: bool = True,
) -> Decoder:
    """A decoder with the weights of a checkpoint folder, in memory of its own.

    Args:
        path: the folder.
        dtype: of all parameters; by default the narrowest that holds what is stored exactly.
        device: where the parameters go.
        with_ffn: False leaves the memory FFNs and their norms on disk, for running from tables.

    Raises:
        CheckpointError, UnsafeInputError: see `checkpoint_tensors`.
        NonFiniteError: a weight is NaN or infinite; tensor and row are named.
    """
    stored = checkpoint_tensors(path)
    return decoder_from_tensors(
        stored.config,
        stored.tensor,
        dtype=dtype or stored.stored_dtype(),
        device=device,
        with_ffn=with_ffn,
        where=stored.path,
    )


def decoder_from_tensors(
    config: ModelConfig,
    tensor: Callable[[str], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    with_ffn: bool = True,
    where: Path | str = "weights",
) -> Decoder:
    """A decoder whose parameters are copies of `tensor(name)` for every name of the model.

    Args:
        tensor: gives a tensor by its checkpoint name, in the shape of `expected_shapes`.
        where: what to call the source in errors.

    Raises:
        NonFiniteError: a weight is NaN or infinite, before or after the cast to `dtype`.
    """
    with torch.device("meta"):
        model = Decoder(config, with_ffn=with_ffn)
    state: dict[str, Tensor] = {}
    for name in expected_shapes(config, with_ffn=with_ffn):
        source = tensor(name)
        weight = source.to(device=device, dtype=dtype, copy=True)
        try:
            require_finite(weight, name, where)
        except NonFiniteError as error:
            require_finite(source, name, where)
            raise NonFiniteError(
                f"{error.message} after the cast from {source.dtype} to {dtype}",
                hint="load it in bfloat16 or float32",
            ) from None
        state[name] = weight
    model.load_state_dict(state, strict=True, assign=True)
    return model


def save_checkpoint(
    model: Decoder,
    path: Path | str,
    tokenizer_files: Mapping[str, bytes] | None = None,
    token_counts: Tensor | npt.NDArray[np.uint64] | None = None,
    force: bool = False,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint folder; it appears under `path` complete or not at all.

    The same model gives the same bytes. Everything is written and fsynced in the sibling
    `NAME.partial`, which then takes the name.

    Args:
        model: weights in float32, float16 or bfloat16; unchanged. Memory FFNs must be present.
        path: the folder to create.
        tokenizer_files: file name -> content, usually tokenizer.json and tokenizer_config.json.
        token_counts: how often training saw each token, integers [V].
        force: replace an existing checkpoint folder.
        max_shard_bytes: weights above this are split into shards with an index.

    Raises:
        OutputExistsError: `path` exists and `force` is not given, or `NAME.partial` is something
            else than what an interrupted save left (a training run, a folder of the user's).
        UsageError: the model has no FFN weights, or `path` is something other than a checkpoint.
        NonFiniteError: a weight is NaN or infinite; nothing is written.
        MismatchError: token_counts does not have V entries.
    """
    path = Path(path)
    _check_destination(path, force)
    weights = _stored_weights(model, path)
    counts = None if token_counts is None else _counts(token_counts, model.config.vocab_size)
    work = path.with_name(path.name + ".partial")
    _require_own(work, set(tokenizer_files or ()))
    files.remove_tree(work)
    files.make_dir(work)
    for name, content in sorted((tokenizer_files or {}).items()):
        assert Path(name).name == name, name
        files.write_atomic(work / name, content)
    if counts is not None:
        write_tensors(work / COUNTS_FILE, {COUNTS_NAME: ("U64", counts)})
    _write_shards(work, weights, max_shard_bytes)
    dtype = str(model.embedding.dtype).removeprefix("torch.")
    files.write_atomic(work / "config.json", _json({**model.config.to_json(), "dtype": dtype}))
    files.fsync_dir(work)
    files.publish_dir(work, path, force=force)


def _check_destination(path: Path, force: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise OutputExistsError(
            f"{path}: exists already", hint="choose another output or give --force"
        )
    if path.is_symlink() or not path.is_dir():
        raise UsageError(f"{path}: is not a folder, only a checkpoint folder can be replaced")
    if any(path.iterdir()) and not (path / "config.json").is_file():
        raise UsageError(f"{path}: is not a checkpoint folder and will not be replaced")


def _require_own(work: Path, tokenizer_names: set[str]) -> None:
    known = {"config.json", COUNTS_FILE, *TOKENIZER_FILES, *tokenizer_names}
    if not work.exists() and not work.is_symlink():
        return
    ours = work.is_dir() and not work.is_symlink()
    if ours and all(
        entry.name in known or entry.name.endswith(".tmp") or entry.name.startswith("model")
        for entry in work.iterdir()
    ):
        return
    raise OutputExistsError(
        f"{work}: is in the way and not what an interrupted save left, left alone",
        hint="move it away, finish the training run in it, or choose another output",
    )


def _stored_weights(model: Decoder, path: Path) -> dict[str, Tensor]:
    weights = model.state_dict()
    missing = set(expected_shapes(model.config)) - set(weights)
    if missing:
        raise UsageError(f"{path}: the model was loaded without its FFN and cannot be saved")
    for name, weight in weights.items():
        if weight.dtype not in _STORED:
            raise UsageError(f"{path}: cannot store {weight.dtype}, expected f32, f16 or bf16")
        require_finite(weight, name, path)
    return weights


def _counts(
    token_counts: Tensor | npt.NDArray[np.uint64], vocab_size: int
) -> npt.NDArray[np.uint64]:
    counts = token_counts.cpu().numpy() if isinstance(token_counts, Tensor) else token_counts
    if counts.shape != (vocab_size,):
        raise MismatchError(f"token_counts: shape {list(counts.shape)}, expected [{vocab_size}]")
    return counts.astype(np.uint64)


def _write_shards(work: Path, weights: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, weight in weights.items():
        if weight.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= weight.nbytes
    if len(shards) == 1:
        _write_shard(work / "model.safetensors", shards[0], weights)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(work / shard, names, weights)
        weight_map.update(dict.fromkeys(names, shard))
    total_bytes = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    files.write_atomic(work / "model.safetensors.index.json", _json(index))


def _write_shard(path: Path, names: list[str], weights: Mapping[str, Tensor]) -> None:
    write_tensors(path, {name: as_stored(weights[name]) for name in names}, _PT)


def as_stored(weight: Tensor) -> tuple[str, npt.NDArray[np.generic]]:
    """A float32, float16 or bfloat16 tensor as `write_tensors` takes it: dtype name and bits."""
    bits = torch.int16 if weight.dtype.itemsize == 2 else torch.int32
    return _STORED[weight.dtype], weight.detach().cpu().contiguous().view(bits).numpy()


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode("ascii") + b"\n"
