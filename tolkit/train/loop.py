"""`train`: from text to a checkpoint folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tolkit.data import count_tokens
from tolkit.errors import NonFiniteError, OutputExistsError, UsageError
from tolkit.model import save_checkpoint
from tolkit.progress import Progress, TqdmProgress
from tolkit.train.batches import WindowOrder
from tolkit.train.optimizer import adam_state, learning_rate
from tolkit.train.report import HeldOut, TrainReport
from tolkit.train.session import Session, open_session
from tolkit.train.spec import TrainSpec, recipe_of
from tolkit.train.state import WorkFolder
from tolkit.train.step import StepLoss, accumulate_gradients, mean_loss
from tolkit_formats import files

__all__ = ["train"]

_SAVE_INTERVAL_S = 120.0
_EVAL_TOKENS = 65_536
_LAST_STEPS = 20


def train(spec: TrainSpec, progress: Progress | None = None) -> TrainReport:
    """Train a model and publish its checkpoint folder at `spec.out`.

    The folder holds config.json, model.safetensors, the tokenizer, token_counts.safetensors
    (what the training part holds, plus an init checkpoint's own counts), train_log.jsonl and
    train.json. Until then all is in ``OUT.partial``; the same spec continues from there, and
    its weights are those of a run that was never interrupted, bit for bit (same machine, same
    number of threads).

    Raises:
        UsageError, OutputExistsError: options that do not go together; `out` exists.
        MismatchError: tokenizer, init checkpoint or unfinished run do not fit the spec.
        DataError: empty or unreadable text, or text shorter than one window.
        NonFiniteError: the loss or a gradient became NaN or infinite; the message names the
            step, the weights before it are kept in ``OUT.partial/last_good``.
        ResourceError: no such device, no disk space, or another process trains into `out`.
    """
    progress = TqdmProgress() if progress is None else progress
    started = time.perf_counter()
    recipe_of(spec)
    out = Path(spec.out)
    _check_destination(out, spec.force)
    work = WorkFolder(out.with_name(out.name + ".partial"))
    files.claim_dir(work.path, "lock")
    with files.lock(work.path / "lock"):
        if spec.restart:
            _empty(work.path)
        watched = _Watched(progress)
        session = open_session(spec, work, watched)
        resumed_step = session.step
        step_s = _run(spec, session, watched)
        held_out = _held_out(session)
        _publish(spec, session, out)
        records = _log_records(out / "train_log.jsonl")
        _empty(work.path)  # but for the lock, which says whose folder it is until the end
    files.remove_tree(work.path)
    trained = session.steps - resumed_step
    batch_tokens = session.recipe.batch * session.recipe.sequence
    return TrainReport(
        out=out,
        architecture=session.model.config.architecture,
        parameters=sum(p.numel() for p in session.model.parameters()),
        vocab_size=session.model.config.vocab_size,
        steps=session.steps,
        tokens=session.steps * batch_tokens,
        resumed_step=resumed_step,
        elapsed_s=time.perf_counter() - started,
        tokens_per_s=trained * batch_tokens / step_s if step_s else 0.0,
        train_loss=_mean([r["loss"] for r in records][-_LAST_STEPS:]),
        held_out=held_out,
        distinct_ids=_mean([r["distinct_ids"] for r in records]),
        dtype=str(session.dtype).removeprefix("torch."),
        device=str(session.device),
        warnings=tuple(watched.warnings),
    )


def _check_destination(out: Path, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise OutputExistsError(
            f"{out}: exists already", hint="choose another output or give --force"
        )
    ours = out.is_dir() and not out.is_symlink()
    if not ours or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise UsageError(f"{out}: is not a checkpoint folder and will not be replaced")


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
            task.note(f"loss {loss.cross_entropy:.3f}")
            done, every = session.step, session.recipe.eval_every
            if every and done % every == 0 and done < session.steps:
                held_out = _held_out(session)
                if held_out is not None:
                    session.work.log(_held_out_record(done, held_out))
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
        final_ratio=spec.final_ratio,
    )
    loss = accumulate_gradients(
        session.model,
        session.windows(session.step),
        micro_batch=session.recipe.micro_batch,
        z_weight=spec.z_loss,
        dtype=session.dtype,
    )
    norm = torch.nn.utils.clip_grad_norm_(session.model.parameters(), spec.clip_norm).item()
    if not (math.isfinite(loss.cross_entropy) and math.isfinite(norm)):
        raise _diverged(session, loss, norm)
    for group in session.optimizer.param_groups:
        group["lr"] = rate
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    session.step += 1
    return loss, rate, norm


def _diverged(session: Session, loss: StepLoss, norm: float) -> NonFiniteError:
    """Keep the weights of the last finished step and say where the run went wrong."""
    last_good = session.work.path / "last_good"
    save_checkpoint(session.model, last_good, session.tokenizer.files(), None, True)
    what = "loss" if not math.isfinite(loss.cross_entropy) else "gradient norm"
    value = loss.cross_entropy if what == "loss" else norm
    return NonFiniteError(
        f"train: {what} is {value} in step {session.step + 1} of {session.steps}; the weights "
        f"after step {session.step} are in {last_good}",
        hint=f"lower --learning-rate, or go on from there: --init {last_good}",
    )


def _record(
    session: Session, loss: StepLoss, rate: float, norm: float, step_s: float
) -> dict[str, object]:
    tokens = session.recipe.batch * session.recipe.sequence
    return {
        "step": session.step,
        "tokens": session.step * tokens,
        "loss": loss.cross_entropy,
        "z_loss": loss.z_loss,
        "lr": rate,
        "grad_norm": norm,
        "tokens_per_s": tokens / step_s,
        "distinct_ids": loss.distinct_ids,
    }


def _held_out_record(step: int, held_out: HeldOut) -> dict[str, object]:
    return {
        "step": step,
        "valid_loss": held_out.loss,
        "valid_loss_se": held_out.loss_se,
        "valid_perplexity": min(held_out.perplexity, 1e300),
        "valid_tokens": held_out.tokens,
    }


def _held_out(session: Session) -> HeldOut | None:
    """Loss on the held-out part, its first 65,536 tokens at most."""
    length = session.recipe.sequence
    if len(session.corpus.valid) <= length:
        return None
    order = WindowOrder(session.corpus.valid, length, 0)
    count = min(order.windows, max(1, _EVAL_TOKENS // length))
    means: list[Tensor] = []
    for start in range(0, count, session.recipe.micro_batch):
        stop = min(count, start + session.recipe.micro_batch)
        windows = torch.from_numpy(order.take(np.arange(start, stop, dtype=np.uint64)))
        means.append(mean_loss(session.model, windows.to(session.device), dtype=session.dtype))
    losses = torch.cat(means).double().cpu()
    deviation = float(losses.std()) if count > 1 else 0.0
    return HeldOut(float(losses.mean()), deviation / math.sqrt(count), count * length, count)


def _save(session: Session) -> None:
    weights = {f"weight.{n}": w for n, w in session.model.state_dict().items()}
    tensors: Mapping[str, Tensor] = {**weights, **adam_state(session.model, session.optimizer)}
    session.work.save(session.step, tensors, {})


def _publish(spec: TrainSpec, session: Session, out: Path) -> None:
    counts = count_tokens(session.corpus.train, session.model.config.vocab_size)
    if session.init_counts is not None:
        counts = counts + session.init_counts
    finished = session.work.path / "checkpoint"
    save_checkpoint(session.model, finished, session.tokenizer.files(), counts, True)
    for source, name in (("log.jsonl", "train_log.jsonl"), ("plan.json", "train.json")):
        files.write_atomic(finished / name, (session.work.path / source).read_bytes())
    files.publish_dir(finished, out, force=spec.force)


def _log_records(path: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [record for record in records if "loss" in record]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
