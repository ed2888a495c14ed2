"""A run made ready: model, optimiser, data order, and where it stands.

`open_session` starts a run in ``OUT.partial`` or picks up the one there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import tolkit
from tolkit.data import Tokenizer
from tolkit.errors import MismatchError
from tolkit.model import Decoder, ModelConfig, RowSource
from tolkit.progress import Progress
from tolkit.train.batches import WindowOrder
from tolkit.train.corpus import Corpus, choose_tokenizer, encode_corpus
from tolkit.train.distill import Teacher
from tolkit.train.optimizer import make_optimizer, restore_adam_state
from tolkit.train.origin import Origin, load_start, load_teacher, open_origin
from tolkit.train.precision import choose_device, choose_dtype
from tolkit.train.shape import check_init, model_config
from tolkit.train.spec import Recipe, TrainSpec, recipe_of
from tolkit.train.state import WorkFolder
from tolkit.train.step import accumulate_gradients
from tolkit.train.tuned import TunedTables
from tolkit_formats import files

__all__ = ["Session", "fitted_recipe", "open_session"]

_TIMED_STEPS = 3


@dataclass
class Session:
    """A run ready for its step `step` (steps finished so far).

    rows: table rows, which no step changes unless they are tuned; None where the model's own FFN
        gives them.
    """

    work: WorkFolder
    recipe: Recipe
    steps: int
    warmup_steps: int
    model: Decoder
    optimizer: torch.optim.AdamW
    tokenizer: Tokenizer
    corpus: Corpus
    order: WindowOrder
    origin: Origin | None
    rows: RowSource | None
    teacher: Teacher | None
    dtype: torch.dtype
    device: torch.device
    step: int

    @property
    def learner(self) -> nn.Module:
        """What holds the weights that steps change."""
        return self.rows if isinstance(self.rows, TunedTables) else self.model

    def windows(self, step: int) -> torch.Tensor:
        """Ids [B, T + 1] of a step, on the device."""
        return torch.from_numpy(self.order.batch(step, self.recipe.batch)).to(self.device)


def open_session(spec: TrainSpec, work: WorkFolder, progress: Progress) -> Session:
    """Everything `train` needs before its first step; mutates only `work`.

    Raises:
        UsageError, MismatchError, DataError, CheckpointError: see `train`.
    """
    device = choose_device(spec.device)
    origin = open_origin(spec)
    recipe = fitted_recipe(spec, origin)
    init = None if origin is None else origin.config
    held = work.read_plan()
    if held is None:
        work.forget()
    kept = work.path / "tokenizer"
    tokenizer = choose_tokenizer(spec, init, None if held is None else kept, progress)
    _keep_tokenizer(tokenizer, kept)
    config = _config(spec, recipe, init, tokenizer)
    teacher = load_teacher(spec, tokenizer, config, recipe.sequence, device)
    cache_dir = spec.cache_dir or work.path / "tokens"
    corpus = encode_corpus(spec, tokenizer, recipe.sequence, cache_dir, progress)
    order = WindowOrder(corpus.train, recipe.sequence, spec.seed)
    asked = _identity(spec, recipe, config, tokenizer, corpus, device)
    asked["init"] = None if origin is None else origin.digest
    asked["distill"] = None if teacher is None else [teacher.identity, teacher.weight]
    if held is not None:
        work.require_same({name: held.get(name) for name in asked}, asked)
    dtype_name = str(held["dtype"]) if held is not None else ""
    dtype = choose_dtype(dtype_name or spec.dtype, device, config.hidden_size)
    model, rows = load_start(spec, origin, config, device)
    session = Session(
        work=work,
        recipe=recipe,
        steps=0,
        warmup_steps=0,
        model=model,
        optimizer=make_optimizer(
            rows if isinstance(rows, TunedTables) else model, weight_decay=recipe.weight_decay
        ),
        tokenizer=tokenizer,
        corpus=corpus,
        order=order,
        origin=origin,
        rows=rows,
        teacher=teacher,
        dtype=dtype,
        device=device,
        step=0,
    )
    if held is not None and isinstance(held["steps"], int):
        session.steps = held["steps"]
    else:
        session.steps = recipe.steps or _steps_of_minutes(spec, session)
        dtype_label = str(dtype).removeprefix("torch.")
        work.write_plan({**asked, "steps": session.steps, "dtype": dtype_label})
    session.warmup_steps = recipe.warmup_steps
    if spec.warmup_steps is None:
        session.warmup_steps = min(recipe.warmup_steps, max(1, session.steps // 10))
    _resume(session, progress)
    return session


def _keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    files.make_dir(folder)
    for name, content in tokenizer.files().items():
        files.write_atomic(folder / name, content)


def fitted_recipe(spec: TrainSpec, origin: Origin | None) -> Recipe:
    """The recipe of `spec`, its window no longer than the model it goes on from reads.

    Raises:
        UsageError: see `recipe_of` and `check_init`. MismatchError: a window given is longer.
    """
    recipe = recipe_of(spec)
    if origin is None:
        return recipe
    check_init(spec, origin.config)
    longest = origin.config.max_position_embeddings
    fits = spec.sequence is None and (spec.freeze_tables or spec.tune_tables)
    if recipe.sequence > longest and fits:
        return replace(recipe, sequence=longest)
    if recipe.sequence > longest:
        raise MismatchError(
            f"sequence: {recipe.sequence}, {origin.path} reads at most {longest} positions",
            hint="give a smaller --sequence",
        )
    return recipe


def _config(
    spec: TrainSpec, recipe: Recipe, init: ModelConfig | None, tokenizer: Tokenizer
) -> ModelConfig:
    if init is not None:
        return init
    padded = spec.vocab_size if spec.tokenizer is not None else None
    vocab_size = max(tokenizer.vocab_size, padded or 0)
    config = model_config(spec, vocab_size, recipe.sequence)
    return replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)


def _identity(
    spec: TrainSpec,
    recipe: Recipe,
    config: ModelConfig,
    tokenizer: Tokenizer,
    corpus: Corpus,
    device: torch.device,
) -> dict[str, object]:
    """All that decides the weights; an unfinished run continues only when this is equal."""
    return {
        "version": tolkit.__version__,
        "config": config.to_json(),
        "tokenizer": tokenizer.digest,
        "text": corpus.key,
        "vocab_size": spec.vocab_size,
        "freeze_tables": spec.freeze_tables,
        "freeze_embeddings": spec.freeze_embeddings,
        "tune_tables": spec.tune_tables,
        "budget": {"steps": recipe.steps, "minutes": spec.minutes},
        "sequence": recipe.sequence,
        "batch": recipe.batch,
        "micro_batch": recipe.micro_batch,
        "learning_rate": recipe.learning_rate,
        "final_ratio": recipe.final_ratio,
        "warmup_steps": spec.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "clip_norm": spec.clip_norm,
        "z_loss": spec.z_loss,
        "seed": spec.seed,
        "dtype_option": spec.dtype,
        "device": device.type,
    }


def _steps_of_minutes(spec: TrainSpec, session: Session) -> int:
    """Steps that fit `spec.minutes`, from timing whole steps at learning rate 0."""
    assert spec.minutes is not None
    started = time.perf_counter()
    for repeat in range(_TIMED_STEPS + 1):
        if repeat == 1:
            started = time.perf_counter()  # the first one warms caches up
        accumulate_gradients(
            session.model,
            session.windows(repeat),
            micro_batch=session.recipe.micro_batch,
            z_weight=spec.z_loss,
            dtype=session.dtype,
            rows=session.rows,
            teacher=session.teacher,
        )
        session.optimizer.step()
        session.optimizer.zero_grad()
    if session.device.type == "cuda":
        torch.cuda.synchronize()
    step_s = (time.perf_counter() - started) / _TIMED_STEPS
    # Learning rate 0 leaves the weights alone; the moments go.
    session.optimizer = make_optimizer(session.learner, weight_decay=session.recipe.weight_decay)
    return max(1, int(60 * spec.minutes / step_s))


def _resume(session: Session, progress: Progress) -> None:
    state = session.work.newest(progress)
    session.work.cut_log(0 if state is None else state.step)
    if state is None:
        return
    weights = {
        name.removeprefix("weight."): tensor
        for name, tensor in state.tensors.items()
        if name.startswith("weight.")
    }
    session.learner.load_state_dict(weights)
    restore_adam_state(session.learner, session.optimizer, state.tensors, state.step)
    session.step = state.step
