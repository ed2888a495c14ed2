"""A bundle put together from two, or with a file that is not for its tables: exit 4.

And bundles whose rows are not simply added: kept, but not run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _nano import nano_checkpoint, refresh, reseal, tensor_bytes
from _tokenizers import permute, tokenizer_with

from tolkit.build import build
from tolkit.compress import CompressSpec, compress
from tolkit.errors import BundleError, UnsupportedVersionError
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable
from tolkit_formats.tensorfile import TensorFile


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    build(nano_checkpoint(folder / "ckpt"), folder / "b.tol", progress=SilentProgress())
    return folder / "b.tol"


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
