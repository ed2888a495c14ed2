"""AdamW as the paper trains (Table 3), and its learning-rate curve."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["adam_state", "learning_rate", "make_optimizer", "restore_adam_state"]

BETAS = (0.9, 0.95)


def make_optimizer(model: nn.Module, *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters; matrices decay, norm scales do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    scales = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=1e-8, fused=True)


def learning_rate(
    step: int, *, steps: int, peak: float, warmup_steps: int, final_ratio: float
) -> float:
    """Linear to `peak` over the warm-up, then a cosine, `peak` x `final_ratio` at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak * (final_ratio + (1 - final_ratio) * cosine)


def adam_state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """First and second moments by parameter name: ``first.NAME`` and ``second.NAME``."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            state[f"first.{name}"] = optimizer.state[parameter]["exp_avg"]
            state[f"second.{name}"] = optimizer.state[parameter]["exp_avg_sq"]
    return state


def restore_adam_state(
    model: nn.Module, optimizer: torch.optim.AdamW, state: dict[str, Tensor], step: int
) -> None:
    """Put moments of `step` finished steps back (mutates the optimiser)."""
    for name, parameter in model.named_parameters():
        if f"first.{name}" in state:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                "exp_avg": state[f"first.{name}"].to(parameter.device),
                "exp_avg_sq": state[f"second.{name}"].to(parameter.device),
            }
