"""`verify`: everything a bundle promises, checked byte by byte, without torch.

Raises at the first broken rule; returns what was checked otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tolkit_formats import digests, files
from tolkit_formats.codecs import check_shared
from tolkit_formats.errors import BundleError
from tolkit_formats.limits import BLOCK_ROWS, CHECKSUM_BLOCK_BYTES
from tolkit_formats.manifest import Manifest
from tolkit_formats.partial import ffn_layers, require_ffn_finite
from tolkit_formats.reader import Bundle, open_bundle
from tolkit_formats.records import crc_of_records
from tolkit_formats.tensorfile import TensorFile

__all__ = ["VerifyReport", "verify"]

_OUTSIDE_IDENTITY = {"tol.json", "quality.jsonl"}


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` looked at. `checks` are sentences, in the order they were done."""

    path: Path
    identity: str
    size_bytes: int
    num_records: int
    checks: tuple[str, ...]


def verify(path: str | Path, *, on_bytes: Callable[[int], None] | None = None) -> VerifyReport:
    """Check a bundle completely.

    Args:
        path: the NAME.tol folder.
        on_bytes: called with the number of bytes just checked, for progress.

    Raises:
        BundleError, UnsupportedVersionError, InputError: the first rule that is broken, with
        file and byte offset or token where there is one.
    """
    bundle = open_bundle(path)
    report = on_bytes or (lambda _: None)
    manifest = bundle.manifest
    checks = ["tol.json: canonical, identity matches its content"]
    _check_listing(bundle)
    checks.append(f"{len(manifest.files)} files: all listed, none extra, sizes match")
    for name in manifest.files:
        _check_file(bundle, name, report)
    checks.append("every file: SHA-256 matches, block digests match")
    if bundle.slot_of_token is not None:
        checks.append("slots: one-to-one onto the records")
    count = _check_records(bundle)
    legal = "padding zero, scales and codes legal"
    if manifest.coding is not None:
        legal = "every entropy-coded row decodes to its end"
    checks.append(f"{count:,} records: CRC-32 matches, {legal}")
    _check_shared(bundle)
    checks.append("shared arrays: finite, scales and codes legal")
    _check_partners(bundle)
    checks.append("config, tokenizer and counts: match their source digests")
    if manifest.predictors:
        _check_embedding(bundle)
        checks.append("embedding: finite, matches its source digest")
    if manifest.partial is not None:
        for layer in ffn_layers(manifest.layers):
            ffn = bundle.ffn_file(layer)
        require_ffn_finite(ffn)
        _check_embedding(bundle)
        cold = bundle.vocab_size - manifest.partial.rows
        checks.append(f"FFN weights of {cold:,} cold tokens: finite, match their source digests")
    return VerifyReport(bundle.path, bundle.identity, manifest.bundle_bytes, count, tuple(checks))


def _check_listing(bundle: Bundle) -> None:
    for folder, prefix in ((bundle.path, ""), (bundle.path / "tables", "tables/")):
        for entry in files.list_dir(folder):
            name = prefix + entry.name
            if name not in bundle.manifest.files and name not in _OUTSIDE_IDENTITY | {"tables"}:
                raise BundleError(f"{bundle.path}: file {name!r} is not listed in tol.json")


def _check_file(bundle: Bundle, name: str, report: Callable[[int], None]) -> None:
    """Whole-file digest in 1 MiB steps; for tables/* each step against its own digest too."""
    path = bundle.path / name
    expected_blocks = None
    if name.startswith("tables/") and name != "tables/checksums.safetensors":
        sums = TensorFile(bundle.path / "tables" / "checksums.safetensors")
        size_bytes = bundle.manifest.files[name].size_bytes
        blocks = -(-size_bytes // CHECKSUM_BLOCK_BYTES)
        expected_blocks = sums.expect(path.name, "U8", (blocks, 32))
    digest = hashlib.sha256()
    damaged = ""
    for index, chunk in enumerate(files.read_chunks(path, CHECKSUM_BLOCK_BYTES)):
        digest.update(chunk)
        if expected_blocks is not None and not damaged:
            if hashlib.sha256(chunk).digest() != expected_blocks[index].tobytes():
                start = index * CHECKSUM_BLOCK_BYTES
                damaged = f", damage within bytes {start:,} to {start + len(chunk):,}"
        report(len(chunk))
    if digest.hexdigest() != bundle.manifest.files[name].sha256:
        raise BundleError(
            f"{path}: SHA-256 does not match tol.json{damaged}",
            hint="restore the file from a copy, or build the bundle again",
        )
    if damaged:
        raise BundleError(f"{path}: block digest does not match{damaged}")


def _check_records(bundle: Bundle) -> int:
    count = 0
    for tier in bundle.manifest.tiers:
        for first in range(0, tier.num_rows, BLOCK_ROWS):
            stop = min(first + BLOCK_ROWS, tier.num_rows)
            records = bundle.shards.unchecked_run(tier, first, stop)
            if tier.coded:  # decoding is the check, and compares the CRC-32
                count += len(records)
                continue
            where = f"{bundle.path}/tables/{tier.shard_name(first // tier.rows_per_shard)}"
            stored = np.ascontiguousarray(records[:, -4:]).view("<u4").reshape(-1)
            slots = np.arange(first, stop, dtype=np.int64) + tier.first_slot
            wrong = crc_of_records(records, slots) != stored
            if wrong.any():
                slot = int(slots[wrong.argmax()])
                raise BundleError(f"{where}: record in slot {slot} does not match its CRC-32")
            if records[:, tier.payload_bytes : -4].any():
                raise BundleError(f"{where}: padding before a CRC is not zero")
            for plane in tier.planes:
                try:
                    plane.codec.check(records[:, plane.offset : plane.offset + plane.length])
                except BundleError as error:
                    raise BundleError(
                        f"{where}: layer {plane.layer}, rows from {first}: {error.message}"
                    ) from error
            count += len(records)
    return count


def _check_shared(bundle: Bundle) -> None:
    if not np.isfinite(bundle.common.get("offsets", np.zeros(0))).all():
        raise BundleError(f"{bundle.path}/tables/bases.safetensors: offsets: NaN or infinity")
    for layer in bundle.layer_ids:
        shared = bundle.shared(layer)
        try:
            for tier in bundle.manifest.tiers:
                (plane,) = [plane for plane in tier.planes if plane.layer == layer]
                check_shared(plane.codec, shared)
            predictor = bundle.manifest.predictors.get(layer)
            if predictor is not None:
                predictor.check_shared(shared)
        except BundleError as error:
            where = f"{bundle.path}/tables/bases.safetensors: layer {layer}"
            raise BundleError(f"{where}: {error.message}") from error


def _check_embedding(bundle: Bundle) -> None:
    for first in range(0, bundle.vocab_size, BLOCK_ROWS):
        ids = np.arange(first, min(first + BLOCK_ROWS, bundle.vocab_size))
        if not np.isfinite(bundle.embedded(ids)).all():
            raise BundleError(
                f"{bundle.path}/backbone.safetensors: the embedding holds NaN or infinity"
            )


def _check_partners(bundle: Bundle) -> None:
    manifest: Manifest = bundle.manifest
    tokenizer = bundle.file_bytes("tokenizer.json")
    if (tokenizer is None) != (manifest.sources.tokenizer is None):
        raise BundleError(f"{bundle.path}: tokenizer.json and its source digest disagree")
    if tokenizer is not None:
        digest = digests.tokenizer_digest(
            tokenizer, bundle.vocab_size, f"{bundle.path}/tokenizer.json"
        )
        if digest != manifest.sources.tokenizer:
            raise BundleError(f"{bundle.path}/tokenizer.json: is not the one the tables are for")
    bundle.config()
    bundle.token_counts()
    TensorFile(bundle.path / "backbone.safetensors")
