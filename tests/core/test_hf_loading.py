"""transformers' Auto classes load and save what tolkit writes, through tolkit's own loader."""

from __future__ import annotations

import importlib
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _hf import HF_KINDS, both_forms
from _pico import pico_checkpoint, pico_config, pico_counts, pico_ids, pico_tokenizer_files

from tolkit.data import Tokenizer
from tolkit.errors import (
    BundleError,
    CheckpointError,
    OutputExistsError,
    ResourceError,
    UnsafeInputError,
    UsageError,
)
from tolkit.model import checkpoint_tensors, load_checkpoint

transformers = pytest.importorskip("transformers")

import tolkit.hf as tolkit_hf  # noqa: E402
from tolkit.hf import MemoryLlmConfig, MemoryLlmForCausalLM  # noqa: E402

kinds = pytest.mark.parametrize("kind", HF_KINDS.values(), ids=HF_KINDS.keys())
forms = pytest.mark.parametrize("form", ["checkpoint", "bundle"])
TEXT = "Words, looked up (one by one): 3.14 of them!\n\nAnd \t a second line."


def load(path: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return both_forms(tmp_path_factory.mktemp("memory"))


@kinds
def test_the_config_keeps_every_field(kind: dict[str, Any], tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", **kind, rope_theta=5e5, rms_norm_eps=2e-5)
    config = transformers.AutoConfig.from_pretrained(path)
    assert type(config) is MemoryLlmConfig
    assert config.to_model_config() == checkpoint_tensors(path).config
    assert (
        config.to_model_config()
        == MemoryLlmConfig.from_model_config(checkpoint_tensors(path).config).to_model_config()
    )
    config.save_pretrained(tmp_path / "again")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_an_impossible_config_is_refused_with_its_key() -> None:
    with pytest.raises(CheckpointError, match="num_attention_heads 4 is not a multiple of 3"):
        MemoryLlmForCausalLM(MemoryLlmConfig(num_key_value_heads=3))


def test_registering_again_changes_nothing(paths: dict[str, Path]) -> None:
    tolkit_hf.register()
    tolkit_hf.register()
    assert type(load(paths["checkpoint"])) is MemoryLlmForCausalLM


@forms
def test_the_tokenizer_is_tolkits(paths: dict[str, Path], form: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(paths[form])
    ours = Tokenizer.load(paths[form])
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id) == (0, 1)
    model = load(paths[form])
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (0, 1)
    output = model.generate(**theirs("hello", return_tensors="pt"), max_new_tokens=3)
    assert theirs.decode(output[0]).startswith("hello")


def test_a_tokenizer_without_a_config(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt")
    (path / "tokenizer_config.json").unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert theirs(TEXT)["input_ids"] == Tokenizer.load(path).encode(TEXT)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_again(kind: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", **kind, dtype=dtype)
    model = load(path)
    model.generation_config.temperature = 0.5
    model.save_pretrained(tmp_path / "again")
    back = load_checkpoint(tmp_path / "again")
    assert back.config == load_checkpoint(path).config
    assert back.embedding.dtype == dtype
    for name, weight in load_checkpoint(path).state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    stored = checkpoint_tensors(tmp_path / "again")
    assert stored.tokenizer_files() == pico_tokenizer_files()
    assert np.array_equal(stored.token_counts(), pico_counts())
    assert load(tmp_path / "again").generation_config.temperature == 0.5


def test_changed_weights_are_what_is_saved(tmp_path: Path) -> None:
    model = load(pico_checkpoint(tmp_path / "ckpt"))
    state = {name: weight + 1 for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model.decoder.embedding.mul_(2)
    model.save_pretrained(tmp_path / "changed")
    model.save_pretrained(tmp_path / "given", state_dict=state)
    changed, given = load(tmp_path / "changed"), load(tmp_path / "given")
    assert torch.equal(changed.decoder.embedding, model.decoder.embedding)
    for name, weight in given.state_dict().items():
        assert torch.equal(weight, state[name])


def test_where_a_model_may_be_saved(tmp_path: Path) -> None:
    model = load(pico_checkpoint(tmp_path / "ckpt"))
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    with pytest.raises(OutputExistsError, match="exists already"):
        model.save_pretrained(tmp_path / "empty")
    model.save_pretrained(tmp_path / "empty", force=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises((OutputExistsError, UsageError)):
            model.save_pretrained(tmp_path / "notes", force=force)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


def test_a_fresh_model_from_its_config(tmp_path: Path) -> None:
    config = MemoryLlmConfig.from_model_config(pico_config("flex"))
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "fresh")
    assert load_checkpoint(tmp_path / "fresh").config == pico_config("flex")
    with torch.no_grad():
        ids = pico_ids()
        assert torch.equal(load(tmp_path / "fresh")(ids).logits, model(ids).logits)


def test_a_bundle_is_not_saved_as_a_checkpoint(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a bundle cannot be saved as a checkpoint"):
        load(paths["bundle"]).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@forms
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16"])
def test_number_formats(paths: dict[str, Path], form: str, argument: str, value: Any) -> None:
    model = load(paths[form], **{argument: value})
    stored = model.config.to_dict()
    assert stored.get("dtype", stored.get("torch_dtype")) == "bfloat16"
    assert model.dtype == torch.bfloat16
    ids = pico_ids()
    with torch.no_grad():
        logits = model(ids).logits
        exact = load_checkpoint(paths["checkpoint"], dtype=torch.bfloat16)(ids)
    assert logits.dtype == torch.bfloat16
    limit = (
        0.0 if form == "checkpoint" else 0.02
    )  # rows of a table are rounded once, an FFN's often
    assert (logits.float() - exact.float()).abs().mean() <= limit


@forms
def test_the_stored_format_is_the_default(paths: dict[str, Path], form: str) -> None:
    assert load(paths[form]).dtype == load(paths[form], dtype="auto").dtype == torch.float32


@forms
@pytest.mark.parametrize(("arguments", "problem"), [
    ({"device_map": "auto"}, "device_map: 'auto' is not supported, expected one device"),
    ({"device_map": {"a": 0, "b": 1}}, "device_map: .* expected one device"),
    ({"device_map": "moon"}, "device: expected auto, cpu or cuda, got 'moon'"),
    ({"dtype": torch.int8}, "dtype: expected float32, bfloat16 or float16"),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation: 'flash_attention_2'"),
    ({"use_safetensors": False}, "use_safetensors: pickle weights are never opened"),
    ({"state_dict": {}}, "from_pretrained: state_dict: not supported"),
])  # fmt: skip
def test_what_loading_refuses(
    paths: dict[str, Path], form: str, arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        MemoryLlmForCausalLM.from_pretrained(paths[form], **arguments)


@pytest.mark.parametrize("device_map", [None, "cpu", torch.device("cpu"), {"": "cpu"}])
def test_the_cpu_by_any_name(paths: dict[str, Path], device_map: Any) -> None:
    assert load(paths["checkpoint"], device_map=device_map).device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", 0])
def test_a_device_that_is_not_here(paths: dict[str, Path], device_map: Any) -> None:
    with pytest.raises(ResourceError, match="is not here"):
        load(paths["checkpoint"], device_map=device_map)


def test_settings_in_the_config_are_kept_and_its_shape_is_checked(paths: dict[str, Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(paths["bundle"], use_cache=False)
    model = load(paths["bundle"], config=config)
    assert model(pico_ids()).past_key_values is None
    config.rope_theta = 77.0
    with pytest.raises(UsageError, match="config: is not that of"):
        load(paths["bundle"], config=config)


def test_a_dense_checkpoint_stays_transformers_own(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "dense", "dense")
    assert type(load(path)) is transformers.LlamaForCausalLM
    with pytest.raises(UsageError, match=r"is a dense model, which is transformers' own Llama"):
        MemoryLlmForCausalLM.from_pretrained(path)


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UnsafeInputError, match="pickle weights can run code"):
        load(path)


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 runs code when told to"
)
def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert type(load(path, trust_remote_code=True)) is MemoryLlmForCausalLM
    assert not (tmp_path / "ran").exists()


def test_errors_come_through_as_they_are(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        MemoryLlmForCausalLM.from_pretrained(tmp_path / "nowhere")
    path = pico_checkpoint(tmp_path / "ckpt")
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights, expected model.safetensors"):
        load(path)
    bundle = tmp_path / "bad.tol"
    shutil.copytree(paths["bundle"], bundle)
    (records,) = (bundle / "tables").glob("records-*")
    data = bytearray(records.read_bytes())
    data[-8] ^= 1
    records.write_bytes(data)
    with pytest.raises(BundleError), torch.no_grad():
        load(bundle)(torch.arange(96)[None])


@forms
def test_a_local_folder_needs_no_network(
    paths: dict[str, Path], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(paths[form])
    transformers.AutoTokenizer.from_pretrained(paths[form])
    transformers.AutoConfig.from_pretrained(paths[form])


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tolkit.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ResourceError, match="transformers is not installed") as caught:
        importlib.import_module("tolkit.hf")
    assert caught.value.hint == "pip install 'tolkit[hf]'"
