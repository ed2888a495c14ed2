"""Partial tables on disk: what the manifest says, what a reader without FFNs does, what is refused.

Without torch; how cold rows are computed is tested in tests/core/test_cold_rows.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from _hostile import Case, params, run_case
from _nano import refresh, reseal, tensor_bytes, write_nano
from _partial import KEPT, PREFIX, D, K, L, TinyPartial, V, cold_row, write_partial

from tolkit_formats import manifest as manifests
from tolkit_formats import open_bundle, verify
from tolkit_formats.diff import diff
from tolkit_formats.errors import BundleError, UnsupportedVersionError, UsageError
from tolkit_formats.partial import Partial, ffn_layers
from tolkit_formats.tensorfile import TensorFile

NORM = PREFIX.format(0) + "layernorm.weight"
GATE = PREFIX.format(0) + "mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPartial:
    return write_partial(tmp_path_factory.mktemp("partial") / "b.tol")


def test_the_manifest_says_what_is_covered(tiny: TinyPartial) -> None:
    bundle = open_bundle(tiny.path)
    assert bundle.manifest.partial == Partial(15, 0.75)
    assert (bundle.manifest.version, bundle.manifest.required_features) == (
        (1, 2),
        ("partial_rows",),
    )
    assert json.loads((tiny.path / "tol.json").read_bytes())["partial"] == {
        "rows": 15,
        "covered": 0.75,
        "cold": "ffn",
    }
    assert ffn_layers(bundle.manifest.layers) == (0, 1, 2)


def test_sizes_count_the_weights_beside_the_backbone(tiny: TinyPartial) -> None:
    bundle = open_bundle(tiny.path)
    tables = sum(file.stat().st_size for file in (tiny.path / "tables").iterdir())
    root = sum(f.stat().st_size for f in tiny.path.iterdir() if f.suffix == ".safetensors")
    config = (tiny.path / "config.json").stat().st_size
    assert bundle.table_bytes == tables
    assert bundle.bits_per_value == 8 * tables / (V * L * D)
    assert bundle.manifest.bundle_bytes == tables + root + config


def test_rows_of_hot_tokens_are_the_records(tiny: TinyPartial) -> None:
    bundle = open_bundle(tiny.path)
    assert np.array_equal(bundle.rows(tiny.hot), tiny.rows_hKD)
    has = bundle.has_record(np.arange(V))
    assert np.array_equal(np.flatnonzero(has), np.sort(tiny.hot))


def test_a_cold_token_is_named(tiny: TinyPartial) -> None:
    bundle = open_bundle(tiny.path)
    cold = np.setdiff1d(np.arange(V), tiny.hot)
    with pytest.raises(BundleError, match=f"token id {cold[0]} has no record") as caught:
        bundle.rows([tiny.hot[0], cold[0]])
    assert "has_record" in caught.value.hint
    with pytest.raises(UsageError, match="out of range"):
        bundle.has_record([V])


def test_whole_bundles_have_a_record_for_everything(tmp_path: Path) -> None:
    bundle = open_bundle(write_nano(tmp_path / "b.tol", counts=False).path)
    assert bundle.has_record([0, 39]).all() and bundle.manifest.partial is None
    with pytest.raises(UsageError, match="keeps no FFN weights of layer 0"):
        bundle.ffn_file(0)


def test_weights_come_only_of_layers_that_rows_need(tiny: TinyPartial) -> None:
    bundle = open_bundle(tiny.path)
    assert np.array_equal(bundle.ffn_file(1).array(GATE), tiny.weights[GATE])
    with pytest.raises(UsageError, match="keeps no FFN weights of layer 3"):
        bundle.ffn_file(3)


def test_a_stranger_computes_a_cold_row(tiny: TinyPartial) -> None:
    """From the page and the two files alone, in numpy."""
    cold = int(np.setdiff1d(np.arange(V), tiny.hot)[0])
    ffn = TensorFile(tiny.path / "ffn.safetensors")
    embedding = TensorFile(tiny.path / "backbone.safetensors").array("model.embed_tokens.weight")
    eps = json.loads((tiny.path / "config.json").read_bytes())["rms_norm_eps"]
    e = np.asarray(embedding[cold], float)
    rows = []
    for layer in (0, 1, 2):
        norm, gate, up, down = (
            np.asarray(ffn.array(PREFIX.format(layer) + name), float)
            for name in (
                "layernorm.weight",
                "mlp.gate_proj.weight",
                "mlp.up_proj.weight",
                "mlp.down_proj.weight",
            )
        )
        n = e / np.sqrt((e**2).mean() + eps) * norm
        rows.append(down @ ((up @ n) * (gate @ n) / (1 + np.exp(-gate @ n))))
    want = cold_row(tiny, cold)
    assert len(KEPT) == len(want)
    assert np.allclose([rows[0], rows[1] + rows[2]], want, rtol=1e-12)


def test_verify_names_what_it_checked(tiny: TinyPartial) -> None:
    report = verify(tiny.path)
    assert report.num_records == 15
    assert any("FFN weights of 25 cold tokens" in check for check in report.checks)


def test_an_old_reader_refuses_it(tiny: TinyPartial) -> None:
    rules = "tolkit_formats.manifest_rules"
    with (
        mock.patch(f"{rules}.KNOWN_FEATURES", frozenset({"entropy_rows"})),
        mock.patch(f"{rules}.FORMAT_VERSION", (1, 1)),
    ):
        with pytest.raises(UnsupportedVersionError, match="needs feature 'partial_rows'"):
            open_bundle(tiny.path)


def test_nothing_counted_is_null(tmp_path: Path) -> None:
    bundle = open_bundle(write_partial(tmp_path / "b.tol", rows=1, covered=None).path)
    assert bundle.manifest.partial == Partial(1, None)
    assert bundle.manifest.to_json()["partial"]["covered"] is None


def test_whole_manifests_need_no_more_than_before(tmp_path: Path) -> None:
    manifest = open_bundle(write_nano(tmp_path / "b.tol").path).manifest
    assert manifests.needs_of(manifest) == ((1, 0), ())


def test_diff_compares_what_both_have(tmp_path: Path, tiny: TinyPartial) -> None:
    other = write_partial(tmp_path / "fewer.tol", rows=9)
    ticks: list[int] = []
    found = diff(open_bundle(tiny.path), open_bundle(other.path), on_rows=ticks.append)
    assert (found.num_rows, found.equal, found.same_sources) == (9, False, True)
    assert sum(ticks) == V
    itself = diff(open_bundle(tiny.path), open_bundle(tiny.path))
    assert (itself.num_rows, itself.equal) == (15, True)
    assert itself.layers[0].relative_error == 0
    stranger = write_partial(tmp_path / "stranger.tol", seed=5)
    found = diff(open_bundle(tiny.path), open_bundle(stranger.path))
    assert found.layers[0].relative_error == 0  # but the rows of cold tokens are others
    assert (found.num_rows, found.equal, found.same_sources) == (15, False, False)


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda path: reseal(path, change)


def _partial(**fields: object) -> Callable[[Path], object]:
    return _manifest(lambda manifest: manifest["partial"].update(fields))


def _ffn(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        file = TensorFile(path / "ffn.safetensors")
        arrays = {name: np.array(file.array(name)) for name in file.names}
        change(arrays)
        kinds = {"float32": "F32", "float16": "F16", "float64": "F64"}
        written = {
            name: (kinds[array.dtype.name], array.shape, array.tobytes())
            for name, array in sorted(arrays.items())
        }
        (path / "ffn.safetensors").write_bytes(tensor_bytes(written))
        refresh(path)

    return damage


def _without_ffn(path: Path) -> None:
    (path / "ffn.safetensors").unlink()
    refresh(path)


def _nan_with_its_digests(path: Path) -> None:
    from tolkit_formats.digests import array_digest

    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays[NORM][3] = np.nan

    _ffn(spoil)(path)
    norm = TensorFile(path / "ffn.safetensors").array(NORM)
    digest = array_digest("F32", (D,), [norm])
    reseal(path, lambda manifest: manifest["sources"]["layers"][0].update(norm=digest))


CASES = [
    Case("rows disagree with tiers", _partial(rows=14), ("partial: rows is 14", "15")),
    Case("as many rows as tokens", _partial(rows=V), ("rows is 40", "1 to 39")),
    Case("covers more than all", _partial(covered=1.5), ("covered is 1.5", "0 to 1")),
    Case("another way to find cold rows", _partial(cold="zero"), ("cold is 'zero'",)),
    Case("a field nobody knows", _partial(more=1), ("unknown field 'more'",)),
    Case("feature without object", _manifest(lambda m: m.pop("partial")), ("partial is missing",)),
    Case(
        "object without feature",
        _manifest(lambda m: m.update(required_features=[])),
        ("partial needs required feature 'partial_rows'",),
    ),
    Case(
        "older version",
        _manifest(lambda m: m.update(version="1.1")),
        ("'partial_rows' is not one of version 1.1",),
    ),
    Case("no weights", _without_ffn, ("ffn.safetensors is missing",)),
    Case("a tensor too few", _ffn(lambda a: a.pop(GATE)), ("ffn.safetensors", "is missing", GATE)),
    Case(
        "a dropped layer's weights",
        _ffn(lambda a: a.update({PREFIX.format(3) + "layernorm.weight": np.ones(D, np.float32)})),
        ("layers.3", "belongs to nothing"),
    ),
    Case(
        "another shape",
        _ffn(lambda a: a.update({GATE: np.ones((K, D + 1), np.float32)})),
        (GATE, f"[{K}, {D + 1}]"),
    ),
    Case(
        "another number format",
        _ffn(lambda a: a.update({GATE: np.ones((K, D))})),
        (GATE, "F64", "expected F32, F16 or BF16"),
    ),
    Case(
        "another model's weights",
        _ffn(lambda a: a[GATE].__iadd__(1)),
        ("layer 0", "not the one the tables are for"),
        at_open=False,
    ),
    Case(
        "another model's norm",
        _ffn(lambda a: a[NORM].__iadd__(1)),
        ("layer 0", "not the one the tables are for"),
        at_open=False,
    ),
    Case(
        "NaN that the digests know",
        _nan_with_its_digests,
        (NORM, "NaN or infinity"),
        at_open=False,
    ),
]


@params(CASES)
def test_what_breaks_a_rule_is_refused(case: Case, tiny: TinyPartial, tmp_path: Path) -> None:
    if not case.at_open:
        import shutil

        shutil.copytree(tiny.path, tmp_path / "b.tol")
        case.damage(tmp_path / "b.tol")
        with pytest.raises(BundleError) as caught:
            verify(tmp_path / "b.tol")
        assert all(word in caught.value.message for word in case.words), caught.value.message
        return
    run_case(case, tiny.path, tmp_path)


def test_weights_of_a_whole_bundle_belong_to_nothing(tmp_path: Path) -> None:
    path = write_nano(tmp_path / "b.tol").path
    (path / "ffn.safetensors").write_bytes(tensor_bytes({"w": ("F32", (1,), b"\0" * 4)}))
    refresh(path)
    with pytest.raises(BundleError, match=r"ffn\.safetensors belongs to nothing"):
        open_bundle(path)


def test_a_flipped_bit_in_the_weights_is_noticed(tiny: TinyPartial, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny.path, tmp_path / "b.tol")
    file = tmp_path / "b.tol" / "ffn.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"ffn\.safetensors: does not match its digest"):
        open_bundle(tmp_path / "b.tol").ffn_file(0)
