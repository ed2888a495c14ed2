"""Models ready to run: a checkpoint with its FFNs, or a bundle's backbone with table rows.

V vocabulary, L layers, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tolkit.data import Tokenizer
from tolkit.errors import (
    BundleError,
    CheckpointError,
    MismatchError,
    UnsupportedVersionError,
)
from tolkit.model import (
    Decoder,
    ModelConfig,
    RowSource,
    checkpoint_tensors,
    decoder_from_tensors,
    load_checkpoint,
)
from tolkit.model.files import expected_shapes, mapped_tensor
from tolkit.origin import require_same_sources
from tolkit.runtime.decoded import DecodedRows
from tolkit.runtime.recompute import RecomputeRows
from tolkit.sources import CheckpointSource, is_bundle
from tolkit_formats import digests
from tolkit_formats.manifest import Sources
from tolkit_formats.reader import Bundle, open_bundle
from tolkit_formats.tensorfile import TensorFile

if TYPE_CHECKING:
    from tolkit.evaluate import Adjust

__all__ = [
    "Runnable",
    "bundle_decoder",
    "bundle_tokenizer",
    "checkpoint_tokenizer",
    "load_runnable",
    "require_partners",
]

_BACKBONE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Runnable:
    """A model that can score text.

    Attributes:
        kind: ``checkpoint`` or ``bundle``.
        identity: a bundle's identity; a digest of all weights for a checkpoint.
        rows: None where the model computes its own FFNs.
        sources: digests of what the tables come from; None for dense checkpoints.
        adjust: as `tolkit.evaluate.Runnable` says; None as loaded.
        healed: a bundle whose backbone was trained around its tables (tol train --freeze-tables).
    """

    path: Path
    kind: str
    identity: str
    model: Decoder
    rows: RowSource | None
    tokenizer: Tokenizer
    sources: Sources | None
    table_bytes: int | None = None
    bits_per_value: float | None = None
    adjust: Adjust | None = None
    healed: bool = False


def load_runnable(path: str | Path) -> Runnable:
    """Load a checkpoint folder or a bundle for running on the CPU in its stored dtype.

    Raises:
        InputError and its kin for what is missing or damaged; CheckpointError without tokenizer.
    """
    path = Path(path)
    return _from_bundle(path) if is_bundle(path) else _from_checkpoint(path)


def _from_checkpoint(path: Path) -> Runnable:
    stored = checkpoint_tensors(path)
    tokenizer = checkpoint_tokenizer(path, stored.config.vocab_size)
    model = load_checkpoint(path)
    weights = {
        name: digests.array_digest(
            stored.info(name).dtype, stored.info(name).shape, [stored.array(name)]
        )
        for name in stored.names
    }
    return Runnable(
        path=path,
        kind="checkpoint",
        identity=digests.json_digest(weights),
        model=model,
        rows=None,
        tokenizer=tokenizer,
        sources=CheckpointSource(path).sources() if stored.config.has_tables else None,
    )


def checkpoint_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint folder; MismatchError where it has more ids than the model."""
    if not (path / "tokenizer.json").is_file():
        raise _no_tokenizer(path)
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > vocab_size:
        raise MismatchError(
            f"{tokenizer.where}: has {tokenizer.vocab_size} token ids, the model's vocabulary has "
            f"{vocab_size} rows",
            hint="use the tokenizer the checkpoint was trained with",
        )
    return tokenizer


def bundle_decoder(
    bundle: Bundle, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Decoder:
    """A bundle's backbone, without the FFNs its tables stand for; dtype None: as stored.

    Raises:
        UnsupportedVersionError: the tables are not added to the residual stream as they are.
        BundleError: the backbone does not fit the configuration.
    """
    path, manifest = bundle.path, bundle.manifest
    if manifest.combine != "residual_add" or manifest.lookup_scale != 1:
        raise UnsupportedVersionError(
            f"{path}/tol.json: combine is {manifest.combine!r} and lookup_scale "
            f"{manifest.lookup_scale:g}, this tolkit runs 'residual_add' and 1",
        )
    config = ModelConfig.from_json(bundle.config(), f"{path}/config.json")
    backbone = bundle.tensor_file("backbone.safetensors")
    stored = _backbone_dtype(backbone, config)
    return decoder_from_tensors(
        config,
        lambda name: mapped_tensor(backbone, name),
        dtype=stored if dtype is None else dtype,
        device=device,
        with_ffn=False,
        where=path,
    )


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer a bundle's tables are for; BundleError where the file is another's."""
    path, manifest = bundle.path, bundle.manifest
    tokenizer_json = bundle.file_bytes("tokenizer.json")
    if tokenizer_json is None:
        raise _no_tokenizer(path)
    digest = digests.tokenizer_digest(tokenizer_json, bundle.vocab_size, f"{path}/tokenizer.json")
    if digest != manifest.sources.tokenizer:
        raise BundleError(f"{path}/tokenizer.json: is not the one the tables are for")
    return Tokenizer(
        tokenizer_json, bundle.file_bytes("tokenizer_config.json"), f"{path}/tokenizer.json"
    )


def _from_bundle(path: Path) -> Runnable:
    bundle = open_bundle(path)
    manifest = bundle.manifest
    return Runnable(
        path=path,
        kind="bundle",
        identity=bundle.identity,
        model=bundle_decoder(bundle),
        rows=_rows_of(bundle),
        tokenizer=bundle_tokenizer(bundle),
        sources=manifest.sources,
        table_bytes=bundle.table_bytes,
        bits_per_value=bundle.bits_per_value,
        healed=any(
            step.command == "train" and not step.options.get("tune_tables")
            for step in manifest.history
        ),
    )


def _rows_of(bundle: Bundle) -> RowSource:
    stored = DecodedRows(bundle)
    return stored if bundle.manifest.partial is None else RecomputeRows(stored, bundle)


def _backbone_dtype(backbone: TensorFile, config: ModelConfig) -> torch.dtype:
    """The dtype that holds all of a backbone; BundleError unless it fits the config exactly."""
    shapes = expected_shapes(config, with_ffn=False)
    for name in sorted(set(shapes) ^ set(backbone.names)):
        what = "is missing" if name in shapes else "belongs to no part of the model"
        raise BundleError(f"{backbone.path}: tensor {name!r} {what}")
    for name, shape in shapes.items():
        info = backbone.infos[name]
        if info.shape != shape or info.dtype not in _BACKBONE_DTYPES:
            raise BundleError(
                f"{backbone.path}: tensor {name!r} is {info.dtype} {list(info.shape)}, expected "
                f"{' or '.join(_BACKBONE_DTYPES)} {list(shape)}"
            )
    dtypes = {_BACKBONE_DTYPES[info.dtype] for info in backbone.infos.values()}
    return torch.float32 if len(dtypes) > 1 else dtypes.pop()


def _no_tokenizer(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: no tokenizer.json, text cannot be scored",
        hint="put the tokenizer.json the model was trained with into the folder",
    )


def require_partners(bundle: Runnable, reference: Runnable) -> None:
    """MismatchError unless `reference` holds the very weights the bundle's tables came from.

    Compares source digests (config, tokenizer, embedding, each layer's norm and FFN), and the
    weights of the backbone one by one, which differ in a healed bundle.
    """
    ours, theirs = bundle.sources, reference.sources
    where = f"{reference.path}: is not the checkpoint {bundle.path} was built from"
    hint = "give the checkpoint tol build read, or add --other-reference to compare all the same"
    if ours is None or theirs is None:
        raise MismatchError(f"{where}: it has no tables", hint=hint)
    require_same_sources(ours, theirs, where=where, hint=hint)
    theirs_by_name = reference.model.state_dict()
    for name, weight in bundle.model.state_dict().items():
        other = theirs_by_name[name]
        if not torch.equal(weight.float(), other.float()):
            if bundle.healed:
                raise MismatchError(
                    f"{reference.path}: {bundle.path} was healed: its tables are of this "
                    f"checkpoint, its backbone was trained further (another {name})",
                    hint="add --other-reference to measure the healed model against it",
                )
            raise MismatchError(f"{where}: another {name}", hint=hint)
