"""Files of metrics: what is written, what is read back, what is refused. D hidden."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pico import pico_checkpoint

from tolkit.calibrate import (
    CalibrationSpec,
    Measured,
    calibrate,
    load_metric,
    save_metric,
)
from tolkit.data import Document
from tolkit.errors import InputError, MismatchError, NonFiniteError, TolError
from tolkit.progress import SilentProgress
from tolkit.sources import TableSource, open_source
from tolkit.tables import load_runnable
from tolkit_formats import digests
from tolkit_formats.errors import UnsupportedVersionError
from tolkit_formats.tensorfile import TensorFile, write_tensors

TEXT = [Document("a", "the quick brown fox")]
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Work:
    checkpoint: Path
    source: TableSource
    measured: Measured
    file: Path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    checkpoint = pico_checkpoint(folder / "ckpt")
    spec = CalibrationSpec(seed=7, window=8, device="cpu")
    measured = calibrate(load_runnable(checkpoint), TEXT, spec, SilentProgress())
    save_metric(folder / "m.safetensors", measured)
    return Work(checkpoint, open_source(checkpoint), measured, folder / "m.safetensors")


def changed(
    work: Work,
    path: Path,
    change: Callable[[Tensors], Any] = lambda tensors: None,
    metadata: Mapping[str, str | None] | None = None,
) -> Path:
    """The good file with some arrays or metadata changed (None: left out)."""
    file = TensorFile(work.file)
    tensors: Tensors = {name: np.array(file.array(name)) for name in file.names}
    change(tensors)
    kinds = {np.dtype("f4"): "F32", np.dtype("f8"): "F64"}
    told = {**file.metadata, **(metadata or {})}
    write_tensors(
        path,
        {name: (kinds[array.dtype], array) for name, array in tensors.items()},
        {key: value for key, value in told.items() if value is not None},
    )
    return path


def test_what_was_measured_is_read_back(work: Work) -> None:
    calibration = load_metric(work.file, work.source)
    for layer in range(2):
        expected_DD = work.measured.metric_DD(layer).float()
        assert torch.equal(calibration.metric_DD(layer), expected_DD)
    assert calibration.tokens == len(TEXT[0].text)
    assert calibration.digest == digests.file_digest(work.file)
    assert (calibration.num_layers, calibration.hidden_size) == (2, 32)


def test_a_metric_read_twice_is_not_shared(work: Work) -> None:
    calibration = load_metric(work.file, work.source)
    before_DD = calibration.metric_DD(0).clone()
    calibration.metric_DD(0).zero_()
    assert torch.equal(calibration.metric_DD(0), before_DD)


def test_the_file_says_what_it_is_and_for_which_model(work: Work) -> None:
    file = TensorFile(work.file)
    sources = work.source.sources()
    assert file.metadata == {
        "format": "tolkit-calibration",
        "version": "1",
        "tokens": "19",
        "window": "8",
        "seed": "7",
        "dtype": "float32",
        "text": work.measured.text_digest,
        "embedding": sources.embedding,
        "config": sources.config,
        "tokenizer": sources.tokenizer,
    }
    assert {name: (info.dtype, info.shape) for name, info in file.infos.items()} == {
        "layer.0.metric": ("F32", (32, 32)),
        "layer.1.metric": ("F32", (32, 32)),
    }


def test_the_same_measurement_gives_the_same_bytes(work: Work, tmp_path: Path) -> None:
    spec = CalibrationSpec(seed=7, window=8, device="cpu")
    again = calibrate(load_runnable(work.checkpoint), TEXT, spec, SilentProgress())
    save_metric(tmp_path / "m", again)
    assert (tmp_path / "m").read_bytes() == work.file.read_bytes()


def test_a_file_of_another_model_is_refused(work: Work, tmp_path: Path) -> None:
    other = open_source(pico_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(MismatchError, match="measured with another embedding") as caught:
        load_metric(work.file, other)
    assert "tol calibrate" in caught.value.hint
    wider = open_source(pico_checkpoint(tmp_path / "wider", hidden_size=64))
    with pytest.raises(MismatchError):
        load_metric(work.file, wider)


@pytest.mark.parametrize("name", ["config", "tokenizer"])
def test_another_config_or_tokenizer_is_refused(work: Work, tmp_path: Path, name: str) -> None:
    path = changed(work, tmp_path / "m", metadata={name: "0" * 64})
    with pytest.raises(MismatchError, match=f"another {name}"):
        load_metric(path, work.source)


def test_a_model_without_tokenizer_takes_metrics_measured_without(
    work: Work, tmp_path: Path
) -> None:
    path = changed(work, tmp_path / "m", metadata={"tokenizer": None})
    assert load_metric(path, work.source).tokens == 19


def _set(name: str, at: Any, value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[name].__setitem__(at, value)


def _replace(name: str, array: np.ndarray) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.__setitem__(name, array)


@pytest.mark.parametrize(
    ("change", "metadata", "error", "words"),
    [
        (_set("layer.1.metric", (3, 3), np.nan), {}, NonFiniteError, "'layer.1.metric': holds NaN"),
        (_set("layer.0.metric", ..., np.inf), {}, NonFiniteError, "'layer.0.metric': holds NaN"),
        (_set("layer.1.metric", (3, 4), 9.0), {}, InputError, "'layer.1.metric': is not symmetric"),
        (_set("layer.0.metric", (2, 2), -1.0), {}, InputError, "negative diagonal"),
        (lambda t: t.pop("layer.1.metric"), {}, InputError, "'layer.1.metric' is missing"),
        (_replace("layer.2.metric", np.eye(32, dtype="f4")), {}, InputError, "none of the 2"),
        (_replace("layer.0.metric", np.eye(32)), {}, InputError, r"F64 \[32, 32\], expected F32"),
        (_replace("layer.0.metric", np.eye(31, dtype="f4")), {}, InputError, r"F32 \[31, 31\]"),
        (lambda t: None, {"format": "pt"}, InputError, "format is 'pt'"),
        (lambda t: None, {"format": None}, InputError, "format is None"),
        (lambda t: None, {"version": "2"}, UnsupportedVersionError, "version is '2'"),
        (lambda t: None, {"version": None}, UnsupportedVersionError, "version is None"),
        (lambda t: None, {"embedding": None}, InputError, "digest 'embedding'"),
        (lambda t: None, {"config": "\x1b[2J"}, InputError, "digest 'config'"),
        (lambda t: None, {"tokens": "-3"}, InputError, "tokens is '-3'"),
        (lambda t: None, {"tokens": "0"}, InputError, "tokens is '0'"),
        (lambda t: None, {"tokens": None}, InputError, "tokens is ''"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    work: Work,
    tmp_path: Path,
    change: Callable[[Tensors], Any],
    metadata: dict[str, str | None],
    error: type[TolError],
    words: str,
) -> None:
    path = changed(work, tmp_path / "m.safetensors", change, metadata)
    with pytest.raises(error, match=words) as caught:
        load_metric(path, work.source)
    assert isinstance(caught.value, InputError)
    assert caught.value.message.startswith(f"{path}: ")
    assert "tol calibrate" in caught.value.hint


def test_every_truncation_is_refused(work: Work, tmp_path: Path) -> None:
    data = work.file.read_bytes()
    path = tmp_path / "m.safetensors"
    for size in (0, 5, 8, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"m\.safetensors"):
            load_metric(path, work.source)


def test_a_missing_file_is_refused(work: Work, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        load_metric(tmp_path / "nowhere", work.source)


def test_a_metric_beyond_float32_is_not_written(work: Work, tmp_path: Path) -> None:
    huge = [gram_DD * 1e300 for gram_DD in work.measured.grams]
    broken = Measured(**{**vars(work.measured), "grams": huge})
    with pytest.raises(NonFiniteError, match="layer 0"):
        save_metric(tmp_path / "m", broken)
    assert list(tmp_path.iterdir()) == []
