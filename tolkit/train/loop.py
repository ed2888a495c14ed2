"""`train`: from text to a checkpoint folder, or from a bundle to a healed or tuned one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tolkit.errors import NonFiniteError
from tolkit.model import save_checkpoint
from tolkit.progress import Progress, TqdmProgress
from tolkit.sources import is_bundle
from tolkit.train.held_out import before_first_step, held_out_record, measure
from tolkit.train.optimizer import adam_state, learning_rate
from tolkit.train.publish import check_destination, publish, round_to_stored
from tolkit.train.report import TrainReport
from tolkit.train.session import Session, open_session
from tolkit.train.spec import TrainSpec, recipe_of
from tolkit.train.state import WorkFolder
from tolkit.train.step import StepLoss, accumulate_gradients
from tolkit_formats import files

__all__ = ["train"]

_SAVE_INTERVAL_S = 120.0
_LAST_STEPS = 20


def train(spec: TrainSpec, progress: Progress | None = None) -> TrainReport:
    """Train a model and publish its checkpoint folder, or a healed bundle, at `spec.out`.

    A checkpoint folder holds config.json, model.safetensors, the tokenizer,
    token_counts.safetensors (what the training part holds, plus an init checkpoint's own counts),
    train_log.jsonl and train.json. A bundle (init a bundle, freeze_tables) holds the tables of
    the one healed, byte for byte (hard links where the file system has them), a new backbone, and
    one more step of history; with tune_tables, the same records and backbone and other arrays that
    rows share. Until then all is in ``OUT.partial``; the same spec continues from
    there, and its weights are those of a run that was never interrupted, bit for bit (same
    machine, same number of threads).

    Raises:
        UsageError, OutputExistsError: options that do not go together; `out` exists.
        MismatchError: tokenizer, init checkpoint or unfinished run do not fit the spec.
        DataError: empty or unreadable text, or text shorter than one window.
        BundleError: the bundle healed is damaged.
        NonFiniteError: the loss or a gradient became NaN or infinite; the message names the
            step, the weights before it are kept in ``OUT.partial/last_good``.
        ResourceError: no such device, no disk space, or another process trains into `out`.
    """
    progress = TqdmProgress() if progress is None else progress
    started = time.perf_counter()
    recipe_of(spec)
    out = Path(spec.out)
    healing = spec.init is not None and is_bundle(spec.init)
    check_destination(out, spec.force, bundle=healing)
    work = WorkFolder(out.with_name(out.name + ".partial"))
    files.claim_dir(work.path, "lock")
    with files.lock(work.path / "lock"):
        if spec.restart:
            _empty(work.path)
        watched = _Watched(progress)
        session = open_session(spec, work, watched)
        resumed_step = session.step
        before = before_first_step(spec, session)
        step_s = _run(spec, session, watched)
        round_to_stored(session)
        held_out = measure(session)
        records = _log_records(work.path / "log.jsonl")
        identity = publish(spec, session, out)
        _empty(work.path)  # but for the lock, which says whose folder it is until the end
    files.remove_tree(work.path)
    trained = session.steps - resumed_step
    batch_tokens = session.recipe.batch * session.recipe.sequence
    return TrainReport(
        out=out,
        identity=identity,
        architecture=session.model.config.architecture,
        parameters=sum(p.numel() for p in session.model.parameters()),
        trained_parameters=sum(p.numel() for p in session.learner.parameters() if p.requires_grad),
        tuned=session.learner is not session.model,
        vocab_size=session.model.config.vocab_size,
        steps=session.steps,
        tokens=session.steps * batch_tokens,
        resumed_step=resumed_step,
        elapsed_s=time.perf_counter() - started,
        tokens_per_s=trained * batch_tokens / step_s if step_s else 0.0,
        train_loss=_mean([r["loss"] for r in records][-_LAST_STEPS:]),
        held_out=held_out,
        before=before,
        learning_rate=session.recipe.learning_rate,
        distinct_ids=_mean([r["distinct_ids"] for r in records]),
        dtype=str(session.dtype).removeprefix("torch."),
        device=str(session.device),
        warnings=tuple(watched.warnings),
    )


class _Watched:
    """The caller's progress, with the warnings kept for the report."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self.warnings: list[str] = []
        self.task = inner.task

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self._inner.warn(message)


def _empty(folder: Path) -> None:
    """Remove all but the lock; the states' records first, so that a kill leaves none to resume."""
    for entry in sorted(folder.iterdir(), key=lambda e: (not e.match("state-*.json"), e.name)):
        if entry.name != "lock":
            if entry.is_dir() and not entry.is_symlink():
                files.remove_tree(entry)
            else:
                files.unlink(entry)


def _run(spec: TrainSpec, session: Session, progress: Progress) -> float:
    """The remaining steps; seconds spent in them, evaluation and saving left out."""
    saved_at = time.perf_counter()
    total_s = 0.0
    with progress.task("train", session.steps, "step") as task:
        task.advance(session.step)
        while session.step < session.steps:
            began = time.perf_counter()
            loss, rate, norm = _step(spec, session)
            step_s = time.perf_counter() - began
            total_s += step_s
            session.work.log(_record(session, loss, rate, norm, step_s))
            task.advance(1)
            kl = "" if loss.kl is None else f", KL {loss.kl:.4f}"
            task.note(f"loss {loss.cross_entropy:.3f}{kl}")
            done, every = session.step, session.recipe.eval_every
            if every and done % every == 0 and done < session.steps:
                held_out = measure(session)
                if held_out is not None:
                    session.work.log(held_out_record(done, held_out))
                    task.note(f"valid perplexity {held_out.perplexity:.2f}")
            due = time.perf_counter() - saved_at > _SAVE_INTERVAL_S
            if done == session.steps or (done % spec.save_every == 0 if spec.save_every else due):
                _save(session)
                saved_at = time.perf_counter()
    return total_s


def _step(spec: TrainSpec, session: Session) -> tuple[StepLoss, float, float]:
    """One optimiser step: loss, learning rate, gradient norm before clipping."""
    rate = learning_rate(
        session.step,
        steps=session.steps,
        peak=session.recipe.learning_rate,
        warmup_steps=session.warmup_steps,
        final_ratio=session.recipe.final_ratio,
    )
    loss = accumulate_gradients(
        session.model,
        session.windows(session.step),
        micro_batch=session.recipe.micro_batch,
        z_weight=spec.z_loss,
        dtype=session.dtype,
        rows=session.rows,
        teacher=session.teacher,
    )
    norm = torch.nn.utils.clip_grad_norm_(session.learner.parameters(), spec.clip_norm).item()
    if not (math.isfinite(loss.cross_entropy) and math.isfinite(norm)):
        raise _diverged(session, loss, norm)
    for group in session.optimizer.param_groups:
        group["lr"] = rate
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    session.step += 1
    return loss, rate, norm


def _diverged(session: Session, loss: StepLoss, norm: float) -> NonFiniteError:
    """Keep a checkpoint of the last finished step and say where the run went wrong."""
    what = "loss" if not math.isfinite(loss.cross_entropy) else "gradient norm"
    value = loss.cross_entropy if what == "loss" else norm
    message = f"train: {what} is {value} in step {session.step + 1} of {session.steps}"
    if not session.model.has_ffn and session.model.config.has_tables:
        return NonFiniteError(message, hint="lower --learning-rate")
    last_good = session.work.path / "last_good"
    save_checkpoint(session.model, last_good, session.tokenizer.files(), None, True)
    return NonFiniteError(
        f"{message}; the weights after step {session.step} are in {last_good}",
        hint=f"lower --learning-rate, or go on from there: --init {last_good}",
    )


def _record(
    session: Session, loss: StepLoss, rate: float, norm: float, step_s: float
) -> dict[str, object]:
    tokens = session.recipe.batch * session.recipe.sequence
    kl = {} if loss.kl is None else {"kl": loss.kl}
    return {
        "step": session.step,
        "tokens": session.step * tokens,
        "loss": loss.cross_entropy,
        **kl,
        "z_loss": loss.z_loss,
        "lr": rate,
        "grad_norm": norm,
        "tokens_per_s": tokens / step_s,
        "distinct_ids": loss.distinct_ids,
    }


def _save(session: Session) -> None:
    weights = {f"weight.{n}": w for n, w in session.learner.state_dict().items()}
    tensors: Mapping[str, Tensor] = {**weights, **adam_state(session.learner, session.optimizer)}
    session.work.save(session.step, tensors, {})


def _log_records(path: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [record for record in records if "loss" in record]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
