"""A dense model is a plain Llama: exchanged with transformers in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _pico import pico_checkpoint, pico_ids, pico_model

from tolkit.errors import CheckpointError
from tolkit.model import checkpoint_tensors, load_checkpoint, save_checkpoint

transformers = pytest.importorskip("transformers")

SHAPES = [
    pytest.param(tied, kv_heads, id=f"{'tied' if tied else 'untied'}-{kv_heads}kv")
    for tied in (True, False)
    for kv_heads in (1, 2, 4)
]


def llama_config(**overrides: object) -> object:
    values = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
    }
    return transformers.LlamaConfig(**{**values, **overrides})


@pytest.mark.parametrize(("tied", "kv_heads"), SHAPES)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_llama_loads_ours(tmp_path: Path, tied: bool, kv_heads: int, theta: float) -> None:
    path = pico_checkpoint(
        tmp_path / "dense",
        "dense",
        tie_word_embeddings=tied,
        num_key_value_heads=kv_heads,
        rope_theta=theta,
    )
    theirs = transformers.LlamaForCausalLM.from_pretrained(path)
    ids = pico_ids()
    with torch.no_grad():
        difference = (theirs(ids).logits - load_checkpoint(path)(ids)).abs().max().item()
    assert difference == 0.0
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer.eos_token_id == 1


@pytest.mark.parametrize(("tied", "kv_heads"), SHAPES)
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_theirs_loads_here(tmp_path: Path, tied: bool, kv_heads: int, shard: str) -> None:
    config = llama_config(
        tie_word_embeddings=tied,
        num_key_value_heads=kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 123456.0},
        eos_token_id=[1, 2],
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "llama", max_shard_size=shard)
    sharded = (tmp_path / "llama" / "model.safetensors.index.json").exists()
    assert sharded == (shard == "10KB")
    ours = load_checkpoint(tmp_path / "llama")
    assert ours.config.architecture == "dense"
    assert ours.config.rope_theta == 123456.0
    assert ours.config.eos_token_id == 1
    ids = pico_ids()
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max().item() == 0.0


def test_bf16_travels_both_ways(tmp_path: Path) -> None:
    model = pico_model("dense", dtype=torch.bfloat16)
    save_checkpoint(model, tmp_path / "dense")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "again")
    back = load_checkpoint(tmp_path / "again")
    assert back.embedding.dtype == torch.bfloat16
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


@pytest.mark.parametrize(("overrides", "problem"), [
    ({"attention_bias": True}, "attention_bias is true"),
    ({"mlp_bias": True}, "mlp_bias is true"),
    ({"head_dim": 16}, "head_dim must be hidden_size / heads = 8, got 16"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, expected 'silu'"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope type 'linear' is not supported, expected 'default'",
    ),
])  # fmt: skip
def test_other_llamas_are_refused_by_name(
    tmp_path: Path, overrides: dict[str, object], problem: str
) -> None:
    transformers.LlamaForCausalLM(llama_config(**overrides)).save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError) as caught:
        checkpoint_tensors(tmp_path / "llama")
    assert problem in caught.value.message
    assert caught.value.message.startswith(str(tmp_path / "llama" / "config.json"))


def test_rope_theta_is_read_from_either_key(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "dense", "dense", rope_theta=5000.0)
    written = json.loads((path / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5000.0
    for missing in ("rope_theta", "rope_parameters"):
        kept = {key: value for key, value in written.items() if key != missing}
        (path / "config.json").write_text(json.dumps(kept))
        assert checkpoint_tensors(path).config.rope_theta == 5000.0
