"""The right file with the wrong partner: exit 5 before a row is served (4 within one bundle).

Every combination is of files that are each sound and of one shape wherever shapes can agree, so
nothing but digests can tell them apart.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from _nano import fault_hook, nano_checkpoint, refresh, reseal, tensor_bytes
from _pico import pico_model, pico_tokenizer_files
from torch import Tensor

from tolkit.build import build
from tolkit.compress import CompressSpec, compress
from tolkit.counts import save_counts
from tolkit.data import Tokenizer
from tolkit.errors import (
    BundleError,
    CheckpointError,
    MismatchError,
    TolError,
    UnsupportedVersionError,
)
from tolkit.model import save_checkpoint
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable, require_partners
from tolkit_formats.errors import DataError
from tolkit_formats.tensorfile import TensorFile

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


def tokenizer_with(change: Callable[[dict], object]) -> bytes:
    document = json.loads(pico_tokenizer_files()["tokenizer.json"])
    change(document)
    return json.dumps(document).encode()


def permute(document: dict) -> None:
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def shrink(document: dict) -> None:
    del document["model"]["vocab"]["a"]


def add_token(document: dict) -> None:
    document["added_tokens"].append(
        {
            "id": 96, "content": "<more>", "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
    )  # fmt: skip


def grow(document: dict) -> None:
    document["model"]["vocab"]["zz"] = 96


def rename(document: dict) -> None:
    vocabulary = document["model"]["vocab"]
    vocabulary["\u00e9"] = vocabulary.pop("a")


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


# Counts.


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


# A bundle put together from two.


@pytest.fixture
def mixed(bundle: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the bundle with one file of a bundle of other weights and the same shapes."""

    def mix(name: str) -> Path:
        other = nano_checkpoint(tmp_path / "other", seed=9)
        tokenizer = tokenizer_with(permute)
        assert len(tokenizer) == len(tokenizer_with(lambda d: None))
        (other / "tokenizer.json").write_bytes(tokenizer)
        build(other, tmp_path / "other.tol", progress=SilentProgress())
        shutil.copytree(bundle, tmp_path / "mixed.tol")
        own = json.loads((bundle / "tol.json").read_bytes())["files"][name]["bytes"]
        data = (tmp_path / "other.tol" / name).read_bytes()
        # Sizes alone must not give it away.
        if len(data) != own and name.endswith(".json"):
            data = data.ljust(own)[:own]
        (tmp_path / "mixed.tol" / name).write_bytes(data)
        return tmp_path / "mixed.tol"

    return mix


@pytest.mark.parametrize(
    "name",
    [
        "tol.json",
        "backbone.safetensors",
        "tokenizer.json",
        "tables/slots.safetensors",
        "tables/checksums.safetensors",
        "tables/records-0-00001-of-00001.safetensors",
    ],
)
def test_a_file_of_another_bundle(
    name: str, mixed: Callable[[str], Path], bundle: Path, tmp_path: Path
) -> None:
    if name == "tol.json":
        path = tmp_path / "mixed.tol"
        other = nano_checkpoint(tmp_path / "other", seed=9)
        build(other, path, progress=SilentProgress())
        shutil.copy(bundle / "tol.json", path / "tol.json")
    else:
        path = mixed(name)
        assert (path / name).read_bytes() != (bundle / name).read_bytes()

    def run() -> None:
        runnable = load_runnable(path)
        assert runnable.rows is not None
        runnable.rows.fetch(torch.arange(96))

    for action in (
        run,
        lambda: compress(
            path, tmp_path / "out.tol", CompressSpec(codec="nf4"), progress=SilentProgress()
        ),
    ):
        with pytest.raises(BundleError) as caught:
            action()
        assert str(path) in caught.value.message and caught.value.exit_code == 4
    assert not (tmp_path / "out.tol").exists()


def sealed_copy(bundle: Path, path: Path) -> Path:
    shutil.copytree(bundle, path)
    return path


def test_a_tokenizer_the_manifest_lists_and_the_tables_are_not_for(
    bundle: Path, tmp_path: Path
) -> None:
    """Every file digest fits; only the source digest says that ids mean something else."""
    path = sealed_copy(bundle, tmp_path / "b.tol")
    (path / "tokenizer.json").write_bytes(tokenizer_with(permute))
    refresh(path)
    with pytest.raises(BundleError, match="not the one the tables are for"):
        load_runnable(path)


def test_a_config_of_other_sizes(bundle: Path, tmp_path: Path) -> None:
    path = sealed_copy(bundle, tmp_path / "b.tol")
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    refresh(path)
    with pytest.raises(BundleError, match=r"config\.json"):
        load_runnable(path)


BACKBONES = {
    "a tensor missing": (lambda t: t.pop("model.norm.weight"), "'model.norm.weight' is missing"),
    "a tensor more": (lambda t: t.update(extra=("F32", [1], bytes(4))), "'extra' belongs to no"),
    "another shape": (
        lambda t: t.update({"model.norm.weight": ("F32", [4, 4], bytes(64))}),
        "'model.norm.weight' is F32 [4, 4]",
    ),
    "another dtype": (
        lambda t: t.update({"model.norm.weight": ("I32", [16], bytes(64))}),
        "'model.norm.weight' is I32 [16]",
    ),
    "empty": (lambda t: t.clear(), "is missing"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_that_fits_no_model(name: str, bundle: Path, tmp_path: Path) -> None:
    change, word = BACKBONES[name]
    path = sealed_copy(bundle, tmp_path / "b.tol")
    file = TensorFile(path / "backbone.safetensors")
    tensors = {
        key: (info.dtype, list(info.shape), file.array(key).tobytes())
        for key, info in file.infos.items()
    }
    change(tensors)
    (path / "backbone.safetensors").write_bytes(tensor_bytes(tensors))
    refresh(path)
    with pytest.raises(BundleError) as caught:
        load_runnable(path)
    assert word in caught.value.message and "backbone.safetensors" in caught.value.message


def test_rows_that_are_not_added_are_not_run(bundle: Path, tmp_path: Path) -> None:
    for number, change in enumerate(({"combine": "other"}, {"lookup_scale": 0.5})):
        path = sealed_copy(bundle, tmp_path / f"{number}.tol")
        reseal(path, lambda m, change=change: m.update(change))
        with pytest.raises(UnsupportedVersionError, match="combine is"):
            load_runnable(path)


def test_compress_keeps_how_rows_are_used(bundle: Path, tmp_path: Path) -> None:
    path = sealed_copy(bundle, tmp_path / "b.tol")
    reseal(path, lambda m: m.update(lookup_scale=0.5, out_of_range="row_0"))
    compress(path, tmp_path / "c.tol", CompressSpec(codec="nf4"), progress=SilentProgress())
    kept = json.loads((tmp_path / "c.tol" / "tol.json").read_bytes())
    assert (kept["lookup_scale"], kept["out_of_range"]) == (0.5, "row_0")


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


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["in place", "replaced", "removed"])
def test_a_source_that_changes_while_it_is_read(name: str, how: str, tmp_path: Path) -> None:
    """A mapped file written in place gives new values silently; the rows would be of two models."""
    source = nano_checkpoint(tmp_path / "ckpt")

    def interfere(what: str, path: str) -> None:
        if what != "fsync" or "records-" not in path:
            return
        file = source / name
        data = bytearray(file.read_bytes())
        data[-40] ^= 1
        if how == "in place":
            with file.open("r+b") as stream:
                stream.write(data)
        else:
            file.unlink()
        if how == "replaced":
            file.write_bytes(data)

    with fault_hook(interfere), pytest.raises(CheckpointError) as caught:
        build(source, tmp_path / "b.tol", progress=SilentProgress())
    assert f"ckpt/{name}: changed while it was read" in caught.value.message
    assert not (tmp_path / "b.tol").exists()
