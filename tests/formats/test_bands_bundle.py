"""Codec bands, predictors and several tiers: the reader against slow rows, and damage."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _bands import (
    EMBEDDING,
    LAYERS,
    TIER_ROWS,
    VOCAB_SIZE,
    WIDTH,
    BandsBundle,
    edit_array,
    edit_arrays,
    write_bands,
)
from _hostile import Case, params, run_case
from _nano import assert_rows, memory_folder, refresh, reseal, tensor_bytes, tree_bytes

from tolkit_formats import TolError, open_bundle, shared_arrays, verify
from tolkit_formats.errors import BundleError, UsageError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> BandsBundle:
    return write_bands(tmp_path_factory.mktemp("bands") / "g.tol")


@pytest.fixture(scope="module")
def good(bundle: BandsBundle) -> Path:
    return bundle.path


def test_rows_of_all_tiers(bundle: BandsBundle) -> None:
    verify(bundle.path)
    opened = open_bundle(bundle.path)
    assert [tier.num_rows for tier in opened.manifest.tiers] == list(TIER_ROWS)
    assert len({tier.stride for tier in opened.manifest.tiers}) > 1
    everything = list(range(VOCAB_SIZE))
    by_slot = np.argsort(bundle.slot_of_token_V)
    last_of_tiers = by_slot[np.cumsum(TIER_ROWS) - 1]
    for ids in (everything, everything[::-1], [5, 5, 5], by_slot[19:22], last_of_tiers, [9], []):
        ids = np.array(ids, np.int64)
        assert_rows(opened.rows(ids), bundle.rows_VKD[ids])
    assert opened.rows([]).shape == (0, 3, WIDTH)


def test_rows_do_not_depend_on_what_fits_the_cache(
    bundle: BandsBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = open_bundle(bundle.path).rows(np.arange(VOCAB_SIZE))
    monkeypatch.setattr(shared_arrays, "_EXPANDED_BYTES", 600)
    opened = open_bundle(bundle.path)
    for _ in range(2):
        assert np.array_equal(opened.rows(np.arange(VOCAB_SIZE)), want)
    assert 0 < opened._shared._expanded_bytes <= 600


@pytest.mark.parametrize("layer", range(3))
def test_planes_in_pieces(bundle: BandsBundle, layer: int) -> None:
    opened = open_bundle(bundle.path)
    slots = np.array([60, 19, 20, 63, 0, 21, 52, 53])
    seen = np.zeros(len(slots), int)
    for tier, where, plane_NB in opened.plane_pieces(layer, slots):
        seen[where] += 1
        inside = (slots[where] >= tier.first_slot) & (
            slots[where] < tier.first_slot + tier.num_rows
        )
        assert inside.all() and plane_NB.shape == (len(where), tier.planes[layer].length)
        whole = [piece for _, piece in opened.plane_bytes(layer, 0, VOCAB_SIZE)][tier.index]
        assert np.array_equal(plane_NB, whole[slots[where] - tier.first_slot])
    assert (seen == 1).all()
    assert opened.plane_pieces(layer, slots[:0]) == []


def test_records_need_one_tier(bundle: BandsBundle) -> None:
    with pytest.raises(UsageError, match="3 tiers"):
        open_bundle(bundle.path).records([0])


def test_unit_embeddings_are_the_backbones(bundle: BandsBundle) -> None:
    opened = open_bundle(bundle.path)
    got = opened.embedded([3, 0])
    assert got.dtype == np.float32 and got.shape == (2, WIDTH)
    weights_DD = opened.predictor_weights(0)
    assert weights_DD is not None and weights_DD.shape == (WIDTH, WIDTH)
    assert opened.predictor_weights(1) is None


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_embeddings_of_other_types(bundle: BandsBundle, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "b.tol"
    shutil.copytree(bundle.path, path)
    values_VD = open_bundle(path).embedded(np.arange(VOCAB_SIZE))
    cut_VD = (values_VD.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    words = {"F32": cut_VD, "BF16": (cut_VD.view(np.uint32) >> 16).astype(np.uint16)}[dtype]
    replace_embedding(path, dtype, words.tobytes(), source=True)
    opened = open_bundle(path)
    assert np.array_equal(opened.embedded([1, 63]), cut_VD[[1, 63]])
    verify(path)


def replace_embedding(
    path: Path, dtype: str, data: bytes, *, source: bool, name: str = EMBEDDING
) -> None:
    """Another embedding in the backbone; `source` makes the manifest call it the right one."""
    shape = [VOCAB_SIZE, WIDTH]
    (path / "backbone.safetensors").write_bytes(tensor_bytes({name: (dtype, shape, data)}))
    refresh(path)
    if source:
        head = f"{dtype}:{VOCAB_SIZE}x{WIDTH}\0".encode()
        digest = hashlib.sha256(head + data).hexdigest()
        reseal(path, lambda m: m["sources"].update(embedding=digest))


# Damage. Digests and CRCs are made to fit, so only the rule itself can notice.


def field(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda path: reseal(path, change)


def codec(tier_: int, layer: int, /, **values: object) -> Callable[[Path], object]:
    return field(lambda m: m["tiers"][tier_]["planes"][layer]["codec"].update(values))


def predictors(value: object) -> Callable[[Path], object]:
    return field(lambda m: m.update(predictors=value))


P0 = {"layer": 0, "bits": 3, "exponent": -2}
P2 = {"layer": 2, "bits": 8, "exponent": -9}


def removed(name: str) -> Callable[[Path], object]:
    return edit_arrays(lambda arrays: arrays.pop(name))


def added(name: str) -> Callable[[Path], object]:
    return edit_arrays(lambda arrays: arrays.update({name: ("U8", np.zeros(3, np.uint8))}))


def padding(tier: int, byte: int) -> Callable[[Path], object]:
    """A bit behind the codes of layer 0, in the second record of a tier."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / "tol.json").read_bytes())
        about = manifest["tiers"][tier]
        (shard,) = (path / "tables").glob(f"records-{tier}-*")
        data = bytearray(shard.read_bytes())
        start = len(data) - (about["num_rows"] - 1) * about["stride"]
        record = data[start : start + about["stride"]]
        record[byte] |= 1
        slot = struct.pack("<I", about["first_slot"] + 1)
        record[-4:] = struct.pack("<I", zlib.crc32(record[:-4], zlib.crc32(slot)))
        data[start : start + about["stride"]] = record
        shard.write_bytes(data)
        refresh(path)

    return damage


def embedding(dtype: str, data: bytes, **options: Any) -> Callable[[Path], object]:
    return lambda path: replace_embedding(path, dtype, data, **options)


SIZE = VOCAB_SIZE * WIDTH
MANIFEST = [
    Case("tier of another", codec(1, 0, tier=0), ("tiers[1]: layer 0", "tier is 0, expected 1")),
    Case("tier 255", codec(0, 1, tier=255), ("tiers[0]: layer 1", "expected 0")),
    Case("codebooks differ", codec(1, 0, codebooks=[1, 3, 4]), ("layer 0: codebooks",)),
    Case("basis widths differ", codec(2, 0, basis="2x8 4x6 3x5"), ("tiers[2]: layer 0: basis",)),
    Case("basis cut differently", codec(2, 0, basis="2x8 3x6 1x6 3x4"), ("tiers[2]", "bands")),
    Case("exponents differ", codec(2, 0, exponent=-2), ("tiers[2]: layer 0: bands",)),
    Case("codebooks of equal size", codec(1, 1, codebooks=[1, 2, 8]), ("layer 1",)),
    Case("runs longer", codec(0, 0, runs="6x5 1x0 2x3 1x1"), ("tiers[0]: planes[0]", "9 basis")),
    Case("runs change the length", codec(0, 0, runs="8x1"), ("plane of layer 0 at 0+8",)),
    Case("runs a list", codec(0, 0, runs=[[3, 5]]), ("tiers[0]: planes[0]", "expected runs")),
    Case("rank of all tiers", codec(0, 0, basis="2x8"), ("tiers[0]: planes[0]", "2 basis rows")),
    Case("predictors null", predictors(None), ("predictors", "null")),
    Case("predictors empty", predictors([]), ("predictors must name kept layers",)),
    Case("predictors an object", predictors({"0": P0}), ("predictors must be a list",)),
    Case("predictor no object", predictors([0]), ("predictors[0]",)),
    Case("predictor of no layer", predictors([{**P0, "layer": 3}]), ("must name kept layers",)),
    Case("predictors unordered", predictors([P2, P0]), ("in order",)),
    Case("predictor twice", predictors([P0, P0, P2]), ("twice",)),
    Case("predictor without bits", predictors([{"layer": 0, "exponent": 0}]), ("bits",)),
    Case("predictor of 1 bit", predictors([{**P0, "bits": 1}, P2]), ("predictors[0]", "2..8")),
    Case("predictor unknown field", predictors([{**P0, "rank": 1}, P2]), ("rank", "unknown")),
    Case("predictor exponent", predictors([{**P0, "exponent": 121}, P2]), ("exponent",)),
    Case("predictor bits true", predictors([{**P0, "bits": True}, P2]), ("bits",)),
    Case("predictor layer true", predictors([{**P0, "layer": True}, P2]), ("predictors[0]",)),
    Case("predictor of other bits", predictors([{**P0, "bits": 4}, P2]), ("layer.0.predictor",)),
    Case("predictor nobody stored", predictors([P0, {**P0, "layer": 1}, P2]), ("layer.1.predic",)),
    Case("array of nobody", added("layer.1.predictor"), ("'layer.1.predictor'", "nothing")),
    Case("scales missing", removed("layer.0.scales.1"), ("layer.0.scales.1",)),
    Case("mean missing", removed("layer.1.mean"), ("layer.1.mean",)),
    Case("weights missing", removed("layer.2.predictor"), ("layer.2.predictor",)),
]  # fmt: skip


def shared(name: str, damage: Callable[[np.ndarray], object], *words: str) -> Case:
    return Case(
        f"{name}: {words[0]}",
        edit_array(name, damage),
        ("bases.safetensors: layer " + name.split(".")[1], *words),
        at_open=False,
    )


def set_at(at: int, value: float) -> Callable[[np.ndarray], object]:
    return lambda array: array.__setitem__(at, value)


VALUES = [
    shared("layer.0.mean", set_at(2, np.nan), "mean: holds NaN"),
    shared("layer.1.mean", set_at(2, np.inf), "mean: holds NaN"),
    shared("layer.0.scales.1", set_at(5, np.nan), "scales.1: expected finite", "at 5"),
    shared("layer.0.scales.0", set_at(0, np.inf), "scales.0: expected finite"),
    shared("layer.1.scales.2", set_at(0, -1.0), "scales.2: expected finite"),
    shared("layer.0.basis_scales", set_at(8, np.nan), "basis_scales"),
    shared("layer.0.basis", set_at(0, 255), "basis: code 255"),
    shared("layer.0.basis", set_at(24, 0xFF), "basis: code 63"),
    shared("layer.0.codebooks", lambda a: a.__setitem__(slice(None), a[::-1].copy()), "codebooks"),
    shared("layer.1.codebooks", set_at(17, np.inf), "codebooks: of 8 bits"),
    shared("layer.0.predictor", set_at(0, 0xFF), "predictor: code 7"),
    shared("layer.0.predictor", set_at(4, 0x01), "row 0, predictor: padding"),
    shared("layer.2.predictor_scales", set_at(1, np.inf), "predictor_scales"),
    Case("padding bit", padding(0, 4), ("records-0-", "layer 0", "padding"), at_open=False),
    Case("padding byte", padding(1, 3), ("records-1-", "layer 0", "padding"), at_open=False),
    Case(
        "another embedding",
        embedding("F16", np.ones(SIZE, np.float16).tobytes(), source=False),
        ("backbone.safetensors", "not the one the tables are for"),
        at_open=False,
    ),
    Case(
        "embedding of NaN",
        embedding("F32", np.full(SIZE, np.nan, np.float32).tobytes(), source=True),
        ("backbone.safetensors", "NaN"),
        at_open=False,
    ),
    Case(
        "embedding of integers",
        embedding("U16", np.ones(SIZE, np.uint16).tobytes(), source=True),
        ("backbone.safetensors", EMBEDDING, "F32, F16 or BF16"),
        at_open=False,
    ),
    Case(
        "no embedding",
        embedding("F32", np.ones(SIZE, np.float32).tobytes(), source=True, name="w"),
        ("backbone.safetensors", EMBEDDING, "missing"),
        at_open=False,
    ),
]  # fmt: skip


def all_tiers_exponent(path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for tier in manifest["tiers"]:
            tier["planes"][1]["codec"]["exponent"] = 120

    reseal(path, change)
    edit_array("layer.1.mean", set_at(0, 60_000.0))(path)


VALUES.append(
    Case("too large", all_tiers_exponent, ("layer 1", "do not fit binary32"), at_open=False)
)


@params(MANIFEST)
def test_manifests(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


@params(VALUES)
def test_values(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


def test_a_wrong_embedding_is_refused_before_a_row_is_given(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.tol"
    shutil.copytree(good, path)
    replace_embedding(path, "F16", np.ones(SIZE, np.float16).tobytes(), source=False)
    with pytest.raises(BundleError, match="not the one the tables are for"):
        open_bundle(path).rows([0])


def test_bits_of_everything_flipped(good: Path, bundle: BandsBundle) -> None:
    """Bases, slots, backbone and the shards of all tiers: noticed by verify, no wrong row."""
    generator = random.Random(20240607)
    with memory_folder() as folder:
        path = folder / "b.tol"
        shutil.copytree(good, path)
        want = open_bundle(path).rows(np.arange(VOCAB_SIZE))
        names = sorted(name for name in tree_bytes(path) if name.endswith(".safetensors"))
        assert len(names) == len(LAYERS) + 5
        for number in range(400):
            file = path / names[number % len(names)]
            data = bytearray(file.read_bytes())
            bit = generator.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            whole = file.read_bytes()
            file.write_bytes(data)
            with pytest.raises(TolError):
                verify(path)
            try:
                rows = open_bundle(path).rows(np.arange(VOCAB_SIZE))
            except TolError:
                rows = want
            assert np.array_equal(rows, want), (file.name, bit)
            file.write_bytes(whole)
        verify(path)
