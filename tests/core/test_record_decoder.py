"""Torch decoding of records against the numpy reader, for every codec there is."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from _bands import TIER_ROWS, write_bands
from _coded import write_coded
from _drawn_tables import DrawnBundle, shapes_of_codecs
from _nano import assert_rows
from _tiny_bundles import known_rows, stored_ids, write_bundle

from tolkit.decode.field_planes import BandsFields, StepsFields
from tolkit.decode.record_decoder import RecordDecoder, unit_rows
from tolkit_formats import open_bundle
from tolkit_formats.codecs import Steps, prepared
from tolkit_formats.predictor import unit_rows as unit_rows_in_numpy
from tolkit_formats.reader import Bundle

GOLDEN = Path(__file__).parents[1] / "golden"
BUNDLES = sorted(GOLDEN.glob("v1.*/*.tol"))
CPU = torch.device("cpu")
each = pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.stem)


def decoded(bundle: Bundle, decoder: RecordDecoder, ids: np.ndarray) -> np.ndarray:
    """Rows [n, K, D] of ids, tier by tier, records from the reader."""
    slots = bundle.slots_of(ids)
    rows = np.full((len(ids), len(bundle.layer_ids), bundle.hidden_size), np.nan, np.float32)
    for tier in bundle.manifest.tiers:
        where = np.flatnonzero(
            (slots >= tier.first_slot) & (slots < tier.first_slot + tier.num_rows)
        )
        records = torch.from_numpy(bundle.shards.take(tier, slots[where]))
        got = decoder.decode(tier.index, records, torch.from_numpy(ids[where]))
        rows[where] = got.float().numpy()
    return rows


def test_every_codec_is_there() -> None:
    assert len(BUNDLES) == 15


@each
def test_rows_are_the_readers(path: Path) -> None:
    bundle = open_bundle(path)
    ids = np.random.default_rng(0).permutation(stored_ids(bundle))
    got = decoded(bundle, RecordDecoder(bundle, CPU), ids)
    want = bundle.rows(ids)
    if path.name.startswith(("svd", "bands", "steps")):
        assert_rows(got, want)
    else:
        assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


@each
def test_no_rows_and_one_row(path: Path) -> None:
    bundle = open_bundle(path)
    decoder = RecordDecoder(bundle, CPU)
    shape = (len(bundle.layer_ids), bundle.hidden_size)
    assert decoded(bundle, decoder, np.zeros(0, np.int64)).shape == (0, *shape)
    one = stored_ids(bundle)[7:8]
    assert_rows(decoded(bundle, decoder, one), bundle.rows(one))


def test_tiers_predictors_and_planes_of_several_codecs(tmp_path: Path) -> None:
    """Three tiers of bands (one that stores nothing, one Hadamard), an nf4 plane, a zero row."""
    made = write_bands(tmp_path / "b.tol")
    bundle = open_bundle(made.path)
    ids = np.arange(sum(TIER_ROWS))
    got = decoded(bundle, RecordDecoder(bundle, CPU), ids)
    assert_rows(got, made.rows_VKD)


@pytest.mark.parametrize("hadamard", [False, True])
def test_symbol_planes(tmp_path: Path, hadamard: bool) -> None:
    made = write_coded(tmp_path / "c.tol", hadamard=hadamard)
    bundle = open_bundle(made.path)
    got = decoded(bundle, RecordDecoder(bundle, CPU), np.arange(bundle.vocab_size))
    assert_rows(got, made.rows_VLD)


@pytest.mark.parametrize("label", shapes_of_codecs(40))
def test_drawn_codes_of_every_codec(label: str) -> None:
    """Against the numpy codec itself, plane by plane; steps in two symbols among them."""
    codec = shapes_of_codecs(40)[label]
    drawn = DrawnBundle(codec, vocab_size=20, num_layers=3)
    (tier,) = drawn.manifest.tiers
    records = drawn.shards.take(tier, np.arange(20))
    decoder = RecordDecoder(cast(Bundle, drawn), CPU)
    got = decoder.decode(0, torch.from_numpy(records), torch.arange(20)).numpy()
    for place, plane in enumerate(tier.planes):
        plane_NB = records[:, plane.offset : plane.offset + plane.length]
        want = codec.decode(plane_NB, prepared(codec, {**drawn.shared(place), **drawn.common}))
        assert_rows(got[:, place], want)
        alone = decoder.decode_plane(0, place, torch.from_numpy(plane_NB), torch.arange(20))
        assert_rows(alone.numpy(), want)


@pytest.mark.parametrize("label", ["steps in two symbols", "steps hadamard"])
def test_levels_of_two_symbols_are_bit_equal(label: str) -> None:
    codec = shapes_of_codecs(40)[label]
    assert isinstance(codec, Steps) and codec.num_symbols > codec.count
    drawn = DrawnBundle(codec, vocab_size=50, num_layers=2)
    (tier,) = drawn.manifest.tiers
    records = drawn.shards.take(tier, np.arange(50))
    stored = [{**drawn.shared(layer), **drawn.common} for layer in range(2)]
    planes = [(codec, of_it, p.offset) for of_it, p in zip(stored, tier.planes, strict=True)]
    fields = StepsFields(planes, CPU)
    got = fields.in_steps(torch.from_numpy(records)).numpy()
    want = [
        codec.coefficients(records[:, at : at + plane.length], codec.prepared(of_it))
        for of_it, plane, at in zip(stored, tier.planes, (0, codec.num_symbols), strict=True)
    ]
    assert np.array_equal(got, np.concatenate(want, axis=1))


def test_coefficients_are_bit_equal(tmp_path: Path) -> None:
    bundle = open_bundle(write_bands(tmp_path / "b.tol").path)
    for tier in bundle.manifest.tiers:
        planes = [p for p in tier.planes if p.codec.name == "bands"]
        fields = BandsFields([(p.codec, bundle.shared(p.layer), p.offset) for p in planes], CPU)
        records = bundle.shards.unchecked_run(tier, 0, tier.num_rows)
        got = fields.coefficients(torch.from_numpy(np.array(records))).numpy()
        want = [
            p.codec.coefficients(
                records[:, p.offset : p.offset + p.length], p.codec.prepared(bundle.shared(p.layer))
            )
            for p in planes
            if len(p.codec.stored_C)
        ]
        assert np.array_equal(got, np.concatenate([np.zeros((tier.num_rows, 0)), *want], axis=1))
    coded = open_bundle(write_coded(tmp_path / "c.tol").path)
    for tier in coded.manifest.tiers:
        stored = [
            (p.codec, {**coded.shared(p.layer), **coded.common}, p.offset) for p in tier.planes
        ]
        records = coded.shards.unchecked_run(tier, 0, tier.num_rows)
        got = StepsFields(stored, CPU).in_steps(torch.from_numpy(records)).numpy()
        want = [
            codec.coefficients(records[:, at : at + codec.count], codec.prepared(shared))
            for codec, shared, at in stored
            if codec.count
        ]
        assert np.array_equal(got, np.concatenate(want, axis=1))


@pytest.mark.parametrize("kept", [(0,), (1, 2), (0, 2)])
def test_kept_layers_alone(tmp_path: Path, kept: tuple[int, ...]) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "k.tol", kept=kept))
    ids = np.array([3, 3, 39, 0])
    got = decoded(bundle, RecordDecoder(bundle, CPU), ids)
    assert np.array_equal(got, known_rows()[ids][:, list(kept)])


def test_half_precision_rows_are_the_float32_ones_rounded() -> None:
    bundle = open_bundle(GOLDEN / "v1.0" / "nf4.tol")
    ids = np.arange(9)
    got = decoded(bundle, RecordDecoder(bundle, CPU, torch.bfloat16), ids)
    assert np.array_equal(got, torch.from_numpy(bundle.rows(ids)).bfloat16().float().numpy())


def test_records_at_an_odd_address_are_moved(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "k.tol"))
    (tier,) = bundle.manifest.tiers
    records = torch.from_numpy(bundle.shards.take(tier, np.arange(5)))
    odd = torch.zeros(records.numel() + 1, dtype=torch.uint8)
    odd[1:] = records.view(-1)
    got = RecordDecoder(bundle, CPU).decode(0, odd[1:].view(records.shape), torch.arange(5))
    assert np.array_equal(got.numpy(), known_rows()[:5])


def test_records_within_wider_rows_are_taken_where_they_lie() -> None:
    bundle = open_bundle(GOLDEN / "v1.0" / "nf4.tol")
    tier = bundle.manifest.tiers[0]
    records = torch.from_numpy(bundle.shards.take(tier, np.arange(6)))
    wide = torch.full((6, tier.stride + 32), 255, dtype=torch.uint8)
    wide[:, 16 : 16 + tier.stride] = records
    got = RecordDecoder(bundle, CPU).decode(0, wide[:, 16 : 16 + tier.stride], torch.arange(6))
    ids = np.arange(bundle.vocab_size)[np.argsort(bundle.slots_of(np.arange(bundle.vocab_size)))]
    assert np.array_equal(got.numpy(), bundle.rows(ids[:6]))


def test_predictions_leave_the_records_alone() -> None:
    bundle = open_bundle(GOLDEN / "v1.0" / "bands-klt.tol")
    tier = bundle.manifest.tiers[0]
    records = torch.from_numpy(bundle.shards.take(tier, np.arange(4)))
    before = records.clone()
    RecordDecoder(bundle, CPU).decode(0, records, torch.arange(4))
    assert torch.equal(before, records)


def test_unit_rows_of_zeros_stay() -> None:
    rows = np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)
    assert np.allclose(unit_rows(torch.from_numpy(rows)), unit_rows_in_numpy(rows), rtol=1e-7)
    assert unit_rows(torch.zeros(1, 4)).tolist() == [[0.0] * 4]
