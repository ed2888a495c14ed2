"""The right file with the wrong partner: exit 5 before a row is served.

Every combination is of files that are each sound and of one shape wherever shapes can agree, so
nothing but digests can tell them apart.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from _nano import nano_checkpoint
from _pico import pico_model, pico_tokenizer_files
from _tokenizers import add_token, grow, permute, rename, shrink, tokenizer_with
from torch import Tensor

from tolkit.build import build
from tolkit.compress import CompressSpec, compress
from tolkit.counts import save_counts
from tolkit.data import Tokenizer
from tolkit.errors import CheckpointError, MismatchError, TolError
from tolkit.model import save_checkpoint
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable, require_partners
from tolkit_formats.errors import DataError

SHAPE = {"hidden_size": 16, "num_hidden_layers": 3, "memory_intermediate_size": 24}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nano_checkpoint(tmp_path_factory.mktemp("partners") / "ckpt")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    build(checkpoint, checkpoint.with_name("b.tol"), progress=SilentProgress())
    return checkpoint.with_name("b.tol")


@pytest.fixture(scope="module")
def coded(checkpoint: Path) -> Path:
    spec = CompressSpec(rank="50%", codec="int8")
    compress(checkpoint, checkpoint.with_name("coded.tol"), spec, progress=SilentProgress())
    return checkpoint.with_name("coded.tol")


def with_weights(
    path: Path, change: Callable[[dict[str, Tensor]], object], tokenizer: bytes | None = None
) -> Path:
    """The nano checkpoint with changed weights."""
    model = pico_model("memory", vocab_size=96, **SHAPE)
    with torch.no_grad():
        change(model.state_dict())
    files = pico_tokenizer_files()
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer
    ranks = np.random.default_rng(0).permutation(96) + 1
    save_checkpoint(model, path, files, (50_000 / ranks).astype(np.uint64))
    return path


def one_weight(name: str) -> Callable[[Path], Path]:
    """One value of one tensor is the next float."""

    def change(state: dict[str, Tensor]) -> None:
        flat = state[name].view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))

    return lambda path: with_weights(path, change)


def swap_layers(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if name.startswith("model.layers.0.")]:
        other = name.replace("layers.0.", "layers.1.")
        kept = state[name].clone()
        state[name].copy_(state[other])
        state[other].copy_(kept)


def other_tokenizer(change: Callable[[dict], object]) -> Callable[[Path], Path]:
    return lambda path: with_weights(path, lambda state: None, tokenizer_with(change))


def other_shape(**overrides: int) -> Callable[[Path], Path]:
    return lambda path: nano_checkpoint(path, **overrides)


def other_dtype(path: Path) -> Path:
    model = pico_model("memory", vocab_size=96, **SHAPE).to(torch.bfloat16)
    save_checkpoint(model, path, pico_tokenizer_files(), None)
    return path


FFN = "model.layers.2.memory_mlp."
REFERENCES = {
    "other weights": (other_shape(seed=5), "embedding"),
    "one weight of the embedding": (one_weight("model.embed_tokens.weight"), "embedding"),
    "one weight of a gate": (one_weight(FFN + "gate_proj.weight"), "FFN in layer 2"),
    "one weight of an up": (one_weight(FFN + "up_proj.weight"), "FFN in layer 2"),
    "one weight of a down": (one_weight(FFN + "down_proj.weight"), "FFN in layer 2"),
    "one weight of a norm": (one_weight("model.layers.1.memory_layernorm.weight"), "norm in layer"),
    "one weight of an attention": (
        one_weight("model.layers.1.self_attn.o_proj.weight"),
        "layers.1.self_attn.o_proj",
    ),
    "one weight of the final norm": (one_weight("model.norm.weight"), "model.norm.weight"),
    "layers permuted": (lambda path: with_weights(path, swap_layers), "in layer 0"),
    "other L": (other_shape(num_hidden_layers=4), "4 layers, expected 3"),
    "other D": (other_shape(hidden_size=32), "embedding"),
    "other V": (other_shape(vocab_size=97), "tokenizer"),
    "other dtype": (other_dtype, "embedding"),
    "tokenizer smaller": (other_tokenizer(shrink), "tokenizer"),
    "tokenizer permuted": (other_tokenizer(permute), "tokenizer"),
    "tokenizer renamed": (other_tokenizer(rename), "tokenizer"),
    "other rope": (other_shape(rope_theta=5000.0), "config.json"),
    "dense": (
        lambda path: save_dense(path),
        "no tables",
    ),
}


def save_dense(path: Path) -> Path:
    save_checkpoint(pico_model("dense"), path, pico_tokenizer_files(), None)
    return path


def test_the_right_partner(checkpoint: Path, bundle: Path, coded: Path) -> None:
    reference = load_runnable(checkpoint)
    require_partners(load_runnable(bundle), reference)
    require_partners(load_runnable(coded), reference)
    require_partners(load_runnable(coded), load_runnable(bundle))


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_that_is_not_the_source(name: str, bundle: Path, tmp_path: Path) -> None:
    make, word = REFERENCES[name]
    reference = load_runnable(make(tmp_path / "other"))
    with pytest.raises(MismatchError) as caught:
        require_partners(load_runnable(bundle), reference)
    message = caught.value.message
    assert caught.value.exit_code == 5 and caught.value.hint
    assert word in message and str(reference.path) in message and str(bundle) in message


@pytest.mark.parametrize("change", [grow, add_token], ids=["larger", "added token"])
def test_a_checkpoint_with_a_tokenizer_beyond_its_vocabulary(
    change: Callable[[dict], object], tmp_path: Path
) -> None:
    path = other_tokenizer(change)(tmp_path / "ckpt")
    for action in (
        lambda: build(path, tmp_path / "b.tol", progress=SilentProgress()),
        lambda: load_runnable(path),
    ):
        with pytest.raises(MismatchError, match="96"):
            action()
    dense = save_dense(tmp_path / "dense")
    (dense / "tokenizer.json").write_bytes(tokenizer_with(change))
    with pytest.raises(MismatchError, match="96"):
        load_runnable(dense)


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_counts_of_another(kind: str, checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    source = checkpoint if kind == "checkpoint" else bundle
    digest = Tokenizer.load(checkpoint).digest
    counts = np.ones(96, np.uint64)
    wrong = {
        "size": (np.ones(97, np.uint64), digest, MismatchError),
        "tokenizer": (counts, "0" * 64, MismatchError),
    }
    for name, (array, tokenizer, error) in wrong.items():
        save_counts(tmp_path / name, array, tokenizer)
        spec = CompressSpec(codec="nf4", weights=str(tmp_path / name))
        with pytest.raises(error) as caught:
            compress(source, tmp_path / "out.tol", spec, progress=SilentProgress())
        assert caught.value.exit_code == 5 and str(tmp_path / name) in caught.value.message
    (tmp_path / "junk").write_bytes(b"junk")
    spec = CompressSpec(codec="nf4", weights=str(tmp_path / "junk"))
    with pytest.raises(DataError, match="junk"):
        compress(source, tmp_path / "out.tol", spec, progress=SilentProgress())
    assert not (tmp_path / "out.tol").exists()


def test_a_checkpoint_with_counts_of_another_size(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    save_counts(tmp_path / "ckpt" / "token_counts.safetensors", np.ones(95, np.uint64), "0" * 64)
    with pytest.raises(TolError, match=r"token_counts.*\[95\], expected U64 \[96\]"):
        build(tmp_path / "ckpt", tmp_path / "b.tol", progress=SilentProgress())


def test_a_bundle_without_tokenizer_says_so(tmp_path: Path) -> None:
    model = pico_model("memory", vocab_size=96, **SHAPE)
    save_checkpoint(model, tmp_path / "ckpt")
    build(tmp_path / "ckpt", tmp_path / "b.tol", progress=SilentProgress())
    shutil.copy(
        nano_checkpoint(tmp_path / "other") / "tokenizer.json", tmp_path / "b.tol/tokenizer.json"
    )
    for path in (tmp_path / "ckpt", tmp_path / "b.tol"):
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
            load_runnable(path)
