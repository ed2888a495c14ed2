"""The decoder: dense, memory and flex blocks behind one forward pass.

V vocabulary, L layers, D hidden, B batch, T positions, n distinct tokens of a call.
With X the residual stream entering a block and X0 = E[tokens] (paper, sections 2.4-2.6, 4.2):

    dense    X~ = X + Attn(LN(X));  X' = X~ + FFN(LN(X~))
    memory   X' = X + Attn(LN(X)) + FFN_L(LN_L(X0))
    flex     X' = X + Attn(LN(X)) + FFN-C(LN(X + Attn) or LN(X)) + FFN-M_L(LN_L(X0))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from torch import Tensor, nn

from tolkit.errors import UsageError
from tolkit.model import training_ops
from tolkit.model.cache import DecoderCache
from tolkit.model.config import ModelConfig
from tolkit.model.gather import DistinctTokens
from tolkit.model.layers import (
    Attention,
    KeyValueStore,
    Linear,
    LinearPair,
    RmsNorm,
    SwiGlu,
    rope_at,
    rope_tables,
)
from tolkit.model.rows import FfnRows, RowSource

__all__ = ["Block", "Decoder"]

_INIT_STD = 0.02


class Block(nn.Module):
    """One layer. Parts a layer kind lacks are None and absent from the checkpoint."""

    def __init__(self, config: ModelConfig, *, with_ffn: bool) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RmsNorm(width, eps)
        self.self_attn = Attention(config)
        self.context_reads_residual = config.context_mlp_input == "residual"
        self.post_attention_layernorm: RmsNorm | None = None
        self.mlp: SwiGlu | LinearPair | None = None
        self.memory_layernorm: RmsNorm | None = None
        self.memory_mlp: SwiGlu | None = None
        if config.has_context_mlp:
            linear = config.architecture == "flex" and config.context_mlp_type == "linear"
            self.post_attention_layernorm = RmsNorm(width, eps)
            self.mlp = (LinearPair if linear else SwiGlu)(width, config.intermediate_size)
        if config.has_tables and with_ffn:
            self.memory_layernorm = RmsNorm(width, eps)
            self.memory_mlp = SwiGlu(width, config.memory_intermediate_size)

    def forward(
        self,
        stream_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        row_BTD: Tensor | None,
        store: KeyValueStore | None,
        visible_B1TS: Tensor | None = None,
    ) -> Tensor:
        after_BTD: Tensor = stream_BTD + self.self_attn(
            self.input_layernorm(stream_BTD), rope, store, visible_B1TS
        )
        result_BTD = after_BTD
        if self.mlp is not None and self.post_attention_layernorm is not None:
            source_BTD = stream_BTD if self.context_reads_residual else after_BTD
            result_BTD = result_BTD + self.mlp(self.post_attention_layernorm(source_BTD))
        if row_BTD is not None:
            result_BTD = result_BTD + row_BTD
        return result_BTD


class _Trunk(nn.Module):
    """Embedding, blocks and final norm; exists so that parameter names are the checkpoint's."""

    def __init__(self, config: ModelConfig, *, with_ffn: bool) -> None:
        super().__init__()
        # Given its weight, nn.Embedding does not draw V x D normals of its own.
        weight_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight_VD)
        self.layers = nn.ModuleList(
            Block(config, with_ffn=with_ffn) for _ in range(config.num_hidden_layers)
        )
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model; `state_dict()` names are the checkpoint's tensor names.

    Args:
        config: the shape.
        generator: source of the initial weights; by default one seeded with 0, so two decoders
            of one config start equal.
        with_ffn: False leaves the memory FFNs and their norms out, for running from tables.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        generator: torch.Generator | None = None,
        with_ffn: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.has_ffn = config.has_tables and with_ffn
        self.model = _Trunk(config, with_ffn=with_ffn)
        self.lm_head: Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if self.embedding.device.type != "meta":
            self._initialise(generator or torch.Generator(self.embedding.device).manual_seed(0))

    @property
    def embedding(self) -> Tensor:
        """The token embedding E [V, D]."""
        weight_VD: Tensor = self.model.embed_tokens.weight
        return weight_VD

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_hidden_layers

    def block(self, layer: int) -> Block:
        """Layer `layer`, counted from 0."""
        block = self.model.layers[layer]
        assert isinstance(block, Block)
        return block

    def embed(self, ids: Tensor) -> Tensor:
        """E[ids]: int64 [...] -> [..., D]."""
        return F.embedding(ids, self.embedding)

    def memory_ffn(self, layer: int, embedded_nD: Tensor) -> Tensor:
        """FFN_L(LN_L(.)) of embedding rows [n, D]; UsageError when the FFN was not loaded."""
        block = self.block(layer)
        if block.memory_mlp is None or block.memory_layernorm is None:
            raise UsageError(
                "model: it holds no token FFN (dense, or loaded without it), expected table rows"
            )
        count = embedded_nD.shape[0]
        if torch.is_autocast_enabled("cpu") and embedded_nD.device.type == "cpu":
            embedded_nD = training_ops.pad_rows(embedded_nD)
        plane_nD: Tensor = block.memory_mlp(block.memory_layernorm(embedded_nD))
        return plane_nD[:count]

    def ffn_plane(self, layer: int, ids_n: Tensor) -> Tensor:
        """Table rows of one layer, FFN_L(LN_L(E[ids])): int64 [n] -> [n, D] (section 2.9)."""
        return self.memory_ffn(layer, self.embed(ids_n))

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        rows: RowSource | None = None,
        cache: DecoderCache | None = None,
        positions_BT: Tensor | None = None,
        visible_B1TS: Tensor | None = None,
        tokens: DistinctTokens | None = None,
    ) -> Tensor:
        """Final hidden states after the last norm, [B, T, D] in the embedding's dtype.

        Args:
            ids_BT: token ids, int64 [B, T], on the model's device.
            rows: where table rows come from; by default the model's own FFN. Either way they
                are computed or fetched once per distinct token of the call.
            cache: positions read before; the new ones are stored into it (mutated).
            positions_BT: each row's rotary positions, int64; by default cache length + 0..T-1.
            visible_B1TS: which of the S positions read so far each new one attends to, bool, at
                least one each; by default all up to itself.
            tokens: the distinct tokens of `ids_BT`, where the caller knows them.

        Raises:
            UsageError: the cache is full, rows for a dense model, or no rows and no FFN.
        """
        if rows is not None and not self.config.has_tables:
            raise UsageError("model: a dense model has no tables, expected rows=None")
        start = 0
        if cache is not None:
            cache.check_room(ids_BT.shape[1])
            start = cache.length
        tokens = tokens or DistinctTokens(ids_BT)
        embedded_nD = self.embed(tokens.ids_n)
        planes: Sequence[Tensor | None] = ()
        if self.config.has_tables:
            if rows is None:
                planes = FfnRows(self).planes(embedded_nD)
            else:
                planes = rows.fetch(tokens.ids_n)
        stream_BTD = tokens.gather(embedded_nD)
        dtype, device = stream_BTD.dtype, stream_BTD.device
        if positions_BT is None:
            rope = rope_tables(self.config, start, ids_BT.shape[1], dtype=dtype, device=device)
        else:
            rope = rope_at(self.config, positions_BT, dtype=dtype)
        for layer in range(self.num_layers):
            row_BTD = None
            plane_nD = planes[layer] if planes else None
            if plane_nD is not None:
                row_BTD = tokens.gather(plane_nD.to(device=device, dtype=dtype))
            del plane_nD  # or two layers' planes are alive while the next is decoded
            store = None if cache is None else cache.layer(layer)
            stream_BTD = self.block(layer)(stream_BTD, rope, row_BTD, store, visible_B1TS)
        if cache is not None:
            cache.advance(ids_BT.shape[1])
        hidden_BTD: Tensor = self.model.norm(stream_BTD)
        return hidden_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary: [..., D] -> [..., V]."""
        return F.linear(hidden, self.embedding if self.lm_head is None else self.lm_head.weight)

    def forward(
        self, ids_BT: Tensor, rows: RowSource | None = None, cache: DecoderCache | None = None
    ) -> Tensor:
        """Logits [B, T, V]; arguments as in `hidden`."""
        return self.logits(self.hidden(ids_BT, rows=rows, cache=cache))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal 0.02; what writes to the residual stream is scaled down by sqrt(2 L)."""
        residual_std = _INIT_STD / math.sqrt(2 * self.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(0.0, residual_std if writes else _INIT_STD, generator=generator)
