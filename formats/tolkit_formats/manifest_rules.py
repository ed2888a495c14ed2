"""Reading tol.json: every rule of SPEC sections 2 to 4 checked, each breach named by its field."""

from __future__ import annotations

import re

from tolkit_formats import digests, strict_json
from tolkit_formats._fields import Fields
from tolkit_formats.codecs import Steps, codec_from_json
from tolkit_formats.entropy import FEATURE, Coding
from tolkit_formats.errors import BundleError, UnsupportedVersionError
from tolkit_formats.layer_errors import parse_layer_errors
from tolkit_formats.limits import (
    BLOCK_ROWS,
    MAX_HIDDEN_SIZE,
    MAX_INTEGER,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    MAX_SHARD_BYTES,
    MAX_SHARDS,
    MAX_STRIDE_BYTES,
    MAX_VOCAB_SIZE,
)
from tolkit_formats.manifest import (
    COMBINE_RULES,
    FORMAT_NAME,
    FORMAT_VERSION,
    KNOWN_FEATURES,
    ROOT_FILES,
    Encoding,
    FileEntry,
    HistoryEntry,
    LayerDigests,
    LayerStatus,
    Manifest,
    Sources,
)
from tolkit_formats.partial import FEATURE as PARTIAL_FEATURE
from tolkit_formats.partial import FFN_FILE, Partial
from tolkit_formats.partial import VERSION as PARTIAL_VERSION
from tolkit_formats.records import Plane, Tier, lay_out
from tolkit_formats.shared_rules import read_predictors, require_agreement

__all__ = ["parse_manifest"]

_TABLE_NAME = re.compile(r"tables/[a-z0-9][a-z0-9._-]{0,127}\Z")
_VERSION = re.compile(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})\Z")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read tol.json.

    Raises:
        UnsupportedVersionError: another major version, or a required feature unknown here.
        BundleError: anything that breaks a rule, named by field.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{where}: {len(data):,} bytes, limit {MAX_MANIFEST_BYTES:,}")
    value = strict_json.parse(data, where)
    root = Fields(value, where)
    version = _version(root)
    root.allow_unknown = version[1] > FORMAT_VERSION[1]
    features = _features(root)
    identity = root.hexdigest("identity")
    without = {k: v for k, v in value.items() if k != "identity"}
    if digests.json_digest(without) != identity:
        raise BundleError(
            f"{where}: content does not match its identity {identity[:12]}: changed or damaged"
        )
    if strict_json.canonical(value) != data:
        raise BundleError(f"{where}: not in canonical form")
    vocab_size = root.integer("vocab_size", 1, MAX_VOCAB_SIZE)
    num_layers = root.integer("num_layers", 1, MAX_LAYERS)
    hidden_size = root.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    layers = _layers(root, num_layers)
    kept = tuple(i for i, layer in enumerate(layers) if layer.status == "kept")
    mapped = root.text("slots", ("identity", "mapped")) == "mapped"
    coding = _coding(root, version, features)
    tiers = _tiers(root, vocab_size, hidden_size, kept, partial=mapped, coded=coding is not None)
    history = _history(root)
    manifest = Manifest(
        vocab_size=vocab_size,
        num_layers=num_layers,
        hidden_size=hidden_size,
        layers=layers,
        tiers=tiers,
        encoding=_encoding(root.object("encoding"), kept, num_layers, len(history)),
        sources=_sources(root.object("sources"), num_layers),
        files=_files(root),
        history=history,
        mapped_slots=mapped,
        predictors=read_predictors(root, hidden_size, kept),
        combine=root.text("combine", COMBINE_RULES),
        lookup_scale=root.number("lookup_scale"),
        out_of_range=root.text("out_of_range", ("error", "row_0", "zero")),
        required_features=features,
        version=version,
        coding=coding,
        partial=_partial(root, version, features, tiers, vocab_size),
        identity=identity,
    )
    root.done()
    _check_files(manifest, where)
    return manifest


def _version(root: Fields) -> tuple[int, int]:
    root.text("format", (FORMAT_NAME,))
    text = root.text("version")
    match = _VERSION.match(text)
    if match is None:
        raise BundleError(f"{root.where}: version {text[:20]!r} is not MAJOR.MINOR")
    version = int(match[1]), int(match[2])
    if version[0] != FORMAT_VERSION[0]:
        raise UnsupportedVersionError(
            f"{root.where}: format version {text}, this tolkit reads {FORMAT_VERSION[0]}.x",
            hint="install a tolkit release that reads it",
        )
    return version


def _features(root: Fields) -> tuple[str, ...]:
    features = root.array("required_features", longest=64)
    for feature in features:
        if not isinstance(feature, str) or feature not in KNOWN_FEATURES:
            raise UnsupportedVersionError(
                f"{root.where}: needs feature {str(feature)[:60]!r}, unknown to this tolkit",
                hint="install a newer tolkit",
            )
    return tuple(features)


def _coding(root: Fields, version: tuple[int, int], features: tuple[str, ...]) -> Coding | None:
    """The optional object of 1.1, written together with its feature."""
    if FEATURE not in features:
        if root.has("coding"):
            raise BundleError(f"{root.where}: coding needs required feature {FEATURE!r}")
        return None
    if version < (1, 1):
        raise BundleError(f"{root.where}: feature {FEATURE!r} is not one of version 1.0")
    return Coding.read(root.object("coding"))


def _partial(
    root: Fields,
    version: tuple[int, int],
    features: tuple[str, ...],
    tiers: tuple[Tier, ...],
    vocab_size: int,
) -> Partial | None:
    """The optional object of 1.2, written together with its feature."""
    if PARTIAL_FEATURE not in features:
        if root.has("partial"):
            raise BundleError(f"{root.where}: partial needs required feature {PARTIAL_FEATURE!r}")
        return None
    if version < PARTIAL_VERSION:
        raise BundleError(
            f"{root.where}: feature {PARTIAL_FEATURE!r} is not one of version "
            f"{version[0]}.{version[1]}"
        )
    partial = Partial.read(root.object("partial"), vocab_size)
    num_rows = sum(tier.num_rows for tier in tiers)
    if partial.rows != num_rows:
        raise BundleError(
            f"{root.where}: partial: rows is {partial.rows}, the tiers hold {num_rows}"
        )
    return partial


def _layers(root: Fields, num_layers: int) -> tuple[LayerStatus, ...]:
    entries = root.objects("layers", longest=MAX_LAYERS)
    if len(entries) != num_layers:
        raise BundleError(f"{root.where}: layers has {len(entries)} entries, expected {num_layers}")
    layers = []
    for entry in entries:
        status = entry.text("status", ("kept", "folded", "dropped"))
        into = entry.integer("into", 0, num_layers - 1) if status == "folded" else None
        entry.done()
        layers.append(LayerStatus(status, into))
    for i, layer in enumerate(layers):
        if layer.into is not None and layers[layer.into].status != "kept":
            raise BundleError(f"{root.where}: layers[{i}] is folded into {layer.into}, not kept")
    return tuple(layers)


def _tiers(
    root: Fields,
    vocab_size: int,
    hidden_size: int,
    kept: tuple[int, ...],
    *,
    partial: bool,
    coded: bool,
) -> tuple[Tier, ...]:
    tiers = []
    next_slot = 0
    for i, entry in enumerate(root.objects("tiers", longest=256)):
        first_slot = entry.integer("first_slot", next_slot, next_slot)
        num_rows = entry.integer("num_rows", 1, vocab_size - next_slot)
        stride = entry.integer("stride", 0 if coded else 16, MAX_STRIDE_BYTES)
        per_shard = entry.integer("rows_per_shard", BLOCK_ROWS, MAX_VOCAB_SIZE)
        planes = tuple(
            _plane(plane, hidden_size) for plane in entry.objects("planes", longest=MAX_LAYERS)
        )
        entry.done()
        tier = Tier(i, first_slot, num_rows, stride, per_shard, planes, coded)
        _check_codecs(tier, entry.where)
        _check_tier(tier, kept, entry.where)
        tiers.append(tier)
        next_slot += num_rows
    for plane in (plane for tier in tiers for plane in tier.planes):
        if isinstance(plane.codec, Steps) and plane.codec.tiers != len(tiers):
            raise BundleError(
                f"{root.where}: layer {plane.layer}: codec steps names {plane.codec.tiers} tiers, "
                f"there are {len(tiers)}"
            )
    if next_slot != vocab_size and not (partial and tiers):
        raise BundleError(
            f"{root.where}: tiers hold {next_slot} rows, expected vocab_size {vocab_size}"
        )
    require_agreement(tiers, root.where)
    return tuple(tiers)


def _plane(entry: Fields, hidden_size: int) -> Plane:
    try:
        codec = codec_from_json(entry.object("codec").value, hidden_size)
    except BundleError as error:
        raise type(error)(f"{entry.where}: {error.message}", hint=error.hint) from error
    plane = Plane(
        layer=entry.integer("layer", 0, MAX_LAYERS - 1),
        codec=codec,
        offset=entry.integer("offset", 0, MAX_STRIDE_BYTES),
        length=entry.integer("length", 0, MAX_STRIDE_BYTES),
    )
    entry.done()
    return plane


def _check_codecs(tier: Tier, where: str) -> None:
    """Symbols go through the coder and nothing else does; a plane names its own tier."""
    for plane in tier.planes:
        if isinstance(plane.codec, Steps) != tier.coded:
            needs = "needs" if isinstance(plane.codec, Steps) else "cannot go through"
            raise BundleError(
                f"{where}: layer {plane.layer}: codec {plane.codec.name} {needs} entropy coding"
            )
        if isinstance(plane.codec, Steps) and plane.codec.tier != tier.index:
            raise BundleError(f"{where}: layer {plane.layer}: codec steps names another tier")


def _check_tier(tier: Tier, kept: tuple[int, ...], where: str) -> None:
    """The stored numbers must be the ones the layout rules give."""
    if tuple(plane.layer for plane in tier.planes) != kept:
        raise BundleError(f"{where}: planes must be the kept layers {list(kept)} in order")
    codecs = [(p.layer, p.codec) for p in tier.planes]
    expected = lay_out(codecs, tier.num_rows, coded=tier.coded)
    for got, want in zip(tier.planes, expected.planes, strict=True):
        if (got.offset, got.length) != (want.offset, want.length):
            raise BundleError(
                f"{where}: plane of layer {got.layer} at {got.offset}+{got.length}, "
                f"expected {want.offset}+{want.length}"
            )
    if tier.stride != expected.stride:
        raise BundleError(f"{where}: stride is {tier.stride}, expected {expected.stride}")
    if tier.coded and tier.rows_per_shard != expected.rows_per_shard:
        raise BundleError(
            f"{where}: rows_per_shard is {tier.rows_per_shard}, expected {expected.rows_per_shard}"
        )
    if tier.rows_per_shard % BLOCK_ROWS or (
        tier.rows_per_shard > BLOCK_ROWS and tier.rows_per_shard * tier.stride > MAX_SHARD_BYTES
    ):
        raise BundleError(f"{where}: rows_per_shard {tier.rows_per_shard} breaks the shard rule")
    if tier.num_shards > MAX_SHARDS:
        raise BundleError(f"{where}: {tier.num_shards} shards, limit {MAX_SHARDS}")


def _encoding(entry: Fields, kept: tuple[int, ...], num_layers: int, num_steps: int) -> Encoding:
    feedback = entry.boolean("feedback")
    order = entry.array("order", longest=MAX_LAYERS)
    errors = tuple(parse_layer_errors(entry, num_layers, num_steps))
    entry.done()
    if any(isinstance(i, bool) or not isinstance(i, int) for i in order) or sorted(order) != list(
        kept
    ):
        raise BundleError(f"{entry.where}: order must list the kept layers {list(kept)}")
    return Encoding(feedback, tuple(order), errors)


def _sources(entry: Fields, num_layers: int) -> Sources:
    layers = []
    for item in entry.objects("layers", longest=MAX_LAYERS):
        layers.append(LayerDigests(item.hexdigest("norm"), item.hexdigest("ffn")))
        item.done()
    if len(layers) != num_layers:
        raise BundleError(f"{entry.where}: layers has {len(layers)} entries, expected {num_layers}")
    sources = Sources(
        entry.hexdigest("embedding"),
        None if entry.get("tokenizer") is None else entry.hexdigest("tokenizer"),
        entry.hexdigest("config"),
        tuple(layers),
    )
    entry.done()
    return sources


def _files(root: Fields) -> dict[str, FileEntry]:
    listing = root.object("files")
    if len(listing.value) > MAX_SHARDS + 64:
        raise BundleError(f"{listing.where}: {len(listing.value)} files, limit {MAX_SHARDS + 64}")
    result = {}
    for name in sorted(listing.value):
        if name not in ROOT_FILES and (not _TABLE_NAME.match(name) or ".." in name):
            raise BundleError(f"{listing.where}: name {name[:80]!r} is not allowed")
        entry = listing.object(name)
        result[name] = FileEntry(entry.integer("bytes", 0, MAX_INTEGER), entry.hexdigest("sha256"))
        entry.done()
    return result


def _history(root: Fields) -> tuple[HistoryEntry, ...]:
    steps = []
    for entry in root.objects("history", longest=1024):
        parent = None if entry.get("parent") is None else entry.hexdigest("parent")
        options = entry.object("options").value
        steps.append(HistoryEntry(entry.text("command"), options, parent, entry.text("tool")))
        entry.done()
    return tuple(steps)


def _check_files(manifest: Manifest, where: str) -> None:
    """Exactly the table files the layout calls for, and the root files every bundle has."""
    needed = {"tables/checksums.safetensors"}
    for tier in manifest.tiers:
        needed |= {f"tables/{tier.shard_name(i)}" for i in range(tier.num_shards)}
        if any(plane.codec.shared_shapes() for plane in tier.planes):
            needed.add("tables/bases.safetensors")
    if manifest.predictors or manifest.coding is not None:
        needed.add("tables/bases.safetensors")
    if manifest.mapped_slots:
        needed.add("tables/slots.safetensors")
    present = {name for name in manifest.files if name.startswith("tables/")}
    needed_root = {"config.json", "backbone.safetensors"}
    if manifest.partial is not None:
        needed_root.add(FFN_FILE)
    elif FFN_FILE in manifest.files:
        raise BundleError(f"{where}: files: {FFN_FILE} belongs to nothing")
    for name in sorted(needed - present) + sorted(needed_root - set(manifest.files)):
        raise BundleError(f"{where}: files: {name} is missing")
    for name in sorted(present - needed):
        raise BundleError(f"{where}: files: {name} belongs to nothing")
