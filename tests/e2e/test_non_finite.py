"""NaN, infinities and numbers a format cannot hold: the error names tensor, layer and token."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from _nano import edit_record, nano_checkpoint, refresh, tensor_bytes, tree_bytes
from _pico import pico_model, pico_tokenizer_files
from torch import Tensor

from tolkit.build import build
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.errors import InputError, NonFiniteError, TolError, UsageError
from tolkit.model import Decoder, load_checkpoint, save_checkpoint
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable
from tolkit_formats import open_bundle, verify
from tolkit_formats.tensorfile import TensorFile

NAN, INF = math.nan, math.inf
BAD = {"NaN": NAN, "Inf": INF, "-Inf": -INF}
LAYER, TOKEN = 1, 41
PREFIX = f"model.layers.{LAYER}."
PLACES = {
    "embedding": ("model.embed_tokens.weight", (TOKEN, 3), f"row {TOKEN}"),
    "memory norm": (PREFIX + "memory_layernorm.weight", (5,), "entry 5"),
    "gate": (PREFIX + "memory_mlp.gate_proj.weight", (7, 2), "row 7"),
    "up": (PREFIX + "memory_mlp.up_proj.weight", (7, 2), "row 7"),
    "down": (PREFIX + "memory_mlp.down_proj.weight", (9, 0), "row 9"),
    "attention": (PREFIX + "self_attn.q_proj.weight", (0, 0), "row 0"),
    "final norm": ("model.norm.weight", (0,), "entry 0"),
}


def broken_checkpoint(path: Path, name: str, index: tuple[int, ...], number: float) -> Path:
    """A checkpoint no writer of ours would write: one weight is `number`."""
    nano_checkpoint(path)
    file = TensorFile(path / "model.safetensors")
    tensors = {
        key: (info.dtype, list(info.shape), file.array(key).tobytes())
        for key, info in file.infos.items()
    }
    dtype, shape, data = tensors[name]
    array = np.frombuffer(data, np.float32).reshape(shape).copy()
    array[index] = number
    tensors[name] = (dtype, shape, array.tobytes())
    (path / "model.safetensors").write_bytes(tensor_bytes(tensors))
    return path


def build_f16(source: Path, out: Path) -> None:
    build(source, out, progress=SilentProgress())


def compress_nf4(source: Path, out: Path) -> None:
    compress(source, out, CompressSpec(codec="nf4"), progress=SilentProgress())


def compress_rank(source: Path, out: Path) -> None:
    compress(source, out, CompressSpec(rank="50%", codec="nf4"), progress=SilentProgress())


def compress_rank_alone(source: Path, out: Path) -> None:
    spec = CompressSpec(rank="50%", codec="nf4", feedback=False)
    compress(source, out, spec, progress=SilentProgress())


def refused(action: Callable[[Path, Path], object], source: Path, out: Path, *words: str) -> str:
    with pytest.raises(NonFiniteError) as caught:
        action(source, out)
    message = caught.value.message
    for word in (str(source), *words):
        assert word in message, f"{word!r} is not in: {message}"
    assert message.isprintable() and caught.value.exit_code == 4
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return message


@pytest.mark.parametrize("number", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("place", PLACES)
def test_a_weight_that_is_not_finite(tmp_path: Path, place: str, number: float) -> None:
    name, index, where = PLACES[place]
    source = broken_checkpoint(tmp_path / "ckpt", name, index, number)
    for action in (build_f16, compress_nf4, compress_rank):
        refused(action, source, tmp_path / "b.tol", f"'{name}'", where, str(number))
    with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
        load_checkpoint(source)


def changed(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A checkpoint of finite weights that were changed."""
    model: Decoder = pico_model(
        "memory", hidden_size=16, num_hidden_layers=3, memory_intermediate_size=24
    )
    with torch.no_grad():
        change(model.state_dict())
    save_checkpoint(model, path, pico_tokenizer_files(), None)
    return path


def scale_down_proj(factor: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state[PREFIX + "memory_mlp.down_proj.weight"].mul_(factor)


@pytest.mark.parametrize("action", [build_f16, compress_rank])
def test_a_value_beyond_f16(tmp_path: Path, action: Callable[[Path, Path], object]) -> None:
    source = changed(tmp_path / "ckpt", scale_down_proj(1e6))
    message = refused(action, source, tmp_path / "b.tol", f"layer {LAYER}", "token ")
    assert "f16" in message or "65504" in message
    build(source, tmp_path / "f32.tol", dtype="f32", progress=SilentProgress())
    build(source, tmp_path / "bf16.tol", dtype="bf16", progress=SilentProgress())
    verify(tmp_path / "f32.tol")
    verify(tmp_path / "bf16.tol")


@pytest.mark.parametrize("action", [build_f16, compress_nf4, compress_rank, compress_rank_alone])
def test_an_overflow_within_the_ffn(tmp_path: Path, action: Callable[[Path, Path], object]) -> None:
    """Finite weights whose product is infinite: found in the rows, named by layer and token."""

    def explode(state: dict[str, Tensor]) -> None:
        state[PREFIX + "memory_mlp.up_proj.weight"].mul_(1e30)
        state[PREFIX + "memory_mlp.down_proj.weight"].mul_(1e30)

    source = changed(tmp_path / "ckpt", explode)
    refused(action, source, tmp_path / "b.tol", f"layer {LAYER}", "token 0")


def test_rows_whose_squares_overflow(tmp_path: Path) -> None:
    source = changed(tmp_path / "ckpt", scale_down_proj(1e25))
    refused(compress_rank_alone, source, tmp_path / "b.tol", f"layer {LAYER}", "too large")


def test_the_token_named_is_the_one(tmp_path: Path) -> None:
    """With counts, slots are not ids; the message must name the id."""

    def one_token(state: dict[str, Tensor]) -> None:
        # Only this token's normed embedding has its mass in column 0.
        state["model.embed_tokens.weight"][:, 0] = 0
        state["model.embed_tokens.weight"][TOKEN] = 0
        state["model.embed_tokens.weight"][TOKEN, 0] = 1
        for part in ("gate", "up"):
            state[PREFIX + f"memory_mlp.{part}_proj.weight"][:, 0] = 3e4
        state[PREFIX + "memory_mlp.down_proj.weight"].fill_(1.0)

    model = pico_model("memory", hidden_size=16, num_hidden_layers=3, memory_intermediate_size=24)
    with torch.no_grad():
        one_token(model.state_dict())
    counts = np.random.default_rng(3).integers(0, 99, 96).astype(np.uint64)
    save_checkpoint(model, tmp_path / "ckpt", pico_tokenizer_files(), counts)
    for action in (build_f16, compress_rank):
        refused(action, tmp_path / "ckpt", tmp_path / "b.tol", f"layer {LAYER}, token {TOKEN}:")


# Extreme and finite: everything must be written, read back and stay close.


def zero_row(state: dict[str, Tensor]) -> None:
    state["model.embed_tokens.weight"][TOKEN] = 0


def all_zero(state: dict[str, Tensor]) -> None:
    state[PREFIX + "memory_mlp.down_proj.weight"].zero_()


def constant_rows(state: dict[str, Tensor]) -> None:
    state["model.embed_tokens.weight"].fill_(1)


def one_column(state: dict[str, Tensor]) -> None:
    state[PREFIX + "memory_mlp.down_proj.weight"][1:] = 0


def subnormal_f16(state: dict[str, Tensor]) -> None:
    state[PREFIX + "memory_mlp.down_proj.weight"].mul_(1e-8)


def subnormal_f32(state: dict[str, Tensor]) -> None:
    state[PREFIX + "memory_mlp.down_proj.weight"].mul_(1e-40)


def near_f16_max(state: dict[str, Tensor]) -> None:
    state[PREFIX + "memory_mlp.down_proj.weight"].mul_(5e3)


EXTREMES = (
    zero_row, all_zero, constant_rows, one_column, subnormal_f16, subnormal_f32, near_f16_max
)  # fmt: skip


@pytest.mark.parametrize("extreme", EXTREMES, ids=lambda f: f.__name__)
def test_extreme_but_finite_tables(tmp_path: Path, extreme: Callable) -> None:
    source = changed(tmp_path / "ckpt", extreme)
    build(source, tmp_path / "exact.tol", dtype="f32", progress=SilentProgress())
    exact = open_bundle(tmp_path / "exact.tol").rows(np.arange(96))
    assert np.isfinite(exact).all()
    specs = {
        "f16": (CompressSpec(codec="f16"), 2.0**-10),
        "bf16": (CompressSpec(codec="bf16"), 2.0**-7),
        "int8": (CompressSpec(codec="int8"), 1 / 64),
        "int4": (CompressSpec(codec="int4"), 1 / 4),
        "nf4": (CompressSpec(codec="nf4"), 1 / 4),
        "fp4": (CompressSpec(codec="fp4"), 1 / 2),
        "svd": (CompressSpec(codec="int8", rank="100%"), 1 / 16),
        "bands": (CompressSpec(bits_per_value=28.0), 1 / 8),
    }
    for dtype in ("f16", "bf16"):
        build(source, tmp_path / f"build-{dtype}.tol", dtype=dtype, progress=SilentProgress())
    for name, (spec, tolerance) in specs.items():
        compress(source, tmp_path / f"{name}.tol", spec, progress=SilentProgress())
        verify(tmp_path / f"{name}.tol")
        rows = open_bundle(tmp_path / f"{name}.tol").rows(np.arange(96))
        # Feedback repays a layer's loss in later ones, so sums over layers are compared.
        lost = np.linalg.norm((rows - exact).sum(axis=1), axis=-1)
        size = np.linalg.norm(exact, axis=-1).max(axis=-1)
        if name == "bands":
            size = size.max()  # scales are shared by rows, so a row of zeros has an error too
        assert (lost <= tolerance * size + 1e-6).all(), (name, float((lost / (size + 1e-6)).max()))


@pytest.mark.parametrize("rank", ["17", "101%", "0", "0%", "-1", "nan", "1e3"])
def test_a_rank_that_cannot_be_had(tmp_path: Path, rank: str) -> None:
    source = nano_checkpoint(tmp_path / "ckpt")
    with pytest.raises(UsageError, match=r"^--rank"):
        compress(source, tmp_path / "b.tol", CompressSpec(rank=rank), progress=SilentProgress())
    assert not (tmp_path / "b.tol").exists()


# Bundles that hold what no writer of ours writes, every digest fitting.


def bundle_of(tmp_path: Path, **options: str) -> Path:
    source = nano_checkpoint(tmp_path / "ckpt", counts=False)
    path = tmp_path / "source.tol"
    if options:
        compress(source, path, CompressSpec(**options), progress=SilentProgress())
    else:
        build(source, path, progress=SilentProgress())
    return path


@pytest.mark.parametrize("number", BAD.values(), ids=BAD.keys())
def test_a_bundle_row_that_is_not_finite(tmp_path: Path, number: float) -> None:
    path = bundle_of(tmp_path)
    plane = open_bundle(path).manifest.tiers[0].planes[LAYER]

    def poison(record: bytearray) -> None:
        record[plane.offset + 6 : plane.offset + 8] = np.float16(number).tobytes()

    edit_record(path, TOKEN, poison)
    refresh(path)
    for action in (compress_nf4, compress_rank, compress_rank_alone):
        refused(action, path, tmp_path / "b.tol", f"layer {LAYER}", f"token {TOKEN}")
    with pytest.raises(NonFiniteError, match=f"layer {LAYER}.*token {TOKEN}"):
        drop_layers(path, tmp_path / "b.tol", DropSpec((0,)), progress=SilentProgress())
    with pytest.raises(InputError, match=f"layer {LAYER}"):
        verify(path)


@pytest.mark.parametrize("number", BAD.values(), ids=BAD.keys())
def test_a_bundle_basis_that_is_not_finite(tmp_path: Path, number: float) -> None:
    path = bundle_of(tmp_path, rank="50%", codec="int8")
    bases = path / "tables" / "bases.safetensors"
    file = TensorFile(bases)
    arrays = {name: file.array(name).copy() for name in file.names}
    arrays[f"layer.{LAYER}.basis"][2, 5] = number
    bases.write_bytes(
        tensor_bytes({k: ("F16", list(v.shape), v.tobytes()) for k, v in arrays.items()})
    )
    refresh(path)
    refused(compress_nf4, path, tmp_path / "b.tol", f"layer {LAYER}", "token")
    with pytest.raises(InputError, match=f"layer {LAYER}: basis: holds NaN or infinity"):
        verify(path)


@pytest.mark.parametrize("number", BAD.values(), ids=BAD.keys())
def test_a_backbone_that_is_not_finite(tmp_path: Path, number: float) -> None:
    path = bundle_of(tmp_path)
    backbone = path / "backbone.safetensors"
    file = TensorFile(backbone)
    tensors = {
        name: (info.dtype, list(info.shape), bytearray(file.array(name).tobytes()))
        for name, info in file.infos.items()
    }
    tensors["model.norm.weight"][2][8:12] = np.float32(number).tobytes()
    backbone.write_bytes(tensor_bytes({k: (d, s, bytes(b)) for k, (d, s, b) in tensors.items()}))
    refresh(path)
    with pytest.raises(NonFiniteError, match=r"'model\.norm\.weight'.*entry 2"):
        load_runnable(path)


def test_a_refused_run_leaves_the_source_as_it_was(tmp_path: Path) -> None:
    source = broken_checkpoint(tmp_path / "ckpt", *PLACES["up"][:2], NAN)
    before = tree_bytes(source)
    with pytest.raises(TolError):
        build_f16(source, tmp_path / "b.tol")
    assert tree_bytes(source) == before
