"""The decoder (dense, memory, flex), its configurations and its checkpoints."""

from tolkit.model.cache import DecoderCache, KVCache
from tolkit.model.checkpoint import decoder_from_tensors, load_checkpoint, save_checkpoint
from tolkit.model.config import ModelConfig
from tolkit.model.counts import ParameterCounts, count_parameters
from tolkit.model.decoder import Block, Decoder
from tolkit.model.files import CheckpointFiles, checkpoint_tensors, expected_shapes
from tolkit.model.gather import DistinctTokens
from tolkit.model.layer_ffn import LayerFfn
from tolkit.model.presets import PRESETS, preset
from tolkit.model.rows import FfnRows, RowSource
from tolkit.model.shared_rows import SharedRows

__all__ = [
    "PRESETS",
    "Block",
    "CheckpointFiles",
    "Decoder",
    "DecoderCache",
    "DistinctTokens",
    "FfnRows",
    "KVCache",
    "LayerFfn",
    "ModelConfig",
    "ParameterCounts",
    "RowSource",
    "SharedRows",
    "checkpoint_tensors",
    "count_parameters",
    "decoder_from_tensors",
    "expected_shapes",
    "load_checkpoint",
    "preset",
    "save_checkpoint",
]
