"""Tasks against the real lm-evaluation-harness: texts, log-likelihoods, choices, metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from _lm_eval import compare, judge, largest_difference, task_of
from _pico import pico_checkpoint
from _task_rows import ROWS, write_rows

from tolkit.evaluate.tasks import evaluate_tasks, load_task
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable

transformers = pytest.importorskip("transformers")

CLOSE = 1e-4


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


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_harness(tmp_path: Path, kind: str) -> None:
    path = pico_checkpoint(tmp_path / kind, kind, max_position_embeddings=256)
    found = compare(
        load_runnable(path),
        transformers_model(kind, path),
        transformers.AutoTokenizer.from_pretrained(path),
        write_rows(tmp_path / "data"),
        ROWS,
    )
    assert set(found) == set(ROWS)
    assert max(apart for _, _, apart in found.values()) < CLOSE
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
    assert max(apart for _, _, apart in found.values()) < CLOSE
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
    assert max(apart for _, _, apart in found.values()) < CLOSE


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
        assert largest_difference(result, task.items, judged[task.name]) < CLOSE


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
    assert max(apart for _, _, apart in found.values()) < CLOSE
    assert {result.conditions.prefix_id for result, _, _ in found.values()} == {prefix}
