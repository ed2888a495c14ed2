"""Sound files of illegal content: codec values, slots, bases, tokenizer, config, counts.

Every CRC and digest is made to fit, so only looking at the values themselves can find these.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _hostile import Case, params, run_case
from _nano import (
    INT4,
    INT8,
    NF4,
    RAW_BF16,
    RAW_F16,
    RAW_F32,
    edit_record,
    nano_tokenizer,
    refresh,
    reseal,
    svd,
    tensor_bytes,
    write_nano,
)

from tolkit_formats import open_bundle, verify
from tolkit_formats.digests import json_digest, tokenizer_digest
from tolkit_formats.errors import BundleError, DataError, MismatchError

# One layer for each kind of value, 23 wide so that tails and paddings exist. Bytes of the planes:
# f32 92 | f16 46+2 | bf16 46+2 | int8 2+2 + 23+1 | nf4 4 + 11.5+0.5+0 | int4 likewise | svd 4+3+1
CODECS = (RAW_F32, RAW_F16, RAW_BF16, INT8, NF4, INT4, svd(3, INT8))
START = {"f32": 0, "f16": 92, "bf16": 140, "int8": 188, "nf4": 216, "int4": 232, "svd": 248}
SLOT = 7
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "g.tol"
    nano = write_nano(path, CODECS, hidden_size=23)
    planes = open_bundle(path).manifest.tiers[0].planes
    assert [plane.offset for plane in planes] == list(START.values())
    return nano.path


def value(place: str, offset: int, data: bytes) -> Callable[[Path], object]:
    """Overwrite bytes of a plane of one record, CRC and digests made to fit."""
    start = START[place] + offset

    def change(record: bytearray) -> None:
        record[start : start + len(data)] = data

    def damage(path: Path) -> None:
        edit_record(path, SLOT, change)
        refresh(path)

    return damage


def f32(number: float) -> bytes:
    return struct.pack("<f", number)


def f16(number: float) -> bytes:
    return np.float16(number).tobytes()


def bf16(bits: int) -> bytes:
    return struct.pack("<H", bits)


def refused_value(name: str, layer: int, damage: Callable[[Path], object], *words: str) -> Case:
    place = ("records-0-", f"layer {layer}", f"row {SLOT}")
    return Case(name, damage, (*place, *words), at_open=False)


VALUES = [
    refused_value("f32 NaN", 0, value("f32", 4, f32(NAN)), "column 1", "not finite"),
    refused_value("f32 Inf", 0, value("f32", 88, f32(INF)), "column 22", "not finite"),
    refused_value("f32 -Inf", 0, value("f32", 0, f32(-INF)), "column 0", "not finite"),
    refused_value("f32 signalling NaN", 0, value("f32", 0, b"\1\0\x80\x7f"), "not finite"),
    refused_value("f16 NaN", 1, value("f16", 2, f16(NAN)), "column 1", "not finite"),
    refused_value("f16 Inf", 1, value("f16", 44, f16(INF)), "column 22", "not finite"),
    refused_value("f16 padding", 1, value("f16", 46, b"\1"), "padding"),
    refused_value("bf16 NaN", 2, value("bf16", 0, bf16(0x7FC0)), "not finite"),
    refused_value("bf16 Inf", 2, value("bf16", 0, bf16(0xFF80)), "not finite"),
    refused_value("bf16 padding", 2, value("bf16", 47, b"\x80"), "padding"),
    refused_value("int8 scale NaN", 3, value("int8", 0, f16(NAN)), "scale"),
    refused_value("int8 scale Inf", 3, value("int8", 0, f16(INF)), "scale"),
    refused_value("int8 scale negative", 3, value("int8", 0, f16(-1)), "scale"),
    refused_value("int8 scale -0", 3, value("int8", 0, f16(-0.0)), "scale"),
    refused_value("int8 scale padding", 3, value("int8", 2, b"\1"), "padding"),
    refused_value("int8 code -128", 3, value("int8", 4, b"\x80"), "-128"),
    refused_value("int8 code padding", 3, value("int8", 27, b"\1"), "padding"),
    refused_value("nf4 absmax NaN", 4, value("nf4", 0, f32(NAN)), "absmax"),
    refused_value("nf4 absmax Inf", 4, value("nf4", 0, f32(INF)), "absmax"),
    refused_value("nf4 absmax negative", 4, value("nf4", 0, f32(-1.0)), "absmax"),
    refused_value("nf4 absmax -0", 4, value("nf4", 0, f32(-0.0)), "absmax"),
    refused_value("nf4 tail nibble", 4, value("nf4", 4 + 11, b"\x01"), "padding"),
    refused_value("int4 absmax -Inf", 5, value("int4", 0, f32(-INF)), "absmax"),
    refused_value("int4 code 0 high", 5, value("int4", 4, b"\x08"), "code 0"),
    refused_value("int4 code 0 low", 5, value("int4", 4, b"\x80"), "code 0"),
    refused_value("svd scale NaN", 6, value("svd", 0, f16(NAN)), "scale"),
    refused_value("svd code -128", 6, value("svd", 4, b"\x80"), "-128"),
    refused_value("svd padding", 6, value("svd", 7, b"\x01"), "padding"),
]


def padding_before_crc(path: Path) -> None:
    edit_record(path, SLOT, lambda record: record.__setitem__(START["svd"] + 8, 1))
    refresh(path)


def crc_wrong(path: Path) -> None:
    (shard,) = (path / "tables").glob("records-*")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refresh(path)


def slots(change: Callable[[np.ndarray], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        file = path / "tables" / "slots.safetensors"
        array = np.frombuffer(file.read_bytes()[-160:], "<u4").copy()
        change(array)
        file.write_bytes(tensor_bytes({"slots": ("U32", [40], array.tobytes())}))
        refresh(path)

    return damage


def basis(number: float) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        array = np.ones((3, 23), np.float16)
        array[2, 5] = number
        (path / "tables" / "bases.safetensors").write_bytes(
            tensor_bytes({"layer.6.basis": ("F16", [3, 23], array.tobytes())})
        )
        refresh(path)

    return damage


def one_to_one(name: str, change: Callable[[np.ndarray], object]) -> Case:
    return Case(name, slots(change), ("slots", "one-to-one"), at_open=False)


TABLES = [
    Case("padding before the CRC", padding_before_crc, ("padding", "CRC"), at_open=False),
    Case("CRC wrong", crc_wrong, ("slot 39", "CRC-32"), at_open=False),
    one_to_one("slot twice", lambda a: a.__setitem__(0, a[1])),
    one_to_one("slot beyond the records", lambda a: a.__setitem__(0, 40)),
    one_to_one("slot 2^31", lambda a: a.__setitem__(0, 1 << 31)),
    one_to_one("a token without a slot", lambda a: a.__setitem__(0, 0xFFFFFFFF)),
    one_to_one("all slots 0", lambda a: a.fill(0)),
    Case("basis NaN", basis(NAN), ("layer 6", "basis", "NaN"), at_open=False),
    Case("basis Inf", basis(INF), ("layer 6", "basis", "NaN or inf"), at_open=False),
    Case("basis -Inf", basis(-INF), ("layer 6", "basis", "NaN or inf"), at_open=False),
]


def root_file(name: str, data: bytes) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        (path / name).write_bytes(data)
        refresh(path)

    return damage


def tokenizer(document: object, *, digest: str | None = None) -> Callable[[Path], object]:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()

    def damage(path: Path) -> None:
        (path / "tokenizer.json").write_bytes(data)
        refresh(path)
        if digest is not None:
            reseal(path, lambda m: m["sources"].update(tokenizer=digest))

    return damage


def config(data: bytes) -> Callable[[Path], object]:
    """Another config.json, with the source digest of its content where it has one."""

    def damage(path: Path) -> None:
        root_file("config.json", data)(path)
        try:
            digest = json_digest(json.loads(data))
        except (ValueError, RecursionError):
            return
        reseal(path, lambda m: m["sources"].update(config=digest))

    return damage


def model(vocabulary: object, **more: object) -> dict:
    return {"model": {"type": "BPE", "vocab": vocabulary}, **more}


def case(name: str, damage: Callable[[Path], object], *words: str, error: type = DataError) -> Case:
    return Case(name, damage, words, error, at_open=False)


GOOD_WORDS = {f"w{i}": i for i in range(40)}
PARTNERS = [
    case("tokenizer empty", tokenizer(b""), "tokenizer.json", "not JSON"),
    case("tokenizer a list", tokenizer([]), "tokenizer.json", "no model.vocab"),
    case("tokenizer without model", tokenizer({}), "no model.vocab"),
    case("vocab a number", tokenizer(model(7)), "no model.vocab"),
    case("vocab of nulls", tokenizer(model({"a": None})), "no model.vocab"),
    case("vocab of floats", tokenizer(model({"a": 0.5})), "no model.vocab"),
    case("vocab of strings", tokenizer(model({"a": "0"})), "no model.vocab"),
    case("vocab of true", tokenizer(model({"a": True})), "no model.vocab"),
    case("unigram rows empty", tokenizer(model([[], []])), "no model.vocab"),
    case("unigram of numbers", tokenizer(model([1, 2])), "no model.vocab"),
    case("added no objects", tokenizer(model(GOOD_WORDS, added_tokens=["x"])), "no model.vocab"),
    case("added without id", tokenizer(model({}, added_tokens=[{"content": "x"}])), "no model"),
    case("added a dict", tokenizer(model({}, added_tokens={"id": 1})), "no model.vocab"),
    case("two tokens of one id", tokenizer(model({"a": 3, "b": 3})), "id 3", "'a'", "'b'"),
    case(
        "two long tokens of one id",
        tokenizer(model({"a\n" * 9999: 3, "b\n" * 9999: 3})),
        "id 3 has two tokens",
    ),
    case("duplicate token", tokenizer(b'{"model":{"vocab":{"a":0,"a":1}}}'), "duplicate key 'a'"),
    case("tokenizer 100,000 deep", tokenizer(b"[" * 100_000), "nested"),
    case("not UTF-8", tokenizer(b'{"\xff": 1}'), "not UTF-8"),
    case(
        "token beyond V",
        tokenizer(model({**GOOD_WORDS, "more": 40})),
        "token id 40",
        "40 rows",
        error=MismatchError,
    ),
    case(
        "added token beyond V",
        tokenizer(model(GOOD_WORDS, added_tokens=[{"id": 40, "content": "<x>"}])),
        "token id 40",
        error=MismatchError,
    ),
    case(
        "token id negative",
        tokenizer(model({**GOOD_WORDS, "less": -1})),
        "token id -1",
        error=MismatchError,
    ),
    case(
        "permuted",
        tokenizer(model({f"w{39 - i}": i for i in range(40)})),
        "tokenizer.json",
        "not the one",
        error=BundleError,
    ),
    case(
        "tokenizer, no source digest",
        lambda p: reseal(p, lambda m: m["sources"].update(tokenizer=None)),
        "tokenizer.json",
        "disagree",
        error=BundleError,
    ),
    case(
        "source digest, no tokenizer",
        lambda p: ((p / "tokenizer.json").unlink(), refresh(p)),
        "tokenizer.json",
        "disagree",
        error=BundleError,
    ),
    case(
        "config another",
        root_file("config.json", b'{"hidden_size": 24}\n'),
        "config.json",
        "not the one",
        error=BundleError,
    ),
    case("config no JSON", config(b"{nope"), "config.json", "not JSON", error=BundleError),
    case("config empty", config(b""), "config.json", "not JSON", error=BundleError),
    case("config NaN", config(b'{"a": NaN}'), "config.json", "NaN", error=BundleError),
    case("config 100,000 deep", config(b"[" * 100_000), "config.json", "nested", error=BundleError),
    case(
        "config duplicate key", config(b'{"a":1,"a":2}'), "config.json", "duplicate",
        error=BundleError,
    ),
    case("config a list", config(b"[]"), "config.json", "object", error=BundleError),
    case(
        "config of another V",
        config(b'{"hidden_size": 23, "num_hidden_layers": 7, "vocab_size": 41}'),
        "config.json",
        "vocab_size is 41, tol.json says 40",
        error=BundleError,
    ),
    case(
        "config of another D",
        config(b'{"hidden_size": 24, "num_hidden_layers": 7, "vocab_size": 40}'),
        "config.json",
        "hidden_size is 24, tol.json says 23",
        error=BundleError,
    ),
    case(
        "config of another L",
        config(b'{"hidden_size": 23, "num_hidden_layers": 8, "vocab_size": 40}'),
        "config.json",
        "num_hidden_layers is 8, tol.json says 7",
        error=BundleError,
    ),
    case(
        "counts of another V",
        root_file(
            "token_counts.safetensors",
            tensor_bytes({"token_counts": ("U64", [39], bytes(312))}),
        ),
        "token_counts",
        "[39], expected U64 [40]",
        error=BundleError,
    ),
    case(
        "counts of floats",
        root_file(
            "token_counts.safetensors",
            tensor_bytes({"token_counts": ("F64", [40], bytes(320))}),
        ),
        "token_counts",
        "F64 [40]",
        error=BundleError,
    ),
    case(
        "backbone no tensor file",
        root_file("backbone.safetensors", b"PK\3\4 a zip file"),
        "backbone.safetensors",
        "header",
        error=BundleError,
    ),
]  # fmt: skip


@params(VALUES)
def test_codec_values(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


@params(TABLES)
def test_other_tables(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


@params(PARTNERS)
def test_tokenizer_config_counts(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


VALID_TOKENIZERS = {
    "unigram": model([[f"w{i}", -1.5 * i] for i in range(40)]),
    "gaps": model({"a": 0, "b": 39}),
    "added token named as in the vocabulary": model(
        GOOD_WORDS, added_tokens=[{"id": 3, "content": "w3"}]
    ),
    "added_tokens null": model(GOOD_WORDS, added_tokens=None),
    "odd tokens": model({"": 0, "\n": 1, "\u202e": 2, "\ud800": 3, "\0": 4}),
    "empty vocabulary": model({}),
}


@pytest.mark.parametrize("name", VALID_TOKENIZERS)
def test_valid_tokenizers(name: str, tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol")
    data = json.dumps(VALID_TOKENIZERS[name]).encode()
    tokenizer(data, digest=tokenizer_digest(data, 40))(nano.path)
    verify(nano.path)


def test_tokenizer_digest_is_of_the_vocabulary_in_id_order() -> None:
    words = [(f"w{i}", i) for i in range(40)]
    first = tokenizer_digest(json.dumps(model(dict(words))).encode(), 40)
    turned = tokenizer_digest(json.dumps(model(dict(reversed(words)))).encode(), 40)
    unigram = tokenizer_digest(json.dumps(model([[w, 0.0] for w, _ in words])).encode(), 40)
    assert first == turned == unigram
    padded = tokenizer_digest(json.dumps(model(dict(words))).encode(), 41)
    renamed = tokenizer_digest(json.dumps(model({**dict(words), "w40": 40})).encode(), 41)
    assert len({first, padded, renamed, tokenizer_digest(nano_tokenizer(40), 40)}) == 4


def test_zero_scales_are_legal(good: Path, tmp_path: Path) -> None:
    """A row of zeros: scale 0, codes 0."""
    nano = write_nano(tmp_path / "b.tol", CODECS, hidden_size=23)
    edit_record(nano.path, SLOT, lambda r: r.__setitem__(slice(0, 232), bytes(232)))
    refresh(nano.path)
    verify(nano.path)
    assert nano.slot_of_token_V is not None
    token = int(np.flatnonzero(nano.slot_of_token_V == SLOT)[0])
    assert not open_bundle(nano.path).rows([token])[0, :5].any()


def test_the_corpus_is_as_large_as_planned() -> None:
    assert len(VALUES) >= 25 and len(PARTNERS) >= 10
