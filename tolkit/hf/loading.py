"""Weights from a local folder, with tolkit's own loader: a checkpoint or a bundle.

Nothing in the folder is executed and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tolkit.errors import CheckpointError, UsageError
from tolkit.evaluate.runnable import pick_device, pick_dtype
from tolkit.model import Decoder, RowSource, checkpoint_tensors, load_checkpoint
from tolkit.model.files import require_finite
from tolkit.sources import is_bundle
from tolkit.tables import load_runnable

__all__ = ["LoadOptions", "Loaded", "load"]

# Where the files come from is settled by the folder, and no code is ever taken from it.
_MEANINGLESS = frozenset({
    "_commit_hash", "_from_auto", "adapter_kwargs", "cache_dir", "code_revision", "force_download",
    "local_files_only", "low_cpu_mem_usage", "proxies", "revision", "token", "trust_remote_code",
})  # fmt: skip


@dataclass(frozen=True)
class LoadOptions:
    """What `from_pretrained` can be told: number format (None: as stored) and device."""

    dtype: torch.dtype | None
    device: torch.device

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> LoadOptions:
        """From the keyword arguments of transformers' `from_pretrained`.

        Raises:
            UsageError: an argument this model has no use for, named.
            ResourceError: no such device here.
        """
        given = {k: v for k, v in kwargs.items() if k not in _MEANINGLESS and v is not None}
        old_dtype = given.pop("torch_dtype", None)
        dtype = given.pop("dtype", old_dtype)
        device_map = given.pop("device_map", None)
        if given.pop("use_safetensors", True) is not True:
            raise UsageError("use_safetensors: pickle weights are never opened, expected True")
        attention = given.pop("attn_implementation", "sdpa")
        if attention != "sdpa":
            raise UsageError(f"attn_implementation: {attention!r} is not there, expected 'sdpa'")
        if given:
            raise UsageError(
                f"from_pretrained: {', '.join(sorted(given))}: not supported for memory and flex "
                "models, expected dtype or device_map",
                hint="change other settings on model.config or model.generation_config",
            )
        return cls(_dtype(dtype), _device(device_map))


@dataclass(frozen=True)
class Loaded:
    """A decoder ready to run, its rows where it has no FFN, and what goes with a checkpoint."""

    decoder: Decoder
    rows: RowSource | None = None
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)
    token_counts: npt.NDArray[np.uint64] | None = None


def load(path: Path, options: LoadOptions) -> Loaded:
    """Load a memory or flex checkpoint, or a bundle.

    Raises:
        InputError and its kin: missing, damaged or unsafe files.
        UsageError: a dense checkpoint, which is transformers' own Llama.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder, expected a checkpoint or a bundle on this machine",
            hint="download the model into a folder first",
        )
    return _load_bundle(path, options) if is_bundle(path) else _load_checkpoint(path, options)


def _load_checkpoint(path: Path, options: LoadOptions) -> Loaded:
    stored = checkpoint_tensors(path)
    if not stored.config.has_tables:
        raise UsageError(
            f"{path}: is a dense model, which is transformers' own Llama",
            hint="use AutoModelForCausalLM or LlamaForCausalLM",
        )
    decoder = load_checkpoint(path, dtype=options.dtype, device=options.device)
    return Loaded(decoder, None, stored.tokenizer_files(), stored.token_counts())


def _load_bundle(path: Path, options: LoadOptions) -> Loaded:
    runnable = load_runnable(path)
    decoder = runnable.model.to(device=options.device, dtype=options.dtype)
    for name, weight in decoder.state_dict().items():
        require_finite(weight, name, path)  # a cast to float16 can overflow
    return Loaded(decoder, runnable.rows)


def _dtype(value: Any) -> torch.dtype | None:
    return None if value is None or value == "auto" else pick_dtype(value)


def _device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        device_map = f"cuda:{device_map}"
    if device_map is None:
        return torch.device("cpu")
    if not isinstance(device_map, str | torch.device) or device_map == "auto":
        raise UsageError(
            f"device_map: {device_map!r} is not supported, expected one device for the whole model",
            hint="use device_map='cpu' or device_map='cuda:0'",
        )
    return pick_device(str(device_map))
