"""The decoder against a naive one: per position, per head, no sharing, no kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from _pico import pico_config, pico_ids, pico_model
from torch import Tensor
from torch.nn.functional import silu

from tolkit.errors import UsageError
from tolkit.model import Decoder, DistinctTokens, FfnRows, KVCache, preset

KINDS = {
    "dense": {"architecture": "dense"},
    "dense, untied": {"architecture": "dense", "tie_word_embeddings": False},
    "memory": {"architecture": "memory"},
    "memory, untied, full heads": {
        "architecture": "memory",
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
    },
    "memory, one kv head": {"architecture": "memory", "num_key_value_heads": 1},
    "flex": {"architecture": "flex"},
    "flex, linear": {"architecture": "flex", "context_mlp_type": "linear"},
    "flex, reads residual": {"architecture": "flex", "context_mlp_input": "residual"},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def naive_norm(vector: Tensor, weight: Tensor, eps: float) -> Tensor:
    return vector / math.sqrt(float((vector * vector).mean()) + eps) * weight


def naive_rotate(vector: Tensor, position: int, theta: float) -> Tensor:
    """Half-split: component i turns with component i + C/2."""
    half = vector.shape[0] // 2
    turned = vector.clone()
    for i in range(half):
        angle = position / theta ** (i / half)
        a, b = vector[i], vector[i + half]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def naive_logits(model: Decoder, ids: list[int]) -> Tensor:
    """Logits [T, V] in float64, one position after another, formulas as in the paper."""
    config = model.config
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    embedding = weights["model.embed_tokens.weight"]

    def norm(vector: Tensor, name: str) -> Tensor:
        return naive_norm(vector, weights[name], config.rms_norm_eps)

    stream = [embedding[i] for i in ids]

    def project(kind: str, at: str, normed: Tensor) -> Tensor:
        return weights[f"{at}self_attn.{kind}_proj.weight"] @ normed

    def swiglu(vector: Tensor, prefix: str) -> Tensor:
        up = weights[prefix + "up_proj.weight"] @ vector
        gate = weights.get(prefix + "gate_proj.weight")
        inner = up if gate is None else up * silu(gate @ vector)
        return weights[prefix + "down_proj.weight"] @ inner

    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        keys, values, result = [], [], []
        for position, state in enumerate(stream):
            normed = norm(state, at + "input_layernorm.weight")
            query = project("q", at, normed).view(heads, width)
            keys.append(
                [
                    naive_rotate(k, position, config.rope_theta)
                    for k in project("k", at, normed).view(-1, width)
                ]
            )
            values.append(project("v", at, normed).view(kv_heads, width))
            mixed = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                turned = naive_rotate(query[head], position, config.rope_theta)
                scores = torch.stack([turned @ k[group] for k in keys]) / math.sqrt(width)
                shares = scores.softmax(0)
                mixed.append(sum(share * v[group] for share, v in zip(shares, values, strict=True)))
            attended = weights[at + "self_attn.o_proj.weight"] @ torch.cat(mixed)
            after = state + attended
            total = after
            if config.has_context_mlp:
                source = state if config.context_mlp_input == "residual" else after
                total = total + swiglu(
                    norm(source, at + "post_attention_layernorm.weight"), at + "mlp."
                )
            if config.has_tables:
                total = total + swiglu(
                    norm(embedding[ids[position]], at + "memory_layernorm.weight"),
                    at + "memory_mlp.",
                )
            result.append(total)
        stream = result
    head = weights.get("lm_head.weight", embedding)
    return torch.stack([head @ norm(state, "model.norm.weight") for state in stream])


@kinds
def test_logits_equal_the_naive_decoder(kind: dict[str, object]) -> None:
    model = pico_model(**kind, dtype=torch.float64)
    ids = pico_ids(2, 9)
    logits = model(ids)
    for row in range(2):
        torch.testing.assert_close(
            logits[row], naive_logits(model, ids[row].tolist()), rtol=1e-6, atol=1e-6
        )


@kinds
def test_cached_steps_equal_the_full_forward(kind: dict[str, object]) -> None:
    model = pico_model(**kind)
    ids = pico_ids(3, 17)
    with torch.no_grad():
        full = model(ids)
        cache = KVCache(model.config, 3, 17)
        parts = [model(piece, cache=cache) for piece in ids.split([6, 4, 1, 1, 1, 3, 1], dim=1)]
    assert cache.length == 17
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=2e-5)


def test_a_shortened_cache_forgets() -> None:
    model = pico_model()
    ids = pico_ids(1, 8)
    with torch.no_grad():
        cache = KVCache(model.config, 1, 8)
        model(ids, cache=cache)
        cache.length = 5
        again = model(ids[:, 5:], cache=cache)
        torch.testing.assert_close(again, model(ids)[:, 5:], rtol=0, atol=2e-5)


def test_a_full_cache_is_refused() -> None:
    model = pico_model()
    cache = KVCache(model.config, 1, 4)
    with pytest.raises(UsageError, match=r"cache: 0 \+ 5 positions do not fit, expected at most 4"):
        model(pico_ids(1, 5), cache=cache)
    assert cache.length == 0


def test_one_token_text() -> None:
    model = pico_model(dtype=torch.float64)
    torch.testing.assert_close(model(torch.tensor([[7]]))[0], naive_logits(model, [7]))


def test_half_precision_stays_near_float32() -> None:
    ids = pico_ids()
    exact = pico_model()(ids)
    for dtype in (torch.bfloat16, torch.float16):
        logits = pico_model(dtype=dtype)(ids)
        assert logits.dtype == dtype
        assert (logits.float() - exact).abs().mean() < 0.05


class FixedRows:
    """Rows of a table held in memory, with a record of what was asked."""

    def __init__(self, planes: Sequence[Tensor | None]) -> None:
        self.planes = planes
        self.asked: list[Tensor] = []

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        self.asked.append(ids_n)
        return [None if plane is None else plane[ids_n] for plane in self.planes]


@pytest.mark.parametrize("architecture", ["memory", "flex"])
def test_a_table_replaces_the_ffn(architecture: str) -> None:
    model = pico_model(architecture)
    everything = torch.arange(model.config.vocab_size)
    ids = pico_ids()
    with torch.no_grad():
        table = FixedRows([model.ffn_plane(layer, everything) for layer in range(2)])
        torch.testing.assert_close(model(ids, rows=table), model(ids), rtol=0, atol=1e-5)
    (asked,) = table.asked
    assert torch.equal(asked, ids.unique())


def test_the_same_block_gives_the_same_bits() -> None:
    model = pico_model()
    ids = pico_ids()
    with torch.no_grad():
        block = ids.unique()
        table: list[Tensor | None] = []
        for layer in range(2):
            plane = torch.zeros(model.config.vocab_size, 32)
            plane[block] = model.ffn_plane(layer, block)
            table.append(plane)
        assert torch.equal(model(ids, rows=FixedRows(table)), model(ids))


def test_a_missing_plane_adds_nothing() -> None:
    model = pico_model()
    everything = torch.arange(model.config.vocab_size)
    ids = pico_ids()
    with torch.no_grad():
        last = model.ffn_plane(1, everything)
        zeros = torch.zeros_like(last)
        dropped = model(ids, rows=FixedRows([None, last]))
        assert torch.equal(dropped, model(ids, rows=FixedRows([zeros, last])))
        assert not torch.equal(dropped, model(ids))


def test_rows_and_models_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="dense model has no tables"):
        pico_model("dense")(pico_ids(), rows=FixedRows([None, None]))
    with pytest.raises(UsageError, match="no token FFN"):
        Decoder(pico_config(), with_ffn=False)(pico_ids())
    with pytest.raises(UsageError, match="no token FFN"):
        pico_model("dense").ffn_plane(0, torch.tensor([1]))


def test_ffn_rows_are_planes_of_the_model() -> None:
    model = pico_model()
    ids = torch.tensor([3, 5, 90])
    planes = FfnRows(model).fetch(ids)
    assert len(planes) == 2
    for layer, plane in enumerate(planes):
        assert plane is not None
        assert torch.equal(plane, model.ffn_plane(layer, ids))
    assert torch.equal(planes[-1], planes[1])
    assert len(planes[:1]) == 1
    with pytest.raises(IndexError):
        planes[2]


def test_distinct_tokens_spread_back() -> None:
    ids = pico_ids()
    for batch in (ids, ids[:1, :1]):
        tokens = DistinctTokens(batch)
        assert torch.equal(tokens.ids_n, batch.unique())
        assert torch.equal(tokens.gather(tokens.ids_n[:, None].float())[..., 0], batch.float())


def test_initial_weights_come_from_the_generator() -> None:
    config = preset("tiny", "memory", vocab_size=64)
    first, second = Decoder(config), Decoder(config)
    other = Decoder(config, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.embedding, second.embedding)
    assert not torch.equal(first.embedding, other.embedding)
    block = first.block(0)
    assert block.memory_mlp is not None
    assert block.memory_mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.memory_mlp.down_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert all(bool(torch.isfinite(p).all()) for p in first.parameters())
