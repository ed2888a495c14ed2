"""Entropy-coded rows: against a reader made from the page alone, and everything that is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _coded import read_tensors, stranger_symbols, write_coded
from _nano import refresh, reseal

from tolkit_formats import open_bundle, verify
from tolkit_formats.codecs import Steps, codec_from_json
from tolkit_formats.codecs.steps import levels
from tolkit_formats.diff import diff
from tolkit_formats.errors import BundleError, TolError
from tolkit_formats.records import lay_out
from tolkit_formats.tensorfile import TensorFile, write_tensors

SHAPES: dict[str, dict[str, Any]] = {
    "two tiers": {},
    "one tier": {"tier_rows": (9,)},
    "one token": {"tier_rows": (1,)},
    "a layer that codes nothing in front": {"counts": (0, 3)},
    "nothing coded at all": {"counts": (0, 0)},
    "four lanes": {"lanes": 4, "counts": (3, 3, 3)},
    "hadamard": {"hadamard": True, "counts": (3, 1)},
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_rows_and_symbols_are_those_of_a_stranger(tmp_path: Path, options: dict[str, Any]) -> None:
    coded = write_coded(tmp_path / "b.tol", **options)
    verify(coded.path)
    assert stranger_symbols(coded.path) == [symbols.tolist() for symbols in coded.symbols]
    bundle = open_bundle(coded.path)
    got = bundle.rows(np.arange(bundle.vocab_size))
    norms = np.linalg.norm(coded.rows_VLD, axis=-1, keepdims=True)
    assert (np.abs(got - coded.rows_VLD) <= 1e-6 * norms).all()
    assert bundle.manifest.version == (1, 1)
    assert bundle.manifest.required_features == ("entropy_rows",)


def test_any_order_gives_what_the_whole_gives(tmp_path: Path) -> None:
    # Two shards in the second tier: 16 blocks of 1,024 rows are the most in one.
    coded = write_coded(tmp_path / "b.tol", tier_rows=(70, 16_484), counts=(2,))
    bundle = open_bundle(coded.path)
    assert [tier.num_shards for tier in bundle.manifest.tiers] == [1, 2]
    whole = bundle.rows(np.arange(bundle.vocab_size))
    rng = np.random.default_rng(3)
    for size in (1, 2, 30, 300):
        ids = rng.integers(0, bundle.vocab_size, size)
        fresh = open_bundle(coded.path)
        assert np.array_equal(fresh.rows(ids), whole[ids])
        assert np.array_equal(fresh.rows(ids), whole[ids])  # once more, CRCs known
    assert open_bundle(coded.path).rows([]).shape == (0, 1, 8)
    wanted = np.array([5, 69, 70, 16_453, 16_454, 16_553])  # either side of every border
    assert np.array_equal(open_bundle(coded.path).rows(wanted), whole[wanted])
    assert verify(coded.path).num_records == 16_554


def test_planes_are_symbols_and_a_run_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = write_coded(tmp_path / "b.tol")
    bundle = open_bundle(coded.path)
    (_, first), (_, second) = bundle.plane_bytes(2, 3, 9)
    assert np.array_equal(first, coded.symbols[0][3:5, 3:])
    assert np.array_equal(second, coded.symbols[1][:4, 2:])
    monkeypatch.setattr("tolkit_formats.rans.RowCoder.decode", None)
    (_, first), _ = bundle.plane_bytes(0, 3, 9)
    assert np.array_equal(first, coded.symbols[0][3:5, :3])


def test_diff_compares_coded_with_itself(tmp_path: Path) -> None:
    bundle = open_bundle(write_coded(tmp_path / "b.tol").path)
    report = diff(bundle, bundle)
    assert report.equal and report.layers[0].stored_a == "steps"


def change(path: Path, **changed: np.ndarray) -> None:
    """Replace tensors of a file; digests in the manifest are made to fit."""
    file = TensorFile(path)
    tensors = {name: (info.dtype, np.array(file.array(name))) for name, info in file.infos.items()}
    for name, array in changed.items():
        tensors[name.replace("__", ".")] = (tensors[name.replace("__", ".")][0], array)
    write_tensors(path, tensors)
    refresh(path.parent.parent)


def shard(path: Path, tier: int = 1) -> Path:
    return path / "tables" / f"records-{tier}-00001-of-00001.safetensors"


def refused(path: Path, slot: int, words: str) -> None:
    """By reading the token, and by verify; tokens of the other tier are still served."""
    with pytest.raises(BundleError, match=rf"slot {slot} .*{words}"):
        open_bundle(path).rows([slot])
    with pytest.raises(BundleError, match=rf"slot {slot} .*{words}"):
        verify(path)
    open_bundle(path).rows([0, 1, 2, 3, 4])


def test_a_changed_byte_is_refused_by_its_slot(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "b.tol").path
    records = np.array(TensorFile(shard(path)).array("records"))
    lengths = np.array(TensorFile(shard(path)).array("lengths"))
    records[int(lengths[:4].sum())] ^= 16
    change(shard(path), records=records)
    refused(path, 5 + 4, "does not match its CRC-32")


def test_records_that_changed_places_are_refused(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "b.tol").path
    tensors = read_tensors(shard(path))
    lengths = np.frombuffer(tensors["lengths"][1], "<u2")
    pieces = np.split(np.frombuffer(tensors["records"][1], np.uint8), np.cumsum(lengths)[:-1])
    pieces[2], pieces[3] = pieces[3], pieces[2]
    lengths = np.array([len(piece) for piece in pieces], "<u2")
    change(shard(path), records=np.concatenate(pieces), lengths=lengths)
    refused(path, 5 + 2, "does not match its CRC-32")


def test_a_length_moved_to_its_neighbour_is_refused(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "b.tol").path
    lengths = np.array(TensorFile(shard(path)).array("lengths"))
    lengths[6] += 1
    lengths[7] -= 1
    change(shard(path), lengths=lengths)
    refused(path, 5 + 6, "does not match its CRC-32")


def test_a_length_without_room_for_the_crc_is_refused(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "b.tol").path
    lengths = np.array(TensorFile(shard(path)).array("lengths"))
    lengths[1] += lengths[0] - 3
    lengths[0] = 3
    change(shard(path), lengths=lengths)
    refused(path, 5, "has 3 bytes")


def test_lengths_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "b.tol").path
    lengths = np.array(TensorFile(shard(path)).array("lengths"))
    lengths[3] += 1
    change(shard(path), lengths=lengths)
    with pytest.raises(BundleError, match="lengths add up to"):
        open_bundle(path).rows([16])
    with pytest.raises(BundleError, match="lengths add up to"):
        verify(path)


def test_a_stream_with_a_right_crc_and_wrong_bytes_is_refused(tmp_path: Path) -> None:
    """What a broken writer makes: the CRC was taken after the damage."""
    import zlib

    path = write_coded(tmp_path / "b.tol").path
    tensors = read_tensors(shard(path))
    lengths = np.frombuffer(tensors["lengths"][1], "<u2")
    records = np.frombuffer(tensors["records"][1], np.uint8)
    pieces = [piece.tobytes() for piece in np.split(records, np.cumsum(lengths)[:-1])]
    body = pieces[8][:-4] + b"\x00"  # a head must not end in a zero byte
    crc = zlib.crc32(body, zlib.crc32((5 + 8).to_bytes(4, "little")))
    pieces[8] = body + crc.to_bytes(4, "little")
    lengths = np.array([len(piece) for piece in pieces], "<u2")
    change(shard(path), records=np.frombuffer(b"".join(pieces), np.uint8).copy(), lengths=lengths)
    refused(path, 5 + 8, "is no entropy-coded row")


def test_frequencies_that_make_no_model_are_refused(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "b.tol").path
    bases = path / "tables" / "bases.safetensors"
    frequencies = np.array(TensorFile(bases).array("frequencies"))
    frequencies[1] += 1
    change(bases, frequencies=frequencies)
    with pytest.raises(BundleError, match=r"bases\.safetensors: .*sum to 16384"):
        open_bundle(path).rows([0])


def test_table_lengths_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "b.tol").path
    bases = path / "tables" / "bases.safetensors"
    for lengths in ([1, 3, 6], [0, 4, 7]):
        change(bases, symbols=np.array(lengths, np.uint8))
        with pytest.raises(BundleError, match="symbols in all, expected 11"):
            open_bundle(path).rows([0])


def test_a_class_without_a_model_is_refused(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "b.tol").path
    change(path / "tables" / "bases.safetensors", layer__2__classes__0=np.array([3, 0], np.uint8))
    with pytest.raises(BundleError, match="expected a model below 3, got 3"):
        open_bundle(path).rows([0])


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("mutate", "words"),
    [
        (lambda m: m.pop("coding"), "coding is missing"),
        (lambda m: m.update(required_features=[]), "coding needs required feature"),
        (lambda m: m.update(version="1.0"), "not one of version 1.0"),
        (lambda m: m["coding"].update(name="huffman"), "expected rans"),
        (lambda m: m["coding"].update(lanes=0), "lanes is 0"),
        (lambda m: m["coding"].update(lanes=257), "lanes is 257"),
        (lambda m: m["coding"].update(models=0), "models is 0"),
        (lambda m: m["coding"].update(frequencies=0), "frequencies is 0"),
        (lambda m: m["coding"].update(more=1), "unknown field 'more'"),
        (lambda m: m["tiers"][1].update(stride=16), "stride is 16, expected 4"),
        (lambda m: m["tiers"][1].update(rows_per_shard=1024), "rows_per_shard is 1024"),
        (lambda m: m["tiers"][0]["planes"][0]["codec"].update(tier=1), "another tier"),
        (lambda m: m["tiers"][0]["planes"][0]["codec"].update(tier=2), "tier"),
        (lambda m: m["tiers"][0]["planes"][0]["codec"].update(tiers=3), "names 3 tiers"),
        (lambda m: m["tiers"][0]["planes"][0]["codec"].update(count=9), "count"),
        (lambda m: m["tiers"][0]["planes"][0]["codec"].update(count=4), "basis has 3 rows"),
        (
            lambda m: m["tiers"][0]["planes"][1].update(codec={"name": "raw", "dtype": "f32"}),
            "codec raw cannot go through entropy coding",
        ),
    ],
)
def test_manifests_that_break_a_rule_are_refused(
    tmp_path: Path, mutate: Change, words: str
) -> None:
    path = write_coded(tmp_path / "b.tol").path
    reseal(path, mutate)
    with pytest.raises(TolError, match=words):
        open_bundle(path)


def test_steps_without_the_coder_are_refused(tmp_path: Path) -> None:
    from _tiny_bundles import write_bundle

    path = write_bundle(tmp_path / "raw.tol")
    codec = {"name": "steps", "tier": 0, "tiers": 1, "count": 0, "basis": "", "exponent": 0}
    reseal(path, lambda m: m["tiers"][0]["planes"][1].update(codec=codec))
    with pytest.raises(BundleError, match="codec steps needs entropy coding"):
        open_bundle(path)


def test_long_records_have_long_lengths() -> None:
    for positions, dtype in ((1 << 15, "U16"), ((1 << 15) + 1, "U32")):
        from tolkit_formats.entropy import length_dtype

        assert length_dtype(positions) == dtype
    # The worst case of U16: 14 bits a symbol, heads and lengths of 256 lanes, the CRC.
    assert (14 << 15) // 8 + 256 * (4 + 4) + 4 < 1 << 16


def test_shards_of_coded_records_stay_small() -> None:
    few = lay_out([(0, Steps(8, 0, 1, 8, (), 0))], 10**6, coded=True)
    assert few.rows_per_shard == 16 * 1024 and few.stride == 8
    wide = Steps(1 << 16, 0, 1, 1 << 16, (), 0)
    many = lay_out([(layer, wide) for layer in range(64)], 10**6, coded=True)
    assert many.rows_per_shard == 1024


def test_levels_by_symbol() -> None:
    got = levels(np.array([[0.25, 0.125, 0.5]], np.float32), 9)
    assert got.tolist() == [[0.0, 0.75, -0.75, 1.875, -1.875, 2.5, -2.5, 3.5, -3.5]]


def test_steps_from_its_parameters() -> None:
    codec = Steps(8, 1, 3, 2, ((2, 4),), -3)
    assert codec_from_json(codec.to_json(), 8) == codec
    assert codec.segments() == (0, 2)
    shapes = codec.shared_shapes()
    assert shapes["steps"] == ("F32", (3,)) and shapes["classes.1"] == ("U8", (2,))
