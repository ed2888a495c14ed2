"""`encoding.errors` of tol.json: what may stand there, and what a reader refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _nano import reseal, write_nano

from tolkit_formats import open_bundle, verify
from tolkit_formats.errors import BundleError
from tolkit_formats.layer_errors import ErrorSums, LayerErrors, rounded, stood_for
from tolkit_formats.manifest import LayerStatus

WHOLE = {
    "layer": 0,
    "relative": 0.5,
    "relative_step": 0,
    "running_sum": 0,
    "running_sum_step": 0,
}


def with_errors(path: Path, errors: Any) -> Path:
    write_nano(path)
    reseal(path, lambda manifest: manifest["encoding"].update(errors=errors))
    return path


def test_all_of_it_and_parts_of_it_are_read(tmp_path: Path) -> None:
    only_sum = {"layer": 2, "running_sum": 1e-3, "running_sum_step": 0}
    path = with_errors(tmp_path / "a.tol", [WHOLE, only_sum])
    verify(path)
    assert open_bundle(path).manifest.encoding.errors == (
        LayerErrors(0, 0.5, 0, 0, 0),
        LayerErrors(2, None, None, 1e-3, 0),
    )


def test_it_may_be_absent(tmp_path: Path) -> None:
    write_nano(tmp_path / "a.tol")
    manifest = open_bundle(tmp_path / "a.tol").manifest
    assert manifest.encoding.errors == () and "errors" not in manifest.to_json()["encoding"]


def changed(**fields: Any) -> list[dict[str, Any]]:
    return [{**WHOLE, **fields}]


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ({}, "errors must be a list"),
        ([], "errors is empty"),
        ([{"layer": 0}], "says nothing new of layer 0"),
        ([WHOLE, WHOLE], "errors\\[1\\]: layer is 0, expected 1 to"),
        ([{**WHOLE, "layer": 1}, WHOLE], "layer is 0, expected 2 to"),
        (changed(layer=99), "layer is 99"),
        (changed(layer=-1), "layer is -1"),
        (changed(relative=-0.5), "relative is -0.5, expected 0 or more"),
        (changed(running_sum=None), "running_sum must be a number, got null"),
        (changed(relative=True), "relative must be a number, got a boolean"),
        (changed(relative_step=1), "relative_step is 1, expected 0 to 0"),
        (changed(relative_step=0.0), "relative_step must be an integer"),
        ([{"layer": 0, "relative": 0.5}], "relative_step is missing"),
        ([{"layer": 0, "relative_step": 0, **WHOLE, "x": 1}], "unknown field 'x'"),
        ([{"layer": 0, "running_sum": 0, "running_sum_step": 0, "relative_step": 0}], "unknown"),
    ],
    ids=str,
)
def test_refused(tmp_path: Path, errors: Any, words: str) -> None:
    path = with_errors(tmp_path / "a.tol", errors)
    with pytest.raises(BundleError, match=words):
        open_bundle(path)


def test_the_last_layer_twice(tmp_path: Path) -> None:
    write_nano(tmp_path / "a.tol")
    last = open_bundle(tmp_path / "a.tol").num_layers - 1
    errors = [{**WHOLE, "layer": last}] * 2
    reseal(tmp_path / "a.tol", lambda manifest: manifest["encoding"].update(errors=errors))
    with pytest.raises(BundleError, match=f"says nothing new of layer {last}"):
        open_bundle(tmp_path / "a.tol")


def test_a_newer_minor_version_may_say_more(tmp_path: Path) -> None:
    path = with_errors(tmp_path / "a.tol", changed(worst=1.0))

    def newer(manifest: dict[str, Any]) -> None:
        manifest["version"] = "1.999"

    reseal(path, newer)
    assert open_bundle(path).manifest.encoding.errors[0].relative == 0.5


def test_what_a_plane_stands_for() -> None:
    kept, dropped = LayerStatus("kept"), LayerStatus("dropped")
    layers = (LayerStatus("folded", 1), kept, dropped, LayerStatus("folded", 1), kept)
    stands: Callable[[int], tuple[int, ...]] = lambda layer: stood_for(layers, layer)  # noqa: E731
    assert [stands(i) for i in range(5)] == [(), (0, 1, 3), (2,), (), (4,)]


def test_figures_of_sums() -> None:
    sums = ErrorSums(4, 1, 16, 1)
    assert (sums.relative, sums.running_sum) == (0.5, 0.25)
    sums.add(ErrorSums(0, 3, 0, 15))
    assert (sums.relative, sums.running_sum) == (1, 1)
    assert (ErrorSums().relative, ErrorSums(0, 1).relative) == (None, None)
    assert ErrorSums(float("inf"), 1).relative is None
    assert ErrorSums(1, float("nan")).relative is None
    assert (rounded(0.123456789), rounded(0.0), rounded(None)) == (0.123457, 0.0, None)
