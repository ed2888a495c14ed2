"""Tokenizers: trained here, or read from Hugging Face files."""

import json
from pathlib import Path

import pytest

from tolkit.data import Document, Tokenizer
from tolkit.errors import DataError, UsageError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
CORPUS = [Document("a", "the cat sat on the mat, the cats ate those rats then\n" * 30)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(CORPUS, 280)


def save(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "text", ["the cat", "  \n\t\f x", "Ünïcödé \U0001f600 \u2028", "<eos><bos>", "\x00\x7f", ""]
)
def test_any_text_comes_back(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(0 <= i < trained.vocab_size for i in ids)
    assert trained.bos_id not in ids and trained.eos_id not in ids


def test_batches_equal_single_texts(trained: Tokenizer) -> None:
    texts = ["the cat", "", "a rat <eos>", "é"]
    assert trained.encode_batch(texts) == [trained.encode(t) for t in texts]


def test_training_merges_frequent_text_and_is_repeatable(trained: Tokenizer) -> None:
    assert trained.vocab_size == 280
    assert (trained.bos_id, trained.eos_id) == (0, 1)
    assert len(trained.encode(" the")) == 1
    again = Tokenizer.train(CORPUS, 280)
    assert again.files() == trained.files() and again.digest == trained.digest


def test_short_text_gives_fewer_ids_than_asked() -> None:
    assert Tokenizer.train([Document("a", "abab")], 4096).vocab_size < 300


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"vocab_size: at least 258 .* got 257"):
        Tokenizer.train(CORPUS, 257)


def test_files_round_trip_byte_for_byte(trained: Tokenizer, tmp_path: Path) -> None:
    folder = save(trained, tmp_path / "t")
    for source in (folder, folder / "tokenizer.json"):
        loaded = Tokenizer.load(source)
        assert loaded.files() == trained.files()
        assert (loaded.bos_id, loaded.eos_id) == (0, 1)
        assert loaded.digest == trained.digest


def test_the_config_names_bos_and_eos(trained: Tokenizer, tmp_path: Path) -> None:
    folder = save(
        trained, tmp_path / "t", bos_token=None, eos_token={"content": "a"}, model_max_length=10**30
    )
    loaded = Tokenizer.load(folder)
    assert loaded.bos_id is None
    assert loaded.decode([loaded.eos_id or -1]) == "a"


def test_without_a_config_only_special_tokens_count(tmp_path: Path) -> None:
    # "</s>" is an ordinary token here, as markup in a corpus makes it; it must not become eos.
    folder = save(Tokenizer.train(CORPUS, 270), tmp_path / "t")
    (folder / "tokenizer_config.json").unlink()
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"] = []
    document["model"]["vocab"]["</s>"] = 270
    (folder / "tokenizer.json").write_text(json.dumps(document))
    loaded = Tokenizer.load(folder)
    assert (loaded.bos_id, loaded.eos_id) == (None, None)
    assert "eos_token" not in json.loads(loaded.files()["tokenizer_config.json"])


def test_truncation_and_padding_of_a_file_are_ignored(trained: Tokenizer, tmp_path: Path) -> None:
    folder = save(trained, tmp_path / "t")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    text = "the cat sat on the mat"
    assert Tokenizer.load(folder).decode(Tokenizer.load(folder).encode(text)) == text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizers file"),
        ("tokenizer.json", b"\xff", "tokenizer.json: not a tokenizers file"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: expected a JSON object"),
        ("tokenizer_config.json", b'{"eos_token": "<nope>"}', "names eos_token '<nope>'"),
    ],
)
def test_damaged_files(
    trained: Tokenizer, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    folder = save(trained, tmp_path / "t")
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        Tokenizer.load(folder)
    assert said in caught.value.message


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json here"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "vocab_size", "hello", "eos"),
    [
        ("dolma2-100k", 100_278, [9906, 1917], 100_257),
        ("gpt-neox-20b", 50_277, [12092, 1533], 0),
        ("gpt2", 50_257, [15496, 995], 50_256),
        ("mistral-v1-32k", 32_000, [22557, 1526], 2),
    ],
)
def test_published_tokenizers(name: str, vocab_size: int, hello: list[int], eos: int) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    tokenizer = Tokenizer.load(SHARED / name)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.encode("Hello world") == hello
    assert tokenizer.eos_id == eos


def test_transformers_reads_what_we_write(trained: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(save(trained, tmp_path / "t"))
    assert loaded.encode("the cat", add_special_tokens=False) == trained.encode("the cat")
    assert (loaded.bos_token_id, loaded.eos_token_id) == (0, 1)
