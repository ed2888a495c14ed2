"""lm-evaluation-harness on checkpoints and bundles, against likelihoods worked out by hand."""

from __future__ import annotations

import json
import math
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _hf import both_forms, naive_greedy
from _pico import pico_checkpoint

from tolkit.data import Tokenizer
from tolkit.errors import CheckpointError, DataError, ResourceError, UsageError
from tolkit.evaluate.lm_eval import run_lm_eval
from tolkit.evaluate.lm_eval.result import parse_results
from tolkit.model import Decoder, load_checkpoint
from tolkit.progress import SilentProgress

DOCUMENTS = [
    {"q": "The sky is", "choices": ["blue", "green"], "gold": 0},
    {"q": "Grass: ", "choices": ["red", "a deep green"], "gold": 1},
    {"q": "One", "choices": ["two", "one", "3"], "gold": 2},
    {"q": "A longer line\nand", "choices": ["or", "not"], "gold": 1},
    {"q": "x", "choices": ["y", "zzzz"], "gold": 0},
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
metadata: {{version: 2.0}}
"""
CHOICE = """task: pico_choice
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """task: pico_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""
GENERATE = """task: pico_generate
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(autouse=True)
def harness() -> None:
    for name in ("transformers", "lm_eval", "accelerate"):
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    dense = pico_checkpoint(folder / "dense", "dense")
    return {**both_forms(folder), "dense": dense}


def write_tasks(folder: Path, *tasks: str, documents: Any = DOCUMENTS) -> Path:
    folder.mkdir(exist_ok=True)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = COMMON.format(data=data, cache=folder / "cache")
    for i, task in enumerate(tasks):
        (folder / f"task{i}.yaml").write_text(task + common)
    return folder


def run(path: Path, tasks: list[str], folder: Path, **options: Any) -> Any:
    options = {"progress": SilentProgress(), "batch_size": 2, "device": "cpu", **options}
    return run_lm_eval(path, tasks, include_path=folder, **options)


@torch.no_grad()
def log_likelihood(model: Decoder, context: list[int], continuation: list[int]) -> float:
    ids = context + continuation
    scores = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    first = len(context)
    return sum(float(scores[i - 1, ids[i]]) for i in range(first, len(ids)))


def oracle(path: Path) -> tuple[Decoder, Tokenizer]:
    return load_checkpoint(path), Tokenizer.load(path)


forms = pytest.mark.parametrize("form", ["checkpoint", "bundle", "dense"])


@forms
def test_choices_by_likelihood(paths: dict[str, Path], form: str, tmp_path: Path) -> None:
    model, tokenizer = oracle(paths["dense" if form == "dense" else "checkpoint"])
    right = right_by_length = 0
    for document in DOCUMENTS:
        context = tokenizer.encode(document["q"].rstrip())
        spaces = document["q"][len(document["q"].rstrip()) :]
        scores = [
            log_likelihood(model, context, tokenizer.encode(f"{spaces} {choice}"))
            for choice in document["choices"]
        ]
        per_letter = [s / len(c) for s, c in zip(scores, document["choices"], strict=True)]
        right += int(np.argmax(scores)) == document["gold"]
        right_by_length += int(np.argmax(per_letter)) == document["gold"]
    result = run(paths[form], ["pico_choice"], write_tasks(tmp_path / "tasks", CHOICE))
    task = result.tasks["pico_choice"]
    assert task.metrics["acc"].value == right / 5
    assert task.metrics["acc_norm"].value == right_by_length / 5
    share = right / 5
    assert task.metrics["acc"].se == pytest.approx(math.sqrt(share * (1 - share) / 4))
    assert (task.n, task.metrics["acc"].n, task.version, task.num_fewshot) == (5, 5, "2.0", 0)
    assert result.kind == ("bundle" if form == "bundle" else "checkpoint")
    assert (result.prefix_token.id, result.prefix_token.source) == (0, "bos")


def bits_per_byte(model: Decoder, tokenizer: Tokenizer, prefix: int) -> float:
    texts = [document["q"] for document in DOCUMENTS]
    total = sum(log_likelihood(model, [prefix], tokenizer.encode(text)) for text in texts)
    return -total / sum(len(text.encode()) for text in texts) / math.log(2)


@forms
def test_whole_texts_after_the_prefix(paths: dict[str, Path], form: str, tmp_path: Path) -> None:
    model, tokenizer = oracle(paths["dense" if form == "dense" else "checkpoint"])
    folder = write_tasks(tmp_path / "tasks", ROLLING)
    for given, prefix in ((None, 0), (40, 40)):
        result = run(paths[form], ["pico_rolling"], folder, prefix_token_id=given)
        got = result.tasks["pico_rolling"].metrics["bits_per_byte"]
        assert got.value == pytest.approx(bits_per_byte(model, tokenizer, prefix), rel=1e-5)
        assert math.isnan(got.se)
        assert result.prefix_token.id == prefix
    assert result.prefix_token.source == "given"


def answers(model: Decoder, tokenizer: Tokenizer, ends: set[int]) -> list[str]:
    found = []
    for document in DOCUMENTS:
        prompt = tokenizer.encode(document["q"])
        tokens = naive_greedy(model, prompt, 6)[len(prompt) :]
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        found.append(tokenizer.decode(tokens[:stop]))
    return found


@forms
def test_generated_answers(paths: dict[str, Path], form: str, tmp_path: Path) -> None:
    model, tokenizer = oracle(paths["dense" if form == "dense" else "checkpoint"])
    ends = {1, *tokenizer.encode("\n")}
    right = answers(model, tokenizer, ends)
    documents = [
        {**document, "answer": answer if i != 2 else "something else"}
        for i, (document, answer) in enumerate(zip(DOCUMENTS, right, strict=True))
    ]
    folder = write_tasks(tmp_path / "tasks", GENERATE, documents=documents)
    result = run(paths[form], ["pico_generate"], folder)
    assert result.tasks["pico_generate"].metrics["exact_match"].value == 4 / 5


def plain_tokenizer(path: Path) -> Path:
    """Take bos and eos out of a pico checkpoint's tokenizer."""
    (path / "tokenizer_config.json").unlink()
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"] = []
    vocabulary = content["model"]["vocab"]
    vocabulary["~a"], vocabulary["~b"] = vocabulary.pop("<bos>"), vocabulary.pop("<eos>")
    (path / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "bos_token_id": None, "eos_token_id": None})
    )
    return path


def test_a_tokenizer_with_neither_bos_nor_eos(tmp_path: Path) -> None:
    path = plain_tokenizer(pico_checkpoint(tmp_path / "ckpt"))
    model, tokenizer = oracle(path)
    (line_feed,) = tokenizer.encode("\n")
    documents = [
        {**document, "answer": answer}
        for document, answer in zip(DOCUMENTS, answers(model, tokenizer, {line_feed}), strict=True)
    ]
    folder = write_tasks(tmp_path / "tasks", CHOICE, ROLLING, GENERATE, documents=documents)
    progress = SilentProgress()
    result = run(path, ["pico_choice", "pico_rolling", "pico_generate"], folder, progress=progress)
    assert list(result.tasks) == ["pico_choice", "pico_rolling", "pico_generate"]
    (warning,) = progress.warnings
    assert f"after a line feed (token {line_feed})" in warning
    assert vars(result.prefix_token) == {"id": line_feed, "text": "\n", "source": "line feed"}
    rolling = result.tasks["pico_rolling"].metrics["bits_per_byte"].value
    assert rolling == pytest.approx(bits_per_byte(model, tokenizer, line_feed), rel=1e-5)
    assert result.tasks["pico_generate"].metrics["exact_match"].value == 1.0


def test_the_result_as_json(paths: dict[str, Path], tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", ROLLING)
    result = run(paths["bundle"], ["pico_rolling", "pico_rolling"], folder, limit=2, dtype="bf16")
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    task = value["tasks"]["pico_rolling"]
    assert set(task) == {"metrics", "n", "version", "num_fewshot", "config"}
    assert task["metrics"]["bits_per_byte"]["se"] is None
    assert task["n"] == task["metrics"]["bits_per_byte"]["n"] == 2
    assert task["config"]["output_type"] == "loglikelihood_rolling"
    assert (value["kind"], value["device"], value["dtype"]) == ("bundle", "cpu", "bfloat16")
    assert value["config"]["limit"] == 2
    assert set(value["versions"]) == {"lm_eval", "torch", "transformers"}


def test_a_group_counts_the_documents_of_its_parts() -> None:
    results = {
        "results": {
            "part": {"alias": " - part", "acc,none": 0.5, "acc_stderr,none": 0.25},
            "other": {"alias": "other", "em,strict": 1, "em_stderr,strict": "N/A", "odd,none": "x"},
            "all": {"alias": "all", "acc,none": 0.75, "acc_stderr,none": 0.1},
        },
        "group_subtasks": {"all": ["part", "other"], "part": []},
        "n-samples": {
            "part": {"original": 9, "effective": 4},
            "other": {"original": 6, "effective": 6},
        },
        "n-shot": {"part": 3},
        "versions": {"part": 1.0, "all": "N/A"},
        "configs": {"part": {"process": write_tasks}},
    }
    tasks = parse_results(results)
    assert (tasks["part"].n, tasks["other"].n, tasks["all"].n) == (4, 6, 10)
    assert (tasks["all"].metrics["acc"].value, tasks["all"].metrics["acc"].se) == (0.75, 0.1)
    assert list(tasks["other"].metrics) == ["em,strict"]
    assert math.isnan(tasks["other"].metrics["em,strict"].se)
    assert (tasks["part"].version, tasks["all"].version, tasks["part"].num_fewshot) == (
        "1.0",
        None,
        3,
    )
    assert tasks["part"].config == {"process": "write_tasks"}


def test_nothing_is_printed_and_no_seed_is_left(
    paths: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tqdm import tqdm

    folder = write_tasks(tmp_path / "tasks", CHOICE, GENERATE.replace("{{answer}}", "a"))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = tqdm.__init__
    run(paths["bundle"], ["pico_choice", "pico_generate"], folder)
    drawn = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert drawn == (random.random(), np.random.random(), torch.rand(1).item())
    assert tqdm.__init__ is before
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "it/s" not in captured.err and "pretrained" not in captured.err


def test_an_unknown_task_and_names_near_it(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    # Indexing the thousands of tasks that come with the harness takes longer than all else here.
    only_own = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda **kw: only_own(include_path=kw["include_path"])
    )
    folder = write_tasks(tmp_path / "tasks", CHOICE)
    with pytest.raises(UsageError, match=r"task 'pico_choise': .*close names are pico_choice"):
        run(paths["bundle"], ["pico_choise"], folder)


@pytest.mark.parametrize(("task", "error", "problem"), [
    (CHOICE.replace("{{q}}", "{{q"), DataError, "task pico_choice: lm-eval cannot run it: "),
    (GENERATE.replace("max_gen_toks: 6", "max_gen_toks: 64").replace("{{answer}}", "a"),
     DataError, r"task pico_generate: .*must be less than model's maximum"),
    (CHOICE.replace("task: pico_choice", "task: pico_choice\ntraining_split: absent"),
     DataError, "task pico_choice: lm-eval cannot run it: "),
])  # fmt: skip
def test_a_task_that_cannot_run(
    paths: dict[str, Path], tmp_path: Path, task: str, error: type[Exception], problem: str
) -> None:
    folder = write_tasks(tmp_path / "tasks", task)
    name = task.split()[1]
    with pytest.raises(error, match=problem) as caught:
        run(paths["bundle"], [name], folder)
    assert "\n" not in str(caught.value)


def test_a_data_set_that_is_not_there(paths: dict[str, Path], tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", CHOICE)
    (folder / "data.jsonl").unlink()
    with pytest.raises(ResourceError, match="task pico_choice: not to be had here: ") as caught:
        run(paths["bundle"], ["pico_choice"], folder)
    assert "local task files" in caught.value.hint


@pytest.mark.parametrize(("options", "problem"), [
    ({"tasks": []}, "tasks: none given"),
    ({"limit": 0}, "limit: expected a count or a share below 1, got 0"),
    ({"limit": 1.5}, "limit: expected a count or a share below 1, got 1.5"),
    ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ({"include_path": Path("nowhere")}, "nowhere: no such folder"),
    ({"dtype": "int3"}, "dtype: expected float32, bfloat16 or float16"),
    ({"device": "moon"}, "device: expected auto, cpu or cuda"),
    ({"prefix_token_id": 96}, "prefix token: expected an id below 96, got 96"),
])  # fmt: skip
def test_impossible_options(
    paths: dict[str, Path], tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    folder = write_tasks(tmp_path / "tasks", CHOICE)
    values = {"tasks": ["pico_choice"], "include_path": folder, "device": "cpu", **options}
    with pytest.raises(UsageError, match=problem):
        run_lm_eval(paths["bundle"], progress=SilentProgress(), **values)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt")
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer.json, text cannot be scored"):
        run(path, ["pico_choice"], write_tasks(tmp_path / "tasks", CHOICE))


@pytest.mark.parametrize("name", ["lm_eval", "accelerate"])
def test_without_the_extra(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    problem = rf"tolkit\[lm-eval\] is not installed \({name} is missing\)"
    with pytest.raises(ResourceError, match=problem) as caught:
        run_lm_eval(paths["bundle"], ["pico_choice"])
    assert caught.value.hint == "pip install 'tolkit[lm-eval]'"
