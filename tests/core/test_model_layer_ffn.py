"""`LayerFfn`: the rows of one layer straight from a checkpoint folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _pico import pico_checkpoint
from safetensors.torch import load_file, save_file

from tolkit.errors import NonFiniteError, UsageError
from tolkit.model import LayerFfn, checkpoint_tensors, load_checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
