"""What a run goes on from, and which of its weights stay as they are.

V vocabulary, L layers, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tolkit.data import Tokenizer
from tolkit.errors import InputError, MismatchError, UsageError
from tolkit.model import (
    Decoder,
    FfnRows,
    ModelConfig,
    RowSource,
    checkpoint_tensors,
    load_checkpoint,
)
from tolkit.runtime.decoded import DecodedRows
from tolkit.runtime.disk import DiskRows
from tolkit.runtime.recompute import RecomputeRows
from tolkit.runtime.rows import open_table_rows
from tolkit.sources import is_bundle
from tolkit.tables import load_runnable
from tolkit.train.distill import Teacher
from tolkit.train.frozen import FrozenRows
from tolkit.train.spec import TrainSpec
from tolkit.train.tuned import TunedTables, require_tunable
from tolkit_formats import digests
from tolkit_formats.reader import Bundle, open_bundle

__all__ = ["Origin", "freeze", "load_start", "load_teacher", "open_origin"]


@dataclass(frozen=True)
class Origin:
    """The model at `spec.init`: its shape, a digest of what decides the run, and token counts.

    bundle: open where it is one, None for a checkpoint.
    """

    path: Path
    config: ModelConfig
    digest: str
    counts_V: npt.NDArray[np.uint64] | None
    bundle: Bundle | None


def open_origin(spec: TrainSpec) -> Origin | None:
    """What `spec` goes on from, headers only; None for a new model.

    Raises:
        UsageError: a bundle without freeze_tables or tune_tables, tables to freeze where there are
            none, or to tune that share nothing.
        InputError and its kin: what is missing, damaged or of another kind.
    """
    if spec.init is None:
        return None
    if is_bundle(spec.init):
        return _bundle_origin(spec, spec.init)
    stored = checkpoint_tensors(spec.init)
    if spec.tune_tables:
        raise UsageError(
            f"tune_tables: {spec.init} is a checkpoint, expected a bundle",
            hint="make one with: tol compress CKPT -o B.tol --bits-per-value 0.5",
        )
    if spec.freeze_tables and not stored.config.has_tables:
        raise UsageError(
            f"freeze_tables: {spec.init} is a dense model and has no tables",
            hint="leave --freeze-tables out to go on training it whole",
        )
    weights = sorted(spec.init.glob("*.safetensors"))
    digest = "+".join(digests.file_digest(path) for path in weights)
    return Origin(spec.init, stored.config, digest, stored.token_counts(), None)


def _bundle_origin(spec: TrainSpec, path: Path) -> Origin:
    if not spec.freeze_tables and not spec.tune_tables:
        raise UsageError(
            f"init: {path} is a bundle, its tables cannot be trained, expected --freeze-tables too",
            hint="add --freeze-tables or --tune-tables, or name the checkpoint it was built from",
        )
    bundle = open_bundle(path)
    if spec.tune_tables:
        require_tunable(bundle)
    manifest = bundle.manifest
    if manifest.num_rows != manifest.vocab_size:
        raise InputError(
            f"{path}: has {manifest.num_rows:,} records for {manifest.vocab_size:,} tokens; "
            "only whole tables can be trained around"
        )
    config = ModelConfig.from_json(bundle.config(), f"{path}/config.json")
    return Origin(path, config, bundle.identity, bundle.token_counts(), bundle)


def load_start(
    spec: TrainSpec, origin: Origin | None, config: ModelConfig, device: torch.device
) -> tuple[Decoder, RowSource | None]:
    """The model a run starts with, float32, and its table rows; None: its FFN gives them.

    Weights that stay take no gradient; rows take one where they are tuned. A checkpoint's table
    rows are functions of its embedding, so freezing those tables freezes the embedding too.

    Raises:
        UsageError: see `freeze`; and what `load_runnable` and `load_checkpoint` raise.
    """
    rows: RowSource | None = None
    predicted = False
    if origin is None:
        # Drawn on the CPU, so a seed means the same weights on every device.
        drawn = torch.Generator().manual_seed(spec.seed)
        return Decoder(config, generator=drawn).to(device), rows
    if origin.bundle is not None:
        model = load_runnable(origin.path).model.to(device, torch.float32)
        if spec.tune_tables:
            return model.requires_grad_(False), TunedTables(origin.bundle, model.embedding, device)
        rows = FrozenRows(DiskRows(origin.bundle), config, device)
        predicted = bool(origin.bundle.manifest.predictors)
    else:
        model = load_checkpoint(origin.path, dtype=torch.float32, device=device)
        if spec.freeze_tables:
            rows = FrozenRows(FfnRows(model), config, device)
    freeze(spec, model, predicted=predicted)
    return model, rows


def freeze(spec: TrainSpec, model: Decoder, *, predicted: bool = False) -> None:
    """Take the gradient from what `spec` leaves as it is (mutated).

    Args:
        predicted: table rows are partly predicted from the embedding, so it has to stay.

    Raises:
        UsageError: nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        is_embedding = parameter is model.embedding
        in_tables = model.has_ffn and (".memory_" in name or is_embedding)
        read = is_embedding and (spec.freeze_embeddings or predicted)
        if (spec.freeze_tables and in_tables) or read:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"freeze_tables: {spec.init} has no other weights to train")


def load_teacher(
    spec: TrainSpec, tokenizer: Tokenizer, config: ModelConfig, length: int, device: torch.device
) -> Teacher | None:
    """The model at `spec.distill`, ready to be asked; None where none is named.

    Args:
        config: of the model that learns. length: positions of a window.

    Raises:
        MismatchError: another tokenizer or vocabulary, or fewer positions than a window.
    """
    if spec.distill is None:
        return None
    runnable = load_runnable(spec.distill)
    theirs = runnable.model.config
    if runnable.tokenizer.digest != tokenizer.digest or theirs.vocab_size != config.vocab_size:
        raise MismatchError(
            f"distill: {spec.distill} has another tokenizer or vocabulary, expected digest "
            f"{tokenizer.digest[:12]} and {config.vocab_size} rows, got "
            f"{runnable.tokenizer.digest[:12]} and {theirs.vocab_size}",
            hint="name the checkpoint the tables were built from",
        )
    if length > theirs.max_position_embeddings:
        raise MismatchError(
            f"distill: {spec.distill} reads at most {theirs.max_position_embeddings} positions, "
            f"a window has {length}",
            hint="give a smaller --sequence",
        )
    model = runnable.model.to(device, torch.float32).requires_grad_(False)
    rows: RowSource | None = None
    if isinstance(runnable.rows, DecodedRows | RecomputeRows):
        rows = FrozenRows(open_table_rows(runnable.rows.bundle), theirs, device)
    elif theirs.has_tables:
        rows = FrozenRows(FfnRows(model), theirs, device)
    weight = 1.0 if spec.distill_weight is None else spec.distill_weight
    return Teacher(model, rows, weight, runnable.identity)
