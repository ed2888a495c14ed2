"""How good the model of a run is on text it does not train on."""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from torch import Tensor

from tolkit.train.batches import WindowOrder
from tolkit.train.report import HeldOut
from tolkit.train.session import Session
from tolkit.train.spec import TrainSpec
from tolkit.train.step import mean_loss

__all__ = ["before_first_step", "held_out_record", "measure"]

_EVAL_TOKENS = 65_536


def measure(session: Session) -> HeldOut | None:
    """Loss (and KL, with a teacher) on the held-out part, its first 65,536 tokens at most."""
    length = session.recipe.sequence
    if len(session.corpus.valid) <= length:
        return None
    order = WindowOrder(session.corpus.valid, length, 0)
    count = min(order.windows, max(1, _EVAL_TOKENS // length))
    means: list[Tensor] = []
    divergences: list[Tensor] = []
    for start in range(0, count, session.recipe.micro_batch):
        stop = min(count, start + session.recipe.micro_batch)
        windows = torch.from_numpy(order.take(np.arange(start, stop, dtype=np.uint64)))
        loss_B, kl_B = mean_loss(
            session.model,
            windows.to(session.device),
            dtype=session.dtype,
            rows=session.rows,
            teacher=session.teacher,
        )
        means.append(loss_B)
        if kl_B is not None:
            divergences.append(kl_B)
    losses = torch.cat(means).double().cpu()
    deviation = float(losses.std()) if count > 1 else 0.0
    kl = float(torch.cat(divergences).double().mean()) if divergences else None
    error = deviation / math.sqrt(count)
    return HeldOut(float(losses.mean()), error, count * length, count, kl)


def held_out_record(step: int, held_out: HeldOut) -> dict[str, object]:
    """The line of the log for a measurement after `step` steps."""
    kl = {} if held_out.kl is None else {"valid_kl": held_out.kl}
    return {
        "step": step,
        "valid_loss": held_out.loss,
        "valid_loss_se": held_out.loss_se,
        "valid_perplexity": min(held_out.perplexity, 1e300),
        "valid_tokens": held_out.tokens,
        **kl,
    }


def before_first_step(spec: TrainSpec, session: Session) -> HeldOut | None:
    """What a run with frozen or tuned tables or a teacher starts from; measured once, and logged.

    None for other runs, for new models and without held-out text.
    """
    goes_on = spec.freeze_tables or spec.tune_tables or spec.distill is not None
    if spec.init is None or not goes_on:
        return None
    if session.step == 0:
        session.work.cut_log(-1)
        held_out = measure(session)
        if held_out is not None:
            session.work.log(held_out_record(0, held_out))
        return held_out
    log = session.work.path / "log.jsonl"
    for line in log.read_bytes().splitlines() if log.exists() else ():
        record = json.loads(line)
        if record["step"] == 0:
            tokens = record["valid_tokens"]
            return HeldOut(
                record["valid_loss"],
                record["valid_loss_se"],
                tokens,
                tokens // session.recipe.sequence,
                record.get("valid_kl"),
            )
    return None
