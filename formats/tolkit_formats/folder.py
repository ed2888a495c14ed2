"""The files of an open bundle: listed sizes checked on opening, digests before first use.

Letters: V vocabulary, D hidden.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit_formats import digests, files, strict_json
from tolkit_formats.errors import BundleError, InputError, UsageError
from tolkit_formats.limits import MAX_MANIFEST_BYTES, MAX_SMALL_FILE_BYTES, NO_SLOT
from tolkit_formats.manifest import Manifest
from tolkit_formats.manifest_rules import parse_manifest
from tolkit_formats.partial import FFN_FILE, check_ffn_header, ffn_layers, require_ffn_digests
from tolkit_formats.tensorfile import TensorFile

__all__ = ["BundleFolder"]

_EMBEDDING = "model.embed_tokens.weight"
_SIDE_FILES = (
    "tables/bases.safetensors",
    "tables/checksums.safetensors",
    "tables/slots.safetensors",
    FFN_FILE,
)


class BundleFolder:
    """A bundle's folder: its manifest, parsed, and what lies beside the record shards.

    Attributes:
        path: the folder.
        manifest: everything tol.json says.

    Raises:
        InputError: no such folder, or not a bundle.
        UnsupportedVersionError: written for a newer reader.
        BundleError: the manifest breaks a rule, or a listed file is missing or of another size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = _read_manifest(path)
        self._check_sizes()
        # Everything rows need is opened now: what is published in its place later changes nothing.
        self._side_files = {
            name: TensorFile(path / name) for name in _SIDE_FILES if name in self.manifest.files
        }
        self._known_ffns: set[int] = set()

    def token_counts(self) -> npt.NDArray[np.uint64] | None:
        """U64 [V] how often each token stood in the training text, or None."""
        if "token_counts.safetensors" not in self.manifest.files:
            return None
        file = self.tensor_file("token_counts.safetensors")
        return np.array(file.expect("token_counts", "U64", (self.manifest.vocab_size,)), np.uint64)

    def file_bytes(self, name: str) -> bytes | None:
        """A root file (config.json, tokenizer.json...), digest checked; None if absent."""
        entry = self.manifest.files.get(name)
        if entry is None:
            return None
        data = files.read_bytes(self.path / name, limit_bytes=MAX_SMALL_FILE_BYTES)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(f"{self.path}/{name}: does not match its digest in tol.json")
        return data

    def config(self) -> dict[str, Any]:
        """config.json, parsed; BundleError unless it is the source model's and of these sizes."""
        where = f"{self.path}/config.json"
        data = self.file_bytes("config.json")
        assert data is not None, "every manifest lists it"
        config = strict_json.parse(data, where)
        if not isinstance(config, dict):
            raise BundleError(f"{where}: expected a JSON object")
        if digests.json_digest(config) != self.manifest.sources.config:
            raise BundleError(f"{where}: is not the one the tables are for")
        for name, size in (
            ("vocab_size", self.manifest.vocab_size),
            ("num_hidden_layers", self.manifest.num_layers),
            ("hidden_size", self.manifest.hidden_size),
        ):
            if config.get(name, size) != size:
                raise BundleError(
                    f"{where}: {name} is {str(config[name])[:20]}, tol.json says {size}"
                )
        return config

    def tensor_file(self, name: str) -> TensorFile:
        """A safetensors file of the bundle, its digest compared before anything in it is used."""
        file = self._side_files.get(name) or TensorFile(self.path / name)
        if file.block_sha256().hex() != self.manifest.files[name].sha256:
            raise BundleError(f"{file.path}: does not match its digest in tol.json: damaged")
        return file

    @cached_property
    def slot_of_token(self) -> npt.NDArray[np.uint32] | None:
        """U32 [V] token -> slot, or None where slot = token id."""
        if not self.manifest.mapped_slots:
            return None
        name = "tables/slots.safetensors"
        slots = self.tensor_file(name).expect("slots", "U32", (self.manifest.vocab_size,))
        used = slots[slots != NO_SLOT]
        if len(used) != self.manifest.num_rows or not np.array_equal(
            np.sort(used), np.arange(self.manifest.num_rows, dtype=np.uint32)
        ):
            raise BundleError(f"{self.path}/{name}: is not a one-to-one map onto the records")
        return np.array(slots, np.uint32)

    @cached_property
    def embedding_VD(self) -> npt.NDArray[Any]:
        """The backbone's embedding, mapped; BundleError unless it is the source model's."""
        backbone = self.tensor_file("backbone.safetensors")
        info = backbone.infos.get(_EMBEDDING)
        shape = (self.manifest.vocab_size, self.manifest.hidden_size)
        if info is None or info.shape != shape or info.dtype not in ("F32", "F16", "BF16"):
            raise BundleError(
                f"{backbone.path}: {_EMBEDDING} is missing or no {list(shape)} of F32, F16 or BF16"
            )
        weight_VD = backbone.expect(_EMBEDDING, info.dtype, shape)
        if digests.array_digest(info.dtype, shape, [weight_VD]) != self.manifest.sources.embedding:
            raise BundleError(
                f"{backbone.path}: {_EMBEDDING} is not the one the tables are for "
                "(sources.embedding in tol.json)"
            )
        return weight_VD

    def ffn_file(self, layer: int) -> TensorFile:
        """The file with a layer's memory FFN; see `Bundle.ffn_file`."""
        manifest = self.manifest
        if FFN_FILE not in manifest.files or layer not in ffn_layers(manifest.layers):
            raise UsageError(f"{self.path}: keeps no FFN weights of layer {layer}")
        if layer not in self._known_ffns:
            require_ffn_digests(self._ffn, layer, manifest.sources.layers[layer])
            self._known_ffns.add(layer)
        return self._ffn

    @cached_property
    def _ffn(self) -> TensorFile:
        return self.tensor_file(FFN_FILE)

    def check_headers(self) -> None:
        """Shapes of the slot map and of FFN weights; their content is checked on first use."""
        slots = self._side_files.get("tables/slots.safetensors")
        if slots is not None:
            slots.expect("slots", "U32", (self.manifest.vocab_size,))
        ffn = self._side_files.get(FFN_FILE)
        if ffn is not None:
            check_ffn_header(ffn, ffn_layers(self.manifest.layers), self.manifest.hidden_size)

    def side_file(self, name: str) -> TensorFile | None:
        """A file of _SIDE_FILES as it was opened, no digest compared; None where absent."""
        return self._side_files.get(name)

    def _check_sizes(self) -> None:
        tables = self.path / "tables"
        if tables.is_symlink() or not tables.is_dir():
            raise BundleError(f"{tables}: is not a folder")
        for name, entry in self.manifest.files.items():
            try:
                size_bytes = files.require_regular(self.path / name)
            except InputError as error:
                raise BundleError(error.message) from error
            if size_bytes != entry.size_bytes:
                raise BundleError(
                    f"{self.path}/{name}: {size_bytes:,} bytes, expected {entry.size_bytes:,}"
                )


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "no such bundle"
        raise InputError(f"{path}: {what}", hint="give the NAME.tol folder tol build wrote")
    try:
        files.require_regular(path / "tol.json")
    except InputError as error:
        raise BundleError(
            f"{path}: holds no readable tol.json, so it is not a (finished) bundle",
            hint="give the NAME.tol folder tol build wrote",
        ) from error
    data = files.read_bytes(path / "tol.json", limit_bytes=MAX_MANIFEST_BYTES)
    return parse_manifest(data, f"{path}/tol.json")
