"""Checkpoint folders: what is written, what is read, and the layer-by-layer way in."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _pico import (
    PICO_VOCAB,
    pico_checkpoint,
    pico_counts,
    pico_ids,
    pico_model,
    pico_tokenizer_files,
)
from safetensors.torch import load_file, save_file

from tolkit.errors import (
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    ResourceError,
    UsageError,
)
from tolkit.model import (
    Decoder,
    LayerFfn,
    checkpoint_tensors,
    decoder_from_tensors,
    load_checkpoint,
    save_checkpoint,
)
from tolkit_formats import files

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


def content(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in sorted(folder.iterdir())}


def same_weights(first: Decoder, second: Decoder) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)


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
    assert set(content(path)) == {
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
        assert content(folders[0]) == content(folders[1])


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["memory", "flex"])
def test_layer_ffn_gives_the_rows_of_the_model(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    path = pico_checkpoint(tmp_path / "m", architecture, dtype=dtype)
    model = load_checkpoint(path, dtype=torch.float32)
    stored = checkpoint_tensors(path)
    block = torch.arange(16, 48)
    for layer in range(2):
        rows = LayerFfn(stored, layer)(block)
        assert rows.dtype == torch.float32
        assert not rows.requires_grad
        assert torch.equal(rows, model.ffn_plane(layer, block))


def test_layer_ffn_of_an_oddly_aligned_file(tmp_path: Path) -> None:
    """A header whose length is not a multiple of four is legal; the tensors are then copied."""
    path = pico_checkpoint(tmp_path / "m")
    expected = LayerFfn(checkpoint_tensors(path), 0)(torch.arange(8))
    raw = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    padded = raw[8 : 8 + length] + b" "
    (path / "model.safetensors").write_bytes(
        (length + 1).to_bytes(8, "little") + padded + raw[8 + length :]
    )
    stored = checkpoint_tensors(path)
    assert all(stored.tensor(name).data_ptr() % 4 == 0 for name in stored.names)
    assert torch.equal(LayerFfn(stored, 0)(torch.arange(8)), expected)


def test_layer_ffn_names_what_is_not_finite(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][17, 3] = float("nan")
    weights["model.layers.1.memory_mlp.up_proj.weight"][5, 2] = float("-inf")
    save_file(weights, path / "model.safetensors")
    stored = checkpoint_tensors(path)
    rows = LayerFfn(stored, 0)
    assert bool(torch.isfinite(rows(torch.arange(0, 17))).all())
    with pytest.raises(NonFiniteError, match=r"model.embed_tokens.weight.*row 17"):
        rows(torch.arange(10, 20))
    with pytest.raises(NonFiniteError, match=r"layers\.1\.memory_mlp\.up_proj.*-inf in row 5"):
        LayerFfn(stored, 1)


def test_layer_ffn_names_the_token_whose_row_overflows(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    weights = load_file(path / "model.safetensors")
    for part in ("gate", "up"):
        weights[f"model.layers.0.memory_mlp.{part}_proj.weight"] *= 1e25
    save_file(weights, path / "model.safetensors")
    with pytest.raises(NonFiniteError, match="layer 0's FFN gives a non-finite row for token 40"):
        LayerFfn(checkpoint_tensors(path), 0)(torch.tensor([40]))


def test_layer_ffn_of_a_dense_model(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m", "dense")
    with pytest.raises(UsageError, match="dense model has no token-indexed FFN"):
        LayerFfn(checkpoint_tensors(path), 0)


_MEASURE = """
import sys, torch
from pathlib import Path
from tolkit.model import LayerFfn, checkpoint_tensors
def anonymous_bytes():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024
torch.set_num_threads(1)
stored = checkpoint_tensors(sys.argv[1])
held = []
for layer in range(stored.config.num_hidden_layers):
    rows = LayerFfn(stored, layer)
    rows(torch.arange(64))
    held.append(anonymous_bytes())
    del rows
print(max(held) - held[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs RssAnon from /proc")
def test_layer_ffn_holds_one_layer(tmp_path: Path) -> None:
    """Eight bf16 layers, 3 MiB each in float32: the later ones add nothing to the first."""
    path = pico_checkpoint(
        tmp_path / "m",
        vocab_size=16_384,
        hidden_size=256,
        memory_intermediate_size=1024,
        num_hidden_layers=8,
        dtype=torch.bfloat16,
        counts=False,
    )
    layer_bytes = 4 * 3 * 1024 * 256
    printed = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)],
        check=True,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MALLOC_MMAP_THRESHOLD_": "65536",  # freed weights go back, so what stays is held
        },
    ).stdout
    assert int(printed) < 2 * layer_bytes  # seven more would come to stay if one did


def test_an_existing_output_is_kept(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    before = content(path)
    with pytest.raises(OutputExistsError, match="exists already"):
        save_checkpoint(pico_model(seed=1), path)
    assert content(path) == before
    save_checkpoint(pico_model(seed=1), path, force=True)
    assert same_weights(load_checkpoint(path), pico_model(seed=1))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m"]


def test_force_replaces_checkpoints_only(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("home", "file", "link"):
        with pytest.raises(UsageError):
            save_checkpoint(pico_model(), tmp_path / name, force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save_checkpoint(pico_model(), tmp_path / "empty", force=True)
    assert load_checkpoint(tmp_path / "empty").config == pico_model().config


@pytest.mark.parametrize("force", [False, True])
def test_a_fault_at_any_call_leaves_old_new_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """Disk full at every I/O call in turn: the name never holds a mixture, and a rerun works."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # its fault points stay, its waiting goes
    old, new = pico_model(seed=1), pico_model(seed=2)
    path = tmp_path / "m"

    class Fault:
        def __init__(self, at: int) -> None:
            self.calls, self.at = 0, at

        def __call__(self, operation: str, where: str) -> None:
            self.calls += 1
            if self.calls == self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(fault: Fault) -> None:
        files.set_fault_hook(fault)
        try:
            save_checkpoint(new, path, pico_tokenizer_files(), pico_counts(), force=force)
        finally:
            files.set_fault_hook(None)

    def reset() -> None:
        if path.exists():
            files.remove_tree(path)
        if force:
            save_checkpoint(old, path)

    reset()
    count = Fault(-1)
    save(count)
    assert count.calls > 20
    for at in range(1, count.calls + 1):
        reset()
        with pytest.raises(ResourceError, match="no space left"):
            save(Fault(at))
        if path.exists():
            found = load_checkpoint(path)
            assert same_weights(found, old) or same_weights(found, new)
        elif force:
            assert same_weights(load_checkpoint(tmp_path / "m.replaced"), old)
        if not path.exists() or same_weights(load_checkpoint(path), old):
            save(Fault(-1))
            assert same_weights(load_checkpoint(path), new)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = pico_model()
    with torch.no_grad():
        model.embedding[9, 4] = float("inf")
    with pytest.raises(NonFiniteError, match=r"'model.embed_tokens.weight' holds inf in row 9"):
        save_checkpoint(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_cast_that_overflows_is_named(tmp_path: Path) -> None:
    model = pico_model()
    with torch.no_grad():
        model.embedding[9, 4] = 1e6
    save_checkpoint(model, tmp_path / "m")
    with pytest.raises(NonFiniteError, match=r"row 9.*float16"):
        load_checkpoint(tmp_path / "m", dtype=torch.float16)


def test_partners_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"token_counts: shape \[95\], expected \[96\]"):
        save_checkpoint(pico_model(), tmp_path / "m", token_counts=torch.zeros(95))
    with pytest.raises(UsageError, match=r"float64, expected f32, f16 or bf16"):
        save_checkpoint(pico_model(dtype=torch.float64), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_counts_may_be_a_tensor(tmp_path: Path) -> None:
    save_checkpoint(pico_model(), tmp_path / "m", token_counts=torch.arange(PICO_VOCAB))
    counts = checkpoint_tensors(tmp_path / "m").token_counts()
    assert counts is not None
    assert counts.dtype == np.uint64
    assert counts.tolist() == list(range(PICO_VOCAB))
    assert checkpoint_tensors(pico_checkpoint(tmp_path / "n", counts=False)).token_counts() is None
