"""Sound files of illegal content beside the tables: tokenizer, config, counts, backbone.

Every digest is made to fit, so only looking at the content itself can find these.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from _hostile import Case, params, run_case, with_file
from _nano import RAW_F32, nano_tokenizer, refresh, reseal, tensor_bytes, write_nano

from tolkit_formats import verify
from tolkit_formats.digests import json_digest, tokenizer_digest
from tolkit_formats.errors import BundleError, DataError, MismatchError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V 40, L 7, D 23."""
    path = tmp_path_factory.mktemp("good") / "g.tol"
    return write_nano(path, [RAW_F32] * 7, hidden_size=23).path


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
        with_file("config.json", data)(path)
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
        with_file("config.json", b'{"hidden_size": 24}\n'),
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
        with_file(
            "token_counts.safetensors",
            tensor_bytes({"token_counts": ("U64", [39], bytes(312))}),
        ),
        "token_counts",
        "[39], expected U64 [40]",
        error=BundleError,
    ),
    case(
        "counts of floats",
        with_file(
            "token_counts.safetensors",
            tensor_bytes({"token_counts": ("F64", [40], bytes(320))}),
        ),
        "token_counts",
        "F64 [40]",
        error=BundleError,
    ),
    case(
        "backbone no tensor file",
        with_file("backbone.safetensors", b"PK\3\4 a zip file"),
        "backbone.safetensors",
        "header",
        error=BundleError,
    ),
]  # fmt: skip


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


def test_the_corpus_is_as_large_as_planned() -> None:
    assert len(PARTNERS) >= 10
