"""Checkpoint folders: what is written, and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _nano import tree_bytes
from _pico import (
    PICO_VOCAB,
    pico_checkpoint,
    pico_counts,
    pico_ids,
    pico_model,
    pico_tokenizer_files,
    same_weights,
)
from safetensors.torch import load_file, save_file

from tolkit.errors import NonFiniteError, UsageError
from tolkit.model import checkpoint_tensors, decoder_from_tensors, load_checkpoint, save_checkpoint

KINDS = [
    pytest.param({"architecture": "dense"}, id="dense"),
    pytest.param({"architecture": "memory"}, id="memory"),
    pytest.param({"architecture": "memory", "tie_word_embeddings": False}, id="memory-untied"),
    pytest.param({"architecture": "flex"}, id="flex"),
    pytest.param(
        {
            "architecture": "flex",
            "context_mlp_type": "linear",
            "context_mlp_input": "residual",
            "bos_token_id": None,
            "rope_theta": 77.5,
        },
        id="flex-linear-residual",
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_comes_back(tmp_path: Path, kind: dict[str, object], dtype: torch.dtype) -> None:
    model = pico_model(**kind, dtype=dtype)
    save_checkpoint(model, tmp_path / "m", pico_tokenizer_files(), pico_counts())
    back = load_checkpoint(tmp_path / "m")
    assert back.config == model.config
    assert back.embedding.dtype == dtype
    assert same_weights(back, model)
    ids = pico_ids()
    assert torch.equal(back(ids), model(ids))
    stored = checkpoint_tensors(tmp_path / "m")
    assert stored.tokenizer_files() == pico_tokenizer_files()
    assert stored.tokenizer_bytes == pico_tokenizer_files()["tokenizer.json"]
    counts = stored.token_counts()
    assert counts is not None
    np.testing.assert_array_equal(counts, pico_counts())


def test_names_and_files_are_the_documented_ones(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m", "flex", tie_word_embeddings=False)
    assert set(tree_bytes(path)) == {
        "config.json",
        "model.safetensors",
        "token_counts.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    ffns = [
        f"{ffn}.{part}_proj" for ffn in ("memory_mlp", "mlp") for part in ("gate", "up", "down")
    ]
    norms = ["input_layernorm", "memory_layernorm", "post_attention_layernorm"]
    expected = {
        f"model.layers.{layer}.{part}.weight"
        for layer in range(2)
        for part in [*attention, *ffns, *norms]
    }
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(load_file(path / "model.safetensors")) == expected
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "memoryllm"
    assert config["architecture_kind"] == "flex"
    assert config["dtype"] == "float32"


def test_shards_and_index(tmp_path: Path) -> None:
    model = pico_model("memory", dtype=torch.bfloat16)
    limit_bytes = 12_000
    save_checkpoint(model, tmp_path / "m", max_shard_bytes=limit_bytes)
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert not (tmp_path / "m" / "model.safetensors").exists()
    for shard in shards:
        assert sum(tensor.nbytes for tensor in load_file(shard).values()) <= limit_bytes
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert same_weights(load_checkpoint(tmp_path / "m"), model)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for limit_bytes in (1 << 30, 10_000):
        folders = [tmp_path / f"{name}{limit_bytes}" for name in "ab"]
        for folder in folders:
            save_checkpoint(
                pico_model(), folder, pico_tokenizer_files(), max_shard_bytes=limit_bytes
            )
        assert tree_bytes(folders[0]) == tree_bytes(folders[1])


def test_loading_casts_and_owns_its_memory(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    before = (path / "model.safetensors").read_bytes()
    assert load_checkpoint(path, dtype=torch.bfloat16).embedding.dtype == torch.bfloat16
    model = load_checkpoint(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (path / "model.safetensors").read_bytes() == before


def test_mixed_dtypes_load_in_the_wider(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 1e-4
    save_file(weights, path / "model.safetensors")
    model = load_checkpoint(path)
    assert model.embedding.dtype == torch.float32
    assert torch.equal(model.state_dict()["model.norm.weight"], weights["model.norm.weight"])


def test_without_ffn_the_backbone_runs_from_tables(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m", "flex")
    whole, backbone = load_checkpoint(path), load_checkpoint(path, with_ffn=False)
    assert not backbone.has_ffn
    assert not [name for name in backbone.state_dict() if ".memory_" in name]
    everything = torch.arange(PICO_VOCAB)

    class Table:
        def fetch(self, ids_n: torch.Tensor) -> list[torch.Tensor | None]:
            return [whole.ffn_plane(layer, everything)[ids_n] for layer in range(2)]

    ids = pico_ids()
    torch.testing.assert_close(backbone(ids, rows=Table()), whole(ids), rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="loaded without its FFN"):
        save_checkpoint(backbone, tmp_path / "n")


def test_a_decoder_from_any_source_of_tensors() -> None:
    model = pico_model()
    weights = model.state_dict()
    copy = decoder_from_tensors(model.config, weights.__getitem__)
    assert same_weights(copy, model)
    assert copy.embedding.data_ptr() != model.embedding.data_ptr()


def test_a_cast_that_overflows_is_named(tmp_path: Path) -> None:
    model = pico_model()
    with torch.no_grad():
        model.embedding[9, 4] = 1e6
    save_checkpoint(model, tmp_path / "m")
    with pytest.raises(NonFiniteError, match=r"row 9.*float16"):
        load_checkpoint(tmp_path / "m", dtype=torch.float16)


def test_counts_may_be_a_tensor(tmp_path: Path) -> None:
    save_checkpoint(pico_model(), tmp_path / "m", token_counts=torch.arange(PICO_VOCAB))
    counts = checkpoint_tensors(tmp_path / "m").token_counts()
    assert counts is not None
    assert counts.dtype == np.uint64
    assert counts.tolist() == list(range(PICO_VOCAB))
    assert checkpoint_tensors(pico_checkpoint(tmp_path / "n", counts=False)).token_counts() is None
