"""What a run would do, without reading its text or writing anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tolkit.data import Tokenizer
from tolkit.errors import InputError
from tolkit.model import Decoder, ModelConfig
from tolkit.sources import is_bundle
from tolkit.train.origin import Origin, freeze, open_origin
from tolkit.train.publish import check_destination
from tolkit.train.session import fitted_recipe
from tolkit.train.shape import default_vocab_size, model_config
from tolkit.train.spec import TrainSpec
from tolkit.train.tuned import tuned_numbers
from tolkit_formats.writer import work_folder

__all__ = ["TrainPlan", "plan_run"]


@dataclass(frozen=True)
class TrainPlan:
    """One run ahead of its start.

    kind: checkpoint or bundle. size_bytes: of what it writes, predicted; of a bundle, tables
    included. tuned: what is trained are numbers of its tables. steps: None where minutes decide.
    distill_weight: None without a teacher. unfinished: the work folder the run would go on in, None
    where there is none.
    """

    kind: str
    architecture: str
    parameters: int
    trained_parameters: int
    tuned: bool
    size_bytes: int
    sequence: int
    batch: int
    steps: int | None
    minutes: float | None
    learning_rate: float
    distill_weight: float | None
    unfinished: Path | None


def plan_run(spec: TrainSpec) -> TrainPlan:
    """The plan of `train(spec)`; reads headers only.

    Raises:
        UsageError, OutputExistsError, InputError: what `train` would raise for these options.
    """
    origin = open_origin(spec)
    recipe = fitted_recipe(spec, origin)
    bundle = None if origin is None else origin.bundle
    check_destination(spec.out, spec.force, bundle=bundle is not None)
    teacher = spec.distill
    if teacher is not None and not is_bundle(teacher) and not (teacher / "config.json").is_file():
        raise InputError(f"distill: {teacher} is neither a checkpoint folder nor a bundle")
    config = _config(spec, recipe.sequence, origin)
    with torch.device("meta"):
        model = Decoder(config, with_ffn=bundle is None)
    parameters = sum(p.numel() for p in model.parameters())
    if spec.tune_tables and bundle is not None:
        trained = tuned_numbers(bundle)
    else:
        freeze(spec, model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weight = 1.0 if spec.distill_weight is None else spec.distill_weight
    work = work_folder(spec.out)
    return TrainPlan(
        kind="checkpoint" if bundle is None else "bundle",
        architecture=config.architecture,
        parameters=parameters,
        trained_parameters=trained,
        tuned=spec.tune_tables,
        size_bytes=4 * parameters if bundle is None else bundle.manifest.bundle_bytes,
        sequence=recipe.sequence,
        batch=recipe.batch,
        steps=recipe.steps,
        minutes=spec.minutes,
        learning_rate=recipe.learning_rate,
        distill_weight=None if spec.distill is None else weight,
        unfinished=work if (work / "plan.json").is_file() and not spec.restart else None,
    )


def _config(spec: TrainSpec, sequence: int, origin: Origin | None) -> ModelConfig:
    if origin is not None:
        return origin.config
    vocab_size = default_vocab_size(spec) if spec.vocab_size is None else spec.vocab_size
    if spec.tokenizer is not None:
        given = Tokenizer.load(spec.tokenizer).vocab_size
        vocab_size = max(given, spec.vocab_size or 0)
    return model_config(spec, vocab_size, sequence)
