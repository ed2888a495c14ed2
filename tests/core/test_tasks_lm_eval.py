"""Tasks against the real lm-evaluation-harness: texts, log-likelihoods, choices, metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from _eval_fakes import pico_tokenizer
from _lm_eval import check_equal, compare, judge, task_of
from _pico import pico_checkpoint, pico_config, pico_model
from _task_rows import ROWS, write_rows

from tolkit.compress import CompressSpec, compress
from tolkit.data import Document, Tokenizer
from tolkit.evaluate.tasks import evaluate_tasks, find_tasks, load_task
from tolkit.model import Decoder, save_checkpoint
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable

transformers = pytest.importorskip("transformers")

SHARED = Path(__file__).parents[3] / "shared" / "data"


def transformers_model(kind: str, path: Path) -> Any:
    """The checkpoint behind transformers' interface."""
    if kind == "dense":
        return transformers.LlamaForCausalLM.from_pretrained(path)
    hf = pytest.importorskip("tolkit.hf", reason="needs the extra hf")
    hf.register()
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def set_config(path: Path, **changes: object) -> None:
    """Change tokenizer_config.json."""
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


KINDS = ("dense", "memory")


@pytest.mark.parametrize("kind", [*KINDS, "bundle"])
def test_equal_to_the_harness(tmp_path: Path, kind: str) -> None:
    architecture = "memory" if kind == "bundle" else kind
    path = pico_checkpoint(tmp_path / kind, architecture, max_position_embeddings=256)
    if kind == "bundle":
        checkpoint, path = path, tmp_path / "small.tol"
        compress(checkpoint, path, CompressSpec(codec="nf4"), progress=SilentProgress())
    found = compare(
        load_runnable(path),
        transformers_model(kind, path),
        transformers.AutoTokenizer.from_pretrained(path),
        write_rows(tmp_path / "data"),
        ROWS,
    )
    assert set(found) == set(ROWS)
    assert all(result.conditions.truncated == 0 for result, _, _ in found.values())


@pytest.mark.parametrize("length", [30, 48])
def test_long_texts_are_cut_on_the_left(tmp_path: Path, length: int) -> None:
    path = pico_checkpoint(tmp_path / "dense", "dense", max_position_embeddings=length)
    names = ("siqa", "arc_easy", "hellaswag", "boolq", "piqa", "wikitext")
    rows = {name: ROWS[name] for name in names}
    found = compare(
        load_runnable(path),
        transformers_model("dense", path),
        transformers.AutoTokenizer.from_pretrained(path),
        write_rows(tmp_path / "data", rows),
        rows,
    )
    assert found["siqa"][0].conditions.truncated > 0
    assert found["siqa"][0].conditions.window_length == length


@pytest.mark.parametrize("prefix_id", [5, 69])
def test_without_special_tokens_given_a_prefix(tmp_path: Path, prefix_id: int) -> None:
    """The harness needs to be told a token then (69 is the "c" of "cat", 5 a sign)."""
    path = pico_checkpoint(tmp_path / "dense", "dense", max_position_embeddings=256)
    set_config(path, bos_token=None, eos_token=None, tokenizer_class="PreTrainedTokenizerFast")
    drop_special_tokens(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer.bos_token_id is None and tokenizer.eos_token_id is None
    rows = {**ROWS, "lambada": [*ROWS["lambada"], {"text": "who"}]}
    found = compare(
        load_runnable(path),
        transformers_model("dense", path),
        tokenizer,
        write_rows(tmp_path / "data", rows),
        rows,
        prefix_token_id=prefix_id,
    )
    assert {result.conditions.prefix_id for result, _, _ in found.values()} == {prefix_id}


def test_without_special_tokens_nothing_is_needed_after_a_context(tmp_path: Path) -> None:
    """Where a context is there, ours needs no prefix and equals the harness under any."""
    path = pico_checkpoint(tmp_path / "dense", "dense", max_position_embeddings=256)
    set_config(path, bos_token=None, eos_token=None)
    drop_special_tokens(path)
    rows = {name: ROWS[name] for name in ROWS if name not in ("wikitext", "lambada")}
    rows["lambada"] = ROWS["lambada"][:3]
    files = write_rows(tmp_path / "data", rows)
    runnable = load_runnable(path)
    data = [load_task(name, file) for name, file in files.items()]
    (results,) = evaluate_tasks([runnable], None, data, progress=SilentProgress())
    judged = judge(
        transformers_model("dense", path),
        transformers.AutoTokenizer.from_pretrained(path),
        {name: task_of(name, rows[name]) for name in rows},
        prefix_token_id=7,
    )
    for result, task in zip(results, data, strict=True):
        assert result.conditions.prefix_id is None
        check_equal(result, task.items, judged[task.name])


def drop_special_tokens(path: Path) -> None:
    """Make <bos> and <eos> ordinary entries of the vocabulary."""
    file = path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "added_tokens": []}))


def add_post_processor(path: Path) -> None:
    """What Llama 3's tokenizer.json has: bos in front of every text."""
    core = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    core.save(str(path / "tokenizer.json"))


@pytest.mark.parametrize("post_processor", [False, True])
@pytest.mark.parametrize(("config", "prefix"), [
    ({}, 0),
    ({"bos_token": None}, 1),
    ({"add_bos_token": True}, 0),
    ({"add_bos_token": False, "add_eos_token": True}, 0),
])  # fmt: skip
def test_tokens_the_tokenizer_adds(
    tmp_path: Path, config: dict[str, object], prefix: int, post_processor: bool
) -> None:
    path = pico_checkpoint(tmp_path / "dense", "dense", max_position_embeddings=256)
    set_config(path, **config)
    if post_processor:
        add_post_processor(path)
    rows = {
        "lambada": [*ROWS["lambada"], {"text": "<bos>who are <eos>you"}, {"text": "<eos>a cat"}],
        "winogrande": ROWS["winogrande"],
        "boolq": ROWS["boolq"],
        "wikitext": [*ROWS["wikitext"], {"page": "<bos> a cat <eos> sat"}],
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    found = compare(
        load_runnable(path),
        transformers_model("dense", path),
        tokenizer,
        write_rows(tmp_path / "data", rows),
        rows,
    )
    assert {result.conditions.prefix_id for result, _, _ in found.values()} == {prefix}


def taught(
    model: Decoder, ids: list[int], steps: int, length: int = 64, rate: float = 1e-2
) -> None:
    """A few steps of training on `ids`, enough to expect likely tokens; changes `model`."""
    pieces = torch.tensor(ids[: len(ids) // (length + 1) * (length + 1)]).view(-1, length + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        batch = pieces[(torch.arange(8) + 8 * step) % len(pieces)]
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_words_the_model_would_write(tmp_path: Path, kind: str) -> None:
    model, tokenizer = pico_model(kind, max_position_embeddings=256), pico_tokenizer()
    taught(model, tokenizer.encode("the cat sat on a mat, so " * 60), steps=80, length=48)
    save_checkpoint(model, tmp_path / kind, tokenizer.files())
    endings = ["the cat sat on", "so the cat", "a mat, so the", "the cat dat", "mat, so"]
    rows = {"lambada": [{"text": f"the cat sat on a mat, {ending}"} for ending in endings]}
    found = compare(
        load_runnable(tmp_path / kind),
        transformers_model(kind, tmp_path / kind),
        transformers.AutoTokenizer.from_pretrained(tmp_path / kind),
        write_rows(tmp_path / "data", rows),
        rows,
    )
    result, _, _ = found["lambada"]
    assert 0 < result.metrics["acc"].value < 1


FEW = 200
SPLITS = {"lambada": "test", "arc_easy": "test", "hellaswag": "val", "piqa": "valid"}
SPLITS |= {"siqa": "dev", "winogrande": "dev", "boolq": "dev", "openbookqa": "validation"}
# These rows were cleaned when they were collected.
CLEANED = {
    "process_docs": None,
    "doc_to_text": "{{activity_label}}: {{ctx}}",
    "doc_to_choice": "endings",
}


def shared_rows(name: str) -> list[dict[str, Any]]:
    """The first rows of a task under shared data, in the form of the harness' data set."""
    folder = SHARED / "tasks" / name
    lines = (folder / f"{SPLITS[name]}.jsonl").read_text().splitlines()[:FEW]
    rows = [json.loads(line) for line in lines]
    if name == "piqa":
        labels = (folder / "valid-labels.lst").read_text().split()
        return [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=False)]
    if name == "boolq":
        return [{**row, "label": int(row["answer"])} for row in rows]
    return rows


def shared_pages() -> list[dict[str, Any]]:
    """Articles of WikiText-2, from one title line to the next."""
    text = (SHARED / "wikitext-2" / "valid.txt").read_text()
    starts = [match.start() for match in re.finditer(r"(?m)^ = [^=\n]+ = $", text)]
    ends = [*(start - 1 for start in starts[1:]), len(text)]
    return [{"page": text[start:end]} for start, end in zip(starts, ends, strict=True)]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no task files beside the project")
@pytest.mark.parametrize("kind", KINDS)
def test_equal_on_real_items(tmp_path: Path, kind: str) -> None:
    text = (SHARED / "wikitext-2" / "train.head1MB.raw.txt").read_text()[:300_000]
    tokenizer = Tokenizer.train([Document("wiki", text)], 2048)
    shape = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512}
    path = tmp_path / kind
    torch.manual_seed(0)
    model = Decoder(pico_config(kind, **shape))
    taught(model, tokenizer.encode(text[:60_000]), steps=60, rate=2e-3)
    save_checkpoint(model, path, tokenizer.files())
    rows = {name: shared_rows(name) for name in SPLITS}
    rows["wikitext"] = shared_pages()[:12]
    files = write_rows(tmp_path / "data", rows)
    found = compare(
        load_runnable(path),
        transformers_model(kind, path),
        transformers.AutoTokenizer.from_pretrained(path),
        files,
        rows,
        {"hellaswag": CLEANED},
        batch_size=16,
    )
    for name, (result, _, _) in found.items():
        assert result.n == len(rows[name])


@pytest.mark.skipif(not SHARED.is_dir(), reason="no task files beside the project")
def test_files_as_they_lie_there_give_the_same_items(tmp_path: Path) -> None:
    """piqa's labels beside, boolq's answers, wikitext's headings: found and read by name."""
    own = write_rows(tmp_path, {name: shared_rows(name) for name in SPLITS})
    for task in find_tasks(list(SPLITS), SHARED / "tasks", limit=FEW):
        assert task.digest == load_task(task.name, own[task.name]).digest
    ours = load_task("wikitext", SHARED / "wikitext-2" / "valid.txt")
    pages = write_rows(tmp_path, {"wikitext": shared_pages()})["wikitext"]
    assert ours.digest == load_task("wikitext", pages).digest
    assert len(ours.items) == 60


TOKENIZERS = sorted(path.parent for path in SHARED.glob("tokenizers/*/tokenizer.json"))


@pytest.mark.skipif(not TOKENIZERS, reason="no tokenizers beside the project")
@pytest.mark.parametrize("folder", TOKENIZERS, ids=lambda folder: folder.name)
def test_tokenizers_mark_as_transformers_does(folder: Path) -> None:
    file = str(folder / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    ours = Tokenizer.load(folder)
    texts = ["", " ", "a", " a", "Q: <s>x</s> <unk>\nA:", "<|endoftext|> b<|endoftext|>", "\n\nÄ 7"]
    texts += [row["text"] for row in shared_rows("lambada")[:40]]
    for add_special in (True, False):
        expected = [theirs.encode(text, add_special_tokens=add_special) for text in texts]
        assert ours.encode_batch_marked(texts, add_special=add_special) == expected
    assert ours.encode_batch_marked(texts[4:6], add_special=False) != ours.encode_batch(texts[4:6])
