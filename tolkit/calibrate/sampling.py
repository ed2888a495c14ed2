"""Labels drawn from a model's own softmax, and their log-likelihood's gradient.

N positions, n positions worked on at once, V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sampled_gradient"]

_LOGITS = 1 << 22  # logits that exist at once: 16 MiB in float32, 32 MiB for their running sum


@torch.no_grad()
def sampled_gradient(
    hidden_ND: Tensor, head_VD: Tensor, uniforms_N: Tensor
) -> tuple[Tensor, Tensor]:
    """One label a position by inverse transform, and d log p(label) / d hidden.

    Softmax in float32 or wider, its running sum in float64. The gradient is the label's output
    weight minus the expected one, W[label] - sum_v p_v W[v].

    Args:
        hidden_ND: final hidden states.
        head_VD: output weights of the same dtype.
        uniforms_N: float64 in [0, 1).

    Returns:
        The gradient [N, D] in the dtype of `hidden_ND`, and the labels, int64 [N]. Positions of
        NaN or infinite logits have a gradient of NaN.
    """
    gradient_ND = torch.empty_like(hidden_ND)
    labels_N = torch.empty(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
    step = max(1, _LOGITS // len(head_VD))
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    for start in range(0, len(hidden_ND), step):
        part = slice(start, start + step)
        p_nV = torch.softmax((hidden_ND[part] @ head_VD.T).to(wide), -1)
        cumulated_nV = p_nV.double().cumsum(-1)
        drawn_n1 = uniforms_N[part, None] * cumulated_nV[:, -1:]
        label_n1 = torch.searchsorted(cumulated_nV, drawn_n1, right=True)
        label_n1.clamp_(max=len(head_VD) - 1)  # NaN is past the end
        onehot_less_p_nV = p_nV.neg_().scatter_add_(1, label_n1, torch.ones_like(p_nV[:, :1]))
        gradient_ND[part] = onehot_less_p_nV.to(head_VD.dtype) @ head_VD
        labels_N[part] = label_n1[:, 0]
    return gradient_ND, labels_N
