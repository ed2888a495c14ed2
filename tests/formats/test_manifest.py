"""tol.json: what is written is read back equal, byte for byte, and identities are SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from _nano import ALL_CODECS, MIXED, reseal, seal_json, write_nano
from hypothesis import given, settings
from hypothesis import strategies as st

from tolkit_formats import open_bundle, verify
from tolkit_formats.codecs import codec_from_json
from tolkit_formats.errors import UnsupportedVersionError
from tolkit_formats.manifest import (
    Encoding,
    FileEntry,
    HistoryEntry,
    LayerDigests,
    LayerStatus,
    Manifest,
    Sources,
)
from tolkit_formats.manifest_rules import parse_manifest
from tolkit_formats.records import lay_out

hexes = st.integers(0, 2**256 - 1).map(lambda n: f"{n:064x}")


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest the format allows, in one tier."""
    num_layers = draw(st.integers(1, 6))
    hidden_size = draw(st.integers(5, 200))
    vocab_size = draw(st.integers(1, 5000))
    kept = draw(st.sets(st.integers(0, num_layers - 1)).map(sorted))
    statuses = []
    for layer in range(num_layers):
        if layer in kept:
            statuses.append(LayerStatus("kept"))
        elif kept and draw(st.booleans()):
            statuses.append(LayerStatus("folded", draw(st.sampled_from(kept))))
        else:
            statuses.append(LayerStatus("dropped"))
    codecs = [(i, codec_from_json(draw(st.sampled_from(ALL_CODECS)), hidden_size)) for i in kept]
    mapped = draw(st.booleans())
    num_rows = draw(st.integers(1, vocab_size)) if mapped else vocab_size
    tier = lay_out(codecs, num_rows, max_shard_bytes=draw(st.sampled_from([1, 1 << 22, 1 << 30])))
    names = {"config.json", "backbone.safetensors", "tables/checksums.safetensors"}
    names |= {f"tables/{tier.shard_name(i)}" for i in range(tier.num_shards)}
    if any(codec.shared_shapes() for _, codec in codecs):
        names.add("tables/bases.safetensors")
    if mapped:
        names.add("tables/slots.safetensors")
    entries = st.builds(FileEntry, st.integers(0, 2**40), hexes)
    steps = st.builds(
        HistoryEntry,
        command=st.text(max_size=8),
        options=st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.text(max_size=5)),
        parent=st.none() | hexes,
        tool=st.text(max_size=8),
    )
    return Manifest(
        vocab_size=vocab_size,
        num_layers=num_layers,
        hidden_size=hidden_size,
        layers=tuple(statuses),
        tiers=(tier,),
        encoding=Encoding(draw(st.booleans()), tuple(draw(st.permutations(kept)))),
        sources=Sources(
            draw(hexes),
            draw(st.none() | hexes),
            draw(hexes),
            tuple(LayerDigests(draw(hexes), draw(hexes)) for _ in range(num_layers)),
        ),
        files={name: draw(entries) for name in sorted(names)},
        history=tuple(draw(st.lists(steps, max_size=3))),
        mapped_slots=mapped,
        combine=draw(st.sampled_from(["residual_add", "other"])),
        lookup_scale=draw(st.just(1) | st.floats(-8, 8)),
        out_of_range=draw(st.sampled_from(["error", "row_0", "zero"])),
    )


@given(manifests())
@settings(max_examples=60, deadline=None)
def test_round_trip(manifest: Manifest) -> None:
    data, identity = manifest.to_bytes()
    read = parse_manifest(data, "B.tol/tol.json")
    assert read == manifest and read.identity == identity
    assert read.to_bytes() == (data, identity)


@given(manifests())
@settings(max_examples=20, deadline=None)
def test_identity_is_the_digest_of_everything_else(manifest: Manifest) -> None:
    data, identity = manifest.to_bytes()
    assert seal_json(json.loads(data)) == data
    fields = json.loads(data)
    assert fields.pop("identity") == identity
    plain = json.dumps(fields, sort_keys=True, indent=1).encode() + b"\n"
    assert hashlib.sha256(plain).hexdigest() == identity


def test_derived_numbers(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol", MIXED, gone={1: 2, 0: None}, vocab_size=50)
    manifest = open_bundle(nano.path).manifest
    tables = sum(f.stat().st_size for f in (nano.path / "tables").iterdir())
    everything = sum(f.stat().st_size for f in nano.path.rglob("*") if f.is_file())
    assert manifest.layer_ids == (2, 3) and manifest.num_rows == 50
    assert manifest.table_bytes == tables
    assert manifest.bundle_bytes == everything - (nano.path / "tol.json").stat().st_size
    assert manifest.bits_per_value == 8 * tables / (50 * 4 * 24)


def test_a_newer_minor_version_with_unknown_fields_opens(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol")

    def grow(manifest: dict) -> None:
        manifest["version"] = "1.7"
        manifest["colour"] = {"of": ["the", "sea"]}
        manifest["tiers"][0]["prefetch"] = 3
        manifest["layers"][0]["note"] = "new"

    reseal(nano.path, grow)
    assert open_bundle(nano.path).manifest.version == (1, 7)
    verify(nano.path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: m.update(version="2.0"), "2.0"),
        (lambda m: m.update(version="0.9"), "0.9"),
        (lambda m: m.update(version="9999.0"), "9999.0"),
        (lambda m: m.update(required_features=["entropy"]), "entropy"),
        (lambda m: m["tiers"][0]["planes"][0].update(codec={"name": "lattice"}), "lattice"),
    ],
)
def test_what_a_newer_reader_is_needed_for_is_named(
    change: Callable[[dict], object], word: str, tmp_path: Path
) -> None:
    nano = write_nano(tmp_path / "b.tol")
    reseal(nano.path, change)
    with pytest.raises(UnsupportedVersionError) as caught:
        open_bundle(nano.path)
    assert word in caught.value.message and "tol.json" in caught.value.message
    assert caught.value.hint and caught.value.exit_code == 4


def test_fields_do_not_depend_on_the_order_they_were_given_in(tmp_path: Path) -> None:
    manifest = open_bundle(write_nano(tmp_path / "b.tol").path).manifest
    turned = replace(manifest, files=dict(reversed(manifest.files.items())))
    assert turned.to_bytes() == manifest.to_bytes()
