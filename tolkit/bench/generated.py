"""Models and bundles of any shape without training: random weights, random rows, made in seconds.

What they say is noise; what they cost to run is what a trained one of the shape costs.
V vocabulary, L layers, D hidden, N rows of a block, S record stride.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.compress.codecs import encoder_for
from tolkit.errors import UsageError
from tolkit.model import Decoder, ModelConfig
from tolkit.progress import Progress
from tolkit_formats import files
from tolkit_formats.codecs import Codec, codec_from_json
from tolkit_formats.digests import json_digest
from tolkit_formats.limits import BLOCK_ROWS
from tolkit_formats.manifest import (
    Encoding,
    HistoryEntry,
    LayerDigests,
    LayerStatus,
    Manifest,
    Sources,
)
from tolkit_formats.reader import Bundle, open_bundle
from tolkit_formats.records import Tier, lay_out
from tolkit_formats.strict_json import canonical
from tolkit_formats.writer import BundleWriter

__all__ = ["CODECS", "generated_bundle", "generated_decoder", "table_bytes"]

CODECS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "f16": {"name": "raw", "dtype": "f16"},
        "int8": {"name": "int8"},
        "nf4": {"name": "nf4", "group_size": 64},
    }
)
"""Codecs of generated tables: those whose rows need nothing shared."""

_PATTERN_VALUES = 1 << 20
_ROW_STD = 0.05  # keeps the residual stream finite over many layers
_NO_DIGEST = "0" * 64


def generated_decoder(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Decoder:
    """A decoder without token FFNs, weights drawn once for a mebi-value and repeated.

    Equal for equal arguments. Its time and memory are those of any weights of the shape.
    """
    with torch.device("meta"):
        model = Decoder(config, with_ffn=False).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.empty(_PATTERN_VALUES).normal_(0.0, 0.02, generator=generator)
    pattern = pattern.to(device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1)
            else:
                _repeat(pattern, parameter.view(-1))
    return model.eval().requires_grad_(False)


def table_bytes(config: ModelConfig, codec: str) -> int:
    """Bytes of records that `generated_bundle` writes."""
    tier = _tier(config, _codec(codec, config.hidden_size))
    return tier.num_rows * tier.stride


def generated_bundle(folder: Path, config: ModelConfig, codec: str, progress: Progress) -> Bundle:
    """Tables of a model's shape in `folder`, made on the first call and found on later ones.

    One block of random rows is encoded by the codec's own encoder, then repeated with the CRC of
    each slot, so a reader checks and decodes what it would of real tables. No counts, no
    tokenizer, no backbone worth the name.

    Raises:
        UsageError: a codec that is none of `CODECS`.
        ResourceError: no room.
        BundleError: something else has the name.
    """
    shape = (config.vocab_size, config.num_hidden_layers, config.hidden_size)
    path = folder / f"tables-{'x'.join(map(str, shape))}-{codec}.tol"
    if path.exists():
        return open_bundle(path)
    files.make_dir(folder)
    files.require_free(folder, table_bytes(config, codec))
    stored = _codec(codec, config.hidden_size)
    tier = _tier(config, stored)
    with BundleWriter(path, fingerprint=json_digest([*shape, codec])) as writer:
        writer.put_file("config.json", canonical(config.to_json()))
        nothing = {"none": ("U8", np.zeros(1, np.uint8))}
        writer.put_tensors("backbone.safetensors", nothing)
        block_NS = _block(tier, stored, config.hidden_size)
        with progress.task("tables", tier.num_rows, "rows") as task:
            for shard in range(tier.num_shards):
                if writer.shard_done(tier, shard):
                    task.advance(tier.shard_rows(shard))
                    continue
                with writer.open_shard(tier, shard) as out:
                    for first in range(0, tier.shard_rows(shard), BLOCK_ROWS):
                        count = min(BLOCK_ROWS, tier.shard_rows(shard) - first)
                        out.write(block_NS[:count])
                        task.advance(count)
        writer.publish(_manifest(config, tier))
    return open_bundle(path)


def _codec(name: str, hidden_size: int) -> Codec:
    if name not in CODECS:
        raise UsageError(f"codec: expected {', '.join(CODECS)}, got {name!r}")
    return codec_from_json(CODECS[name], hidden_size)


def _tier(config: ModelConfig, codec: Codec) -> Tier:
    planes = [(layer, codec) for layer in range(config.num_hidden_layers)]
    return lay_out(planes, config.vocab_size)


def _block(tier: Tier, codec: Codec, hidden_size: int) -> npt.NDArray[np.uint8]:
    """Records U8 [1024, S] of random rows, CRCs left open; layers take turns with a few planes."""
    generator = torch.Generator().manual_seed(1)
    encoder = encoder_for(codec)
    records_NS = np.zeros((BLOCK_ROWS, tier.stride), np.uint8)
    drawn = []
    for _ in range(min(2, len(tier.planes))):
        rows_ND = torch.empty(BLOCK_ROWS, hidden_size).normal_(0.0, _ROW_STD, generator=generator)
        drawn.append(encoder.encode(rows_ND, {})[0].numpy())
    for place, plane in enumerate(tier.planes):
        records_NS[:, plane.offset : plane.offset + plane.length] = drawn[place % len(drawn)]
    return records_NS


def _manifest(config: ModelConfig, tier: Tier) -> Manifest:
    layers = config.num_hidden_layers
    return Manifest(
        vocab_size=config.vocab_size,
        num_layers=layers,
        hidden_size=config.hidden_size,
        layers=(LayerStatus("kept"),) * layers,
        tiers=(tier,),
        encoding=Encoding(False, tuple(range(layers))),
        sources=Sources(
            _NO_DIGEST,
            None,
            json_digest(config.to_json()),
            (LayerDigests(_NO_DIGEST, _NO_DIGEST),) * layers,
        ),
        files={},
        history=(HistoryEntry("bench", {"rows": "random"}, None, "generated"),),
    )


def _repeat(pattern: Tensor, out: Tensor) -> None:
    for start in range(0, out.numel(), pattern.numel()):
        part = out[start : start + pattern.numel()]
        part.copy_(pattern[: part.numel()])
