"""Metrics on disk: one `layer.N.metric` F32 [D, D] a layer in a safetensors file.

Its metadata says what they were measured on and holds the digests of the model they are for.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tolkit.calibrate.measure import Measured
from tolkit.errors import DataError, MismatchError, NonFiniteError, UnsupportedVersionError
from tolkit.sources import TableSource
from tolkit_formats import files
from tolkit_formats.errors import BundleError
from tolkit_formats.manifest import Sources
from tolkit_formats.tensorfile import TensorFile, TensorStream

__all__ = ["FORMAT", "VERSION", "Calibration", "load_metric", "save_metric"]

FORMAT = "tolkit-calibration"
VERSION = "1"
_BINDING = ("embedding", "config", "tokenizer")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HINT = "write one with: tol calibrate MODEL --data TEXT -o FILE"


class Calibration:
    """A file of metrics that fits a model; `load_metric` opens it.

    Attributes:
        digest: SHA-256 of the file's bytes, lower-case hex.
        tokens: positions it was measured on.
        num_layers: L, layers 0 .. L - 1 each have a metric.
        hidden_size: D.
    """

    def __init__(self, file: TensorFile, num_layers: int, hidden_size: int, tokens: int) -> None:
        self._file = file
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.tokens = tokens
        self.digest = file.block_sha256().hex()

    def metric_DD(self, layer: int) -> Tensor:
        """G of one layer: symmetric float32 [D, D], nats per squared unit of the stream.

        Read when asked for; a tensor of its own. All zero where the model's answer does not
        depend on what follows the layer.
        """
        shape = (self.hidden_size, self.hidden_size)
        array = self._file.expect(_name(layer), "F32", shape)
        return torch.from_numpy(np.array(array, np.float32))


def save_metric(path: Path, measured: Measured) -> None:
    """Write the metrics of all layers, all or nothing; one float32 [D, D] is made at a time.

    Raises:
        NonFiniteError: a metric beyond float32.      ResourceError: disk full.
    """
    directory = [
        (_name(layer), "F32", tuple(gram_DD.shape)) for layer, gram_DD in enumerate(measured.grams)
    ]
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "tokens": str(measured.tokens),
        "window": str(measured.window),
        "seed": str(measured.seed),
        "dtype": measured.dtype,
        "text": measured.text_digest,
        **_binding(measured.sources),
    }
    with (
        files.replacing(Path(path)) as temporary,
        TensorStream(temporary, directory, metadata) as stream,
    ):
        for layer in range(len(directory)):
            metric_DD = measured.metric_DD(layer).float()
            if not bool(torch.isfinite(metric_DD).all()):
                raise NonFiniteError(f"layer {layer}: its metric is beyond float32")
            stream.write(np.ascontiguousarray(metric_DD.numpy()).reshape(-1).view(np.uint8))


def load_metric(path: str | Path, source: TableSource) -> Calibration:
    """Metrics that fit `source`, every value looked at once.

    Raises:
        InputError: no such file, or one that is damaged, of another kind or version, lacks a
            layer, has another shape, or holds a metric that is NaN, infinite, not symmetric or
            has a negative diagonal.
        MismatchError: measured with another model.
    """
    path = Path(path)
    try:
        file = TensorFile(path)
        tokens = _require_kind(file)
        _require_model(file, source)
        _require_layers(file, source.num_layers)
        calibration = Calibration(file, source.num_layers, source.hidden_size, tokens)
        for layer in range(source.num_layers):
            _require_metric(calibration.metric_DD(layer), f"{path}: tensor {_name(layer)!r}")
    except UnsupportedVersionError:
        raise
    except BundleError as error:
        raise DataError(error.message, hint=error.hint or _HINT) from error
    return calibration


def _name(layer: int) -> str:
    return f"layer.{layer}.metric"


def _binding(sources: Sources) -> dict[str, str]:
    """The digests that bind metrics to a model; no tokenizer, no entry."""
    digests = {name: getattr(sources, name) for name in _BINDING}
    return {name: digest for name, digest in digests.items() if digest is not None}


def _require_kind(file: TensorFile) -> int:
    """The number of tokens of a file that says it is a calibration of this version."""
    found = file.metadata.get("format")
    if found != FORMAT:
        raise BundleError(f"{file.path}: format is {found!r:.40}, expected {FORMAT!r}")
    version = file.metadata.get("version")
    if version != VERSION:
        raise UnsupportedVersionError(
            f"{file.path}: version is {version!r:.40}, this tolkit reads {VERSION!r}", hint=_HINT
        )
    tokens = file.metadata.get("tokens", "")
    if not (tokens.isascii() and tokens.isdigit() and len(tokens) < 19 and int(tokens)):
        raise BundleError(f"{file.path}: tokens is {tokens!r:.40}, expected a positive number")
    return int(tokens)


def _require_model(file: TensorFile, source: TableSource) -> None:
    """MismatchError unless all digests both sides know are equal."""
    expected = _binding(source.sources())
    for name in _BINDING:
        found = file.metadata.get(name)
        if found is None and name == "tokenizer":
            continue
        if found is None or not _DIGEST.fullmatch(found):
            raise BundleError(f"{file.path}: metadata lacks the SHA-256 digest {name!r}")
        if found != expected.get(name, found):
            raise MismatchError(
                f"{file.path}: measured with another {name} than {source.path}'s, expected digest "
                f"{expected[name][:12]}, got {found[:12]}",
                hint=f"run: tol calibrate {source.path} --data TEXT -o {file.path} --force",
            )


def _require_layers(file: TensorFile, num_layers: int) -> None:
    expected = {_name(layer) for layer in range(num_layers)}
    for name in sorted(expected ^ set(file.names)):
        what = "is missing" if name in expected else f"is none of the {num_layers} layers' metrics"
        raise BundleError(f"{file.path}: tensor {name[:40]!r} {what}")


def _require_metric(metric_DD: Tensor, where: str) -> None:
    if not bool(torch.isfinite(metric_DD).all()):
        raise NonFiniteError(f"{where}: holds NaN or infinity, expected finite numbers", hint=_HINT)
    if not torch.equal(metric_DD, metric_DD.T):
        raise BundleError(f"{where}: is not symmetric, expected G = G^T bit for bit")
    if bool((metric_DD.diagonal() < 0).any()):
        raise BundleError(f"{where}: has a negative diagonal, expected a mean of squares")
