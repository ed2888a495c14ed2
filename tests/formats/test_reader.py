"""The reader against rows worked out by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _nano import (
    ALL_CODECS,
    MIXED,
    RAW_F16,
    Nano,
    assert_rows,
    nano_tokenizer,
    refresh,
    reseal,
    svd,
    tensor_bytes,
    write_nano,
)

from tolkit_formats import open_bundle
from tolkit_formats.errors import BundleError, InputError, UsageError
from tolkit_formats.limits import NO_SLOT


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Nano:
    return write_nano(tmp_path_factory.mktemp("mixed") / "b.tol")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Nano:
    """Three shards and records in the order of counts."""
    path = tmp_path_factory.mktemp("sharded") / "b.tol"
    return write_nano(path, [RAW_F16, RAW_F16], vocab_size=2500, hidden_size=5, max_shard_bytes=1)


@pytest.mark.parametrize("codec", ALL_CODECS, ids=lambda c: c.get("dtype", c["name"]))
@pytest.mark.parametrize("width", [1, 24, 63, 64, 65])
def test_rows_of_every_codec(codec: dict, width: int, tmp_path: Path) -> None:
    if codec["name"] == "svd":
        codec = svd(min(width, codec["rank"]), codec["inner"])
    nano = write_nano(tmp_path / "b.tol", [codec, codec], vocab_size=7, hidden_size=width)
    got = open_bundle(nano.path).rows(np.arange(7))
    assert_rows(got, nano.rows_VKD)
    if codec["name"] != "svd":
        np.testing.assert_array_equal(got, nano.rows_VKD)


def test_rows_come_in_the_order_asked_for(mixed: Nano) -> None:
    bundle = open_bundle(mixed.path)
    for ids in ([3], [39, 0, 7], [5, 5, 5], list(range(40)), list(reversed(range(40)))):
        assert_rows(bundle.rows(ids), mixed.rows_VKD[ids])
    assert bundle.rows([]).shape == (0, 4, 24)
    assert_rows(bundle.rows(np.array([2], np.uint8)), mixed.rows_VKD[[2]])


def test_rows_across_shards_and_mapped_slots(sharded: Nano) -> None:
    bundle = open_bundle(sharded.path)
    assert bundle.manifest.tiers[0].num_shards == 3
    ids = np.random.default_rng(5).integers(0, 2500, 400)
    np.testing.assert_array_equal(bundle.rows(ids), sharded.rows_VKD[ids])
    np.testing.assert_array_equal(bundle.rows(np.arange(2500)), sharded.rows_VKD)


def test_slots_follow_counts_falling_then_ids(sharded: Nano) -> None:
    bundle = open_bundle(sharded.path)
    counts = bundle.token_counts()
    assert counts is not None and bundle.slot_of_token is not None
    np.testing.assert_array_equal(counts, sharded.counts_V)
    order = np.argsort(bundle.slot_of_token)
    keys = [(-int(counts[i]), int(i)) for i in order]
    assert keys == sorted(keys)


def test_a_range_of_slots_crosses_shards(sharded: Nano) -> None:
    bundle = open_bundle(sharded.path)
    assert sharded.slot_of_token_V is not None
    tokens = np.argsort(sharded.slot_of_token_V)[900:2200]
    pieces = bundle.plane_bytes(1, 900, 2200)
    assert [len(plane) for _, plane in pieces] == [124, 1024, 152]
    rows = np.concatenate([codec.decode(plane, {}) for codec, plane in pieces])
    np.testing.assert_array_equal(rows, sharded.rows_VKD[tokens, 1])


@pytest.mark.parametrize(
    ("ids", "word"),
    [
        ([40], "40"),
        ([-1], "-1"),
        ([0, 2**40], str(2**40)),
        (np.array([2**64 - 1], np.uint64), "out of range"),
        ([0.5], "integers"),
        ([True, False], "integers"),
        (["a"], "integers"),
        ([[0, 1]], "1-D"),
        (3, "1-D"),
    ],
)
def test_ids_that_are_no_token_are_refused(mixed: Nano, ids: object, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        open_bundle(mixed.path).rows(ids)


def test_layers_left_out(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol", [*MIXED, RAW_F16], gone={0: 1, 2: None, 4: 3})
    bundle = open_bundle(nano.path)
    assert bundle.layer_ids == (1, 3) and bundle.num_layers == 5
    assert_rows(bundle.rows([4, 0]), nano.rows_VKD[[4, 0]])
    assert bundle.plane_codec(3).name == "svd"
    with pytest.raises(UsageError, match="layer 2"):
        bundle.plane_codec(2)


def test_what_a_bundle_says_of_itself(mixed: Nano) -> None:
    bundle = open_bundle(mixed.path)
    assert bundle.identity == mixed.identity
    assert (bundle.vocab_size, bundle.num_layers, bundle.hidden_size) == (40, 4, 24)
    assert bundle.file_bytes("tokenizer.json") == nano_tokenizer(40)
    assert bundle.file_bytes("token_counts.missing") is None
    assert bundle.records([3, 1]).shape == (2, bundle.manifest.tiers[0].stride)


def test_without_counts_slots_are_ids(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol", counts=False, tokenizer=False)
    bundle = open_bundle(nano.path)
    assert bundle.token_counts() is None and bundle.slot_of_token is None
    assert_rows(bundle.rows(np.arange(40)), nano.rows_VKD)


def test_partial_tables_name_the_token_without_a_record(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol")
    tier_rows = 30
    assert nano.slot_of_token_V is not None
    slots = nano.slot_of_token_V.copy()
    gone = np.flatnonzero(slots >= tier_rows)
    slots[gone] = NO_SLOT
    (shard,) = (nano.path / "tables").glob("records-*")
    stride = open_bundle(nano.path).manifest.tiers[0].stride
    data = shard.read_bytes()[-40 * stride :][: tier_rows * stride]
    shard.write_bytes(tensor_bytes({"records": ("U8", (tier_rows, stride), data)}))
    slots_file = nano.path / "tables" / "slots.safetensors"
    slots_file.write_bytes(tensor_bytes({"slots": ("U32", (40,), slots.tobytes())}))
    reseal(nano.path, lambda m: m["tiers"][0].update(num_rows=tier_rows))
    refresh(nano.path)
    bundle = open_bundle(nano.path)
    held = np.flatnonzero(slots != NO_SLOT)
    assert_rows(bundle.rows(held), nano.rows_VKD[held])
    with pytest.raises(BundleError, match=f"token id {gone[0]} has no record"):
        bundle.rows([held[0], gone[0]])


def test_two_tiers_share_one_slot_space(tmp_path: Path) -> None:
    """The head of the vocabulary in f16, the tail in int8: rows of both in one answer."""
    head = write_nano(tmp_path / "head.tol", [RAW_F16], counts=False)
    tail = write_nano(tmp_path / "tail.tol", [{"name": "int8"}], counts=False)
    tables = head.path / "tables"
    tiers = []
    for index, (nano, first, stop) in enumerate([(head, 0, 10), (tail, 10, 40)]):
        bundle = open_bundle(nano.path)
        tier = bundle.manifest.to_json()["tiers"][0]
        data = bundle.records(np.arange(first, stop)).tobytes()
        for old in tables.glob(f"records-{index}-*"):
            old.unlink()
        shape = (stop - first, tier["stride"])
        (tables / f"records-{index}-00001-of-00001.safetensors").write_bytes(
            tensor_bytes({"records": ("U8", shape, data)})
        )
        tiers.append({**tier, "first_slot": first, "num_rows": stop - first})
    reseal(head.path, lambda m: m.update(tiers=tiers))
    refresh(head.path)
    bundle = open_bundle(head.path)
    ids = [39, 3, 12, 9, 10, 39]
    want = np.where(np.array(ids)[:, None, None] < 10, head.rows_VKD[ids], tail.rows_VKD[ids])
    np.testing.assert_array_equal(bundle.rows(ids), want)
    with pytest.raises(UsageError, match="2 tiers"):
        bundle.records([1])


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol", counts=False)
    (shard,) = (nano.path / "tables").glob("records-*")
    stride = open_bundle(nano.path).manifest.tiers[0].stride
    data = bytearray(shard.read_bytes())
    data[-(40 - 17) * stride] ^= 4
    shard.write_bytes(data)
    bundle = open_bundle(nano.path)
    for _ in range(2):  # the first refusal must not count as having been checked
        with pytest.raises(BundleError, match="slot 17 does not match its CRC"):
            bundle.rows([3, 17])
        with pytest.raises(BundleError, match="slot 17"):
            bundle.plane_bytes(0, 0, 40)
    unchecked = open_bundle(nano.path, check_crc=False).rows([17])
    assert not np.array_equal(unchecked, nano.rows_VKD[[17]])
    with pytest.raises(BundleError, match="is damaged, or a file of another bundle"):
        bundle.rows([i for i in range(40) if i != 17])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda p: None, "no such bundle"),
        (lambda p: p.write_bytes(b"x"), "is not a folder"),
        (lambda p: p.mkdir(), "not a (finished) bundle"),
        (lambda p: (p.mkdir(), (p / "tol.json").mkdir()), "not a (finished) bundle"),
        (lambda p: (p.mkdir(), os.mkfifo(p / "tol.json")), "not a (finished) bundle"),
    ],
)
def test_what_is_no_bundle(make: Callable[[Path], object], word: str, tmp_path: Path) -> None:
    make(tmp_path / "b.tol")
    with pytest.raises(InputError) as caught:
        open_bundle(tmp_path / "b.tol")
    assert word in caught.value.message and caught.value.hint
