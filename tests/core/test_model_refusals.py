"""Broken and hostile checkpoint folders: one clear line, the right class, nothing executed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _pico import pico_checkpoint, pico_model
from safetensors.torch import load_file, save_file

from tolkit.errors import CheckpointError, NonFiniteError, TolError, UnsafeInputError
from tolkit.model import ModelConfig, checkpoint_tensors, load_checkpoint, save_checkpoint

Edit = Callable[[Path], None]
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.memory_mlp.up_proj.weight"


def refusal(path: Path, kind: type[TolError]) -> str:
    """The message, after checking that both ways in refuse with exactly this class."""
    messages = []
    for opener in (checkpoint_tensors, load_checkpoint):
        with pytest.raises(TolError) as caught:
            opener(path)
        assert type(caught.value) is kind
        assert caught.value.exit_code == 4
        messages.append(caught.value.message)
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert str(path) in messages[0]
    return messages[0]


def edit_config(path: Path, **changes: object) -> None:
    values = json.loads((path / "config.json").read_text())
    values.update(changes)
    kept = {key: value for key, value in values.items() if value != "REMOVE"}
    (path / "config.json").write_text(json.dumps(kept))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def test_no_folder(tmp_path: Path) -> None:
    assert "no such checkpoint folder" in refusal(tmp_path / "gone", CheckpointError)


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    message = refusal(path / "model.safetensors", CheckpointError)
    assert "is a file, expected a checkpoint folder" in message


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path, CheckpointError)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    (path / "model.safetensors").unlink()
    assert "no weights, expected model.safetensors" in refusal(path, CheckpointError)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b'{"model_type": "llama", "model_type": "memoryllm"}', "duplicate key 'model_type'"),
        (b'{"vocab_size": NaN}', "NaN is not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b" " * (1 << 21), "larger than the limit"),
    ],
    ids=["empty", "list", "duplicate", "nan", "utf16", "huge"],
)
def test_config_that_is_not_an_object(tmp_path: Path, content: bytes, problem: str) -> None:
    path = pico_checkpoint(tmp_path / "m")
    (path / "config.json").write_bytes(content)
    assert problem in refusal(path, CheckpointError)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": "REMOVE"}, "model_type None is not supported"),
        ({"architecture_kind": "REMOVE"}, "architecture_kind must be one of memory, flex"),
        ({"architecture_kind": "dense"}, "architecture_kind must be one of memory, flex"),
        ({"architecture_kind": ["flex"]}, "architecture_kind must be one of memory, flex"),
        ({"vocab_size": "REMOVE"}, "vocab_size is missing"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"vocab_size": True}, "vocab_size must be an integer of at least 1, got True"),
        ({"vocab_size": 1 << 40}, "vocab_size must be an integer of at most"),
        ({"hidden_size": 32.0}, "hidden_size must be an integer of at least 1, got 32.0"),
        ({"hidden_size": 36}, "hidden_size 36 over 4 heads must be an even whole number"),
        ({"hidden_size": 1 << 30}, "hidden_size must be an integer of at most"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer of at most"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of 3"),
        ({"memory_intermediate_size": "REMOVE"}, "memory_intermediate_size is missing"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive finite number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive finite number"),
        ({"rope_theta": 0}, "rope_theta must be a positive finite number"),
        ({"rope_parameters": 7}, "rope_parameters must be an object, got 7"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta 5.0 disagree"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope type 'llama3' is not supported"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"bos_token_id": -1}, "bos_token_id must be a token id"),
        ({"eos_token_id": 96}, "eos_token_id 96 is outside the vocabulary of 96"),
        ({"context_mlp_type": "moe"}, "context_mlp_type must be one of swiglu, linear"),
        ({"context_mlp_input": 3}, "context_mlp_input must be one of post_attention, residual"),
    ],
    ids=lambda value: ",".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_config_values(tmp_path: Path, changes: dict[str, object], problem: str) -> None:
    path = pico_checkpoint(tmp_path / "m")
    edit_config(path, **changes)
    message = refusal(path, CheckpointError)
    assert problem in message
    assert message.startswith(f"{path / 'config.json'}: ")


def test_unknown_keys_and_remote_code_are_ignored(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    canary = tmp_path / "canary"
    (path / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    edit_config(
        path,
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"},
        some_new_key={"a": [1]},
        rope_scaling=None,
        eos_token_id=[3, 4],
    )
    assert load_checkpoint(path).config.eos_token_id == 3
    assert not canary.exists()


@pytest.mark.parametrize("keep_bytes", [0, 7, 8, 100, -1, -4096])
def test_truncated_weights(tmp_path: Path, keep_bytes: int) -> None:
    path = pico_checkpoint(tmp_path / "m")
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw[:keep_bytes])
    message = refusal(path, CheckpointError)
    assert str(path / "model.safetensors") in message


def pickled_open(path: Path) -> bytes:
    """A pickle that creates `path` when loaded."""
    return f"cbuiltins\nopen\n(S'{path}'\nS'w'\ntR.".encode()


def test_weights_that_are_not_safetensors(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    for disguised in (b"PK\x03\x04" + bytes(100), pickled_open(tmp_path) + bytes(100)):
        (path / "model.safetensors").write_bytes(disguised)
        refusal(path, CheckpointError)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    edit_weights(path, lambda weights: weights.__delitem__(UP))
    assert f"tensor {UP!r} is missing" in refusal(path, CheckpointError)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    edit_weights(path, lambda weights: weights.update({"model.layers.2.extra": torch.ones(1)}))
    assert "unexpected tensor 'model.layers.2.extra'" in refusal(path, CheckpointError)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    edit_weights(path, lambda weights: weights.update({UP: torch.ones(48, 31)}))
    message = refusal(path, CheckpointError)
    assert f"tensor {UP!r}: shape [48, 31], expected [48, 32]" in message


def test_a_wrong_dtype_is_named(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    edit_weights(path, lambda weights: weights.update({UP: torch.ones(48, 32).double()}))
    message = refusal(path, CheckpointError)
    assert f"tensor {UP!r}: dtype F64 is not read, expected F32, F16, BF16" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "place"),
    [(EMBEDDING, "row 41"), (UP, "row 41"), ("model.norm.weight", "entry 21")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(
    tmp_path: Path, value: float, name: str, place: str, dtype: torch.dtype
) -> None:
    path = pico_checkpoint(tmp_path / "m", dtype=dtype)

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        flat = weights[name].view(-1, weights[name].shape[-1])
        flat[min(41, len(flat) - 1), 21] = value

    edit_weights(path, spoil)
    expected = f"{path}: tensor {name!r} holds {value} in {place}, expected finite weights"
    with pytest.raises(NonFiniteError) as caught:
        load_checkpoint(path)
    assert caught.value.message == expected
    with pytest.raises(NonFiniteError) as caught:
        checkpoint_tensors(path).check_finite()
    assert caught.value.message == expected
    checkpoint_tensors(path).check_finite(("model.layers.0.input_layernorm.weight",))


@pytest.mark.parametrize("suffix", ["pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "x.npz"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    path = pico_checkpoint(tmp_path / "m")
    canary = tmp_path / "canary"
    (path / suffix).write_bytes(pickled_open(canary))
    assert load_checkpoint(path).config == pico_model().config  # safetensors wins where both are
    (path / "model.safetensors").unlink()
    message = refusal(path, UnsafeInputError)
    assert "pickle" in message
    assert suffix in message
    assert "are never opened" in refusal(path / suffix, UnsafeInputError)
    assert not canary.exists()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of several shards with an index."""
    save_checkpoint(pico_model(), tmp_path / "m", max_shard_bytes=20_000)
    return tmp_path / "m"


def edit_index(path: Path, shard: object) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][UP] = shard
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    ["../m/model-00001-of-00005.safetensors", "/etc/passwd", "a\\b", "..", "", "a\0b", 7, None],
)
def test_an_index_that_leaves_the_folder(sharded: Path, shard: object) -> None:
    edit_index(sharded, shard)
    message = refusal(sharded, UnsafeInputError)
    assert f"tensor {UP!r} points to {shard!r}, expected a file name in the folder" in message


def test_an_index_that_names_a_pickle(sharded: Path) -> None:
    edit_index(sharded, "pytorch_model.bin")
    assert "never opened" in refusal(sharded, UnsafeInputError)


def test_an_index_without_its_shard(sharded: Path) -> None:
    first = min(sharded.glob("model-*.safetensors"))
    first.unlink()
    assert f"shard {first.name} is missing" in refusal(sharded, CheckpointError)


def test_an_index_that_disagrees_with_its_shards(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    home = index["weight_map"].pop(UP)
    file.write_text(json.dumps(index))
    message = refusal(sharded, CheckpointError)
    assert f"{sharded / home}: unexpected tensor {UP!r}, not in the index" in message
    other = next(shard for shard in index["weight_map"].values() if shard != home)
    edit_index(sharded, other)
    message = refusal(sharded, CheckpointError)
    assert f"{sharded / other}: tensor {UP!r} is missing, the index names it" in message


def test_an_index_without_weight_map(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "no weight_map object" in refusal(sharded, CheckpointError)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    (tmp_path / "blob").write_bytes((path / "model.safetensors").read_bytes())
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(tmp_path / "blob")
    assert load_checkpoint(path).config == pico_model().config
    (tmp_path / "blob").unlink()
    refusal(path, CheckpointError)


def test_a_second_copy_of_a_tied_head(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m", "dense")
    edit_weights(path, lambda w: w.update({"lm_head.weight": w[EMBEDDING].clone()}))
    assert load_checkpoint(path).lm_head is None
    edit_weights(path, lambda w: w.update({"lm_head.weight": w[EMBEDDING] + 1}))
    assert "unexpected tensor 'lm_head.weight'" in refusal(path, CheckpointError)


def test_rotary_constants_of_old_writers(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m", "dense")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(path, lambda weights: weights.update({name: torch.ones(4)}))
    assert name not in checkpoint_tensors(path).names


def test_token_counts_of_another_vocabulary(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "m")
    counts = torch.zeros(95, dtype=torch.uint64)
    save_file({"token_counts": counts}, path / "token_counts.safetensors")
    with pytest.raises(CheckpointError, match=r"U64 \[95\], expected U64 \[96\]"):
        checkpoint_tensors(path).token_counts()


def test_asking_for_a_tensor_there_is_not(tmp_path: Path) -> None:
    stored = checkpoint_tensors(pico_checkpoint(tmp_path / "m"))
    with pytest.raises(CheckpointError, match="tensor 'nothing' is missing"):
        stored.tensor("nothing")


def test_config_survives_json() -> None:
    for model in (pico_model("flex", context_mlp_type="linear"), pico_model("dense")):
        written = json.loads(json.dumps(model.config.to_json()))
        assert ModelConfig.from_json(written) == model.config
