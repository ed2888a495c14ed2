"""A finished run takes its name: a checkpoint folder, or a bundle around unchanged records."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from tolkit import __version__
from tolkit.card import bundle_card
from tolkit.data import count_tokens
from tolkit.errors import BundleError, OutputExistsError, UsageError
from tolkit.model import Decoder, save_checkpoint
from tolkit.model.checkpoint import as_stored
from tolkit.model.files import TORCH_DTYPES, require_finite
from tolkit.train.session import Session
from tolkit.train.spec import TrainSpec
from tolkit.train.tuned import BASES, TunedTables
from tolkit_formats import digests, files
from tolkit_formats.manifest import HistoryEntry
from tolkit_formats.reader import Bundle
from tolkit_formats.tensorfile import write_tensors
from tolkit_formats.writer import BundleWriter, require_absent

__all__ = ["check_destination", "publish", "round_to_stored"]

_BACKBONE = "backbone.safetensors"
_MADE_ANEW = {"README.md", "tables/checksums.safetensors"}
_COPY_BYTES = 1 << 20


def check_destination(out: Path, force: bool, *, bundle: bool) -> None:
    """OutputExistsError or UsageError unless `out` is free or may be replaced."""
    if bundle:
        require_absent(out, force=force)
        return
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise OutputExistsError(
            f"{out}: exists already", hint="choose another output or give --force"
        )
    ours = out.is_dir() and not out.is_symlink()
    if not ours or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise UsageError(f"{out}: is not a checkpoint folder and will not be replaced")


@torch.no_grad()
def round_to_stored(session: Session) -> None:
    """Give the weights of a bundle's backbone the values its stored dtypes hold (mutated).

    So what is measured afterwards is what is published, and a 16-bit backbone stays one.
    """
    if session.origin is None or session.origin.bundle is None:
        return
    infos = session.origin.bundle.tensor_file(_BACKBONE).infos
    for name, weight in session.model.state_dict().items():
        rounded = weight.to(TORCH_DTYPES[infos[name].dtype])
        require_finite(rounded, name, f"train: after rounding to {infos[name].dtype}")
        weight.copy_(rounded)


def publish(spec: TrainSpec, session: Session, out: Path) -> str | None:
    """Write the result in the work folder and give it the name `out`; a bundle's identity.

    Raises:
        BundleError: a file of the bundle healed is damaged; nothing is published.
        ResourceError: no disk space.
    """
    if session.origin is not None and session.origin.bundle is not None:
        return _publish_bundle(spec, session, session.origin.bundle, out)
    counts = count_tokens(session.corpus.train, session.model.config.vocab_size)
    if session.origin is not None and session.origin.counts_V is not None:
        counts = counts + session.origin.counts_V
    finished = session.work.path / "checkpoint"
    save_checkpoint(session.model, finished, session.tokenizer.files(), counts, True)
    for source, name in (("log.jsonl", "train_log.jsonl"), ("plan.json", "train.json")):
        files.write_atomic(finished / name, (session.work.path / source).read_bytes())
    files.publish_dir(finished, out, force=spec.force)
    return None


def _publish_bundle(spec: TrainSpec, session: Session, bundle: Bundle, out: Path) -> str:
    finished = session.work.path / "bundle.tol"
    manifest = bundle.manifest
    step = HistoryEntry(
        "train", _options(spec, session), manifest.identity, f"tolkit {__version__}"
    )
    healed = replace(manifest, files={}, history=(*manifest.history, step), identity="")
    tuned = session.rows if isinstance(session.rows, TunedTables) else None
    if tuned is not None:  # how far each layer is from the table it stands for was not measured
        healed = replace(healed, encoding=replace(manifest.encoding, errors=()))
    kept = sorted(set(manifest.files) - _MADE_ANEW - {_BACKBONE if tuned is None else BASES})
    # Its own work folder lies in ours; `force` replaces what an interrupted publishing left.
    with BundleWriter(
        finished, fingerprint=digests.json_digest(healed.to_json()), force=True, restart=True
    ) as writer:
        for name in kept:
            if name.startswith("tables/"):
                files.link_or_copy(bundle.path / name, writer.path(name))
            else:
                _copy(bundle.path / name, writer.path(name))
        if tuned is not None:
            writer.put_tensors(BASES, tuned.stored())
        else:
            _write_backbone(session.model, bundle, writer.path(_BACKBONE))
        writer.put_file("README.md", bundle_card(healed).encode())
        published = writer.publish(healed)
    for name in kept:
        if published.files[name] != manifest.files[name]:
            raise BundleError(
                f"{bundle.path}/{name}: does not match its digest in tol.json: damaged",
                hint="restore the file from a copy, then run the same command again",
            )
    files.publish_dir(finished, out, force=spec.force)
    return published.identity


def _options(spec: TrainSpec, session: Session) -> dict[str, object]:
    """What decided the weights, in the manifest's terms: no paths, finite numbers."""
    recipe, teacher = session.recipe, session.teacher
    return {
        "steps": session.steps,
        "learning_rate": recipe.learning_rate,
        "seed": spec.seed,
        "data": hashlib.sha256(session.corpus.key.encode()).hexdigest(),
        "freeze_tables": spec.freeze_tables,
        "tune_tables": spec.tune_tables or None,
        "freeze_embeddings": spec.freeze_embeddings or None,
        "distill": None if teacher is None else teacher.identity,
        "distill_weight": None if teacher is None else teacher.weight,
        "recipe": {
            "sequence": recipe.sequence,
            "batch": recipe.batch,
            "micro_batch": recipe.micro_batch,
            "final_ratio": recipe.final_ratio,
            "warmup_steps": session.warmup_steps,
            "weight_decay": recipe.weight_decay,
            "clip_norm": spec.clip_norm,
            "z_loss": spec.z_loss,
            "dtype": str(session.dtype).removeprefix("torch."),
        },
    }


def _copy(source: Path, destination: Path) -> None:
    with files.FileWriter(destination) as writer:
        for chunk in files.read_chunks(source, _COPY_BYTES):
            writer.write(chunk)


def _write_backbone(model: Decoder, bundle: Bundle, path: Path) -> None:
    """The trained weights under the names, in the order and dtypes the bundle had them."""
    infos = bundle.tensor_file(_BACKBONE).infos
    weights = model.state_dict()
    tensors = {
        name: as_stored(weights[name].to(TORCH_DTYPES[info.dtype])) for name, info in infos.items()
    }
    write_tensors(path, tensors, {"format": "pt"})
