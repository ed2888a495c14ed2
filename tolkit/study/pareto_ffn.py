"""FFN weights stored small and rows recomputed from them: what tables compete with."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from tolkit.study.peers import Peer
from tolkit.tables import Runnable

__all__ = ["with_stored_ffn"]


def with_stored_ffn(runnable: Runnable, peer: Peer) -> tuple[Runnable, int]:
    """The model with its token FFNs as `peer` gives their weights back, and the bytes stored.

    Gate, up and down projections are stored by the peer, their norms as they are (counted with
    4 bytes a weight). All other weights are shared with `runnable`, a checkpoint with token FFNs.
    """
    model = runnable.model
    assert model.has_ffn
    shared = {id(weight): weight for weight in model.parameters()}
    size_bytes = 0
    for name, weight in model.named_parameters():
        if ".memory_layernorm." in name:
            size_bytes += 4 * weight.numel()
        if ".memory_mlp." in name:
            stored = peer.round_trip(weight.detach().to(device="cpu", dtype=torch.float32))
            decoded = stored.plane_VD.to(device=weight.device, dtype=weight.dtype)
            shared[id(weight)] = nn.Parameter(decoded, requires_grad=False)
            size_bytes += stored.size_bytes
    model = copy.deepcopy(model, shared)
    return dataclasses.replace(runnable, model=model, rows=None), size_bytes
