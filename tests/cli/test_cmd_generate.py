"""tol generate: text on stdout, figures on stderr, results in files and JSON, mistakes named."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _cli import run
from _hf import both_forms
from _nano import fault_hook
from _pico import pico_checkpoint

from tolkit.runtime import GenerateSpec, load_session
from tolkit_cli._output import Output
from tolkit_cli.main import main
from tolkit_formats import open_bundle

PROMPT = "a table of words"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    both_forms(folder)
    return folder


@pytest.fixture(scope="module")
def texts(work: Path) -> dict[str, str]:
    """What the library gives for 12 tokens, the end of text ignored."""
    prompts = [PROMPT, "and another"]
    spec = GenerateSpec(max_new_tokens=12, ignore_eos=True)
    results = load_session(work / "ckpt", device="cpu").generate(prompts, spec)
    return {prompt: result.text for prompt, result in zip(prompts, results, strict=True)}


def generate(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of `tol generate`, on the CPU, 12 tokens."""
    common = ("--max-new-tokens", 12, "--ignore-eos", "--device", "cpu")
    return run(capsys, "generate", *words, *common, code=code)


@pytest.mark.parametrize("model", ["ckpt", "full.tol"])
def test_one_prompts_text_is_all_of_stdout(
    work: Path, texts: dict[str, str], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = generate(capsys, work / model, "-p", PROMPT)
    assert out == texts[PROMPT] + "\n"
    assert "16 prompt tokens" in err
    assert "12 new tokens" in err
    assert "ms a step" in err
    assert ("of tables read a token" in err) == (model == "full.tol")
    quiet = generate(capsys, work / model, "-p", PROMPT, "-q")
    assert quiet == (texts[PROMPT] + "\n", "")


@pytest.mark.parametrize("tables", ["disk", "host", "device"])
def test_tables_come_from_where_they_are_asked_for(
    work: Path, texts: dict[str, str], tables: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = generate(capsys, work / "full.tol", "-p", PROMPT, "--tables", tables)
    assert out == texts[PROMPT] + "\n"


def test_text_comes_as_it_is_made(
    work: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(Output, "stream", lambda self, text: pieces.append(text))
    words = ["generate", work / "ckpt", "-p", PROMPT, "--max-new-tokens", 12, "--ignore-eos"]
    assert main([*map(str, words), "--device", "cpu", "-q"]) == 0
    assert pieces == [*texts[PROMPT], "\n"]


def test_several_prompts_are_a_table(
    work: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [part for prompt in texts for part in ("-p", prompt)]
    out, _ = generate(capsys, work / "ckpt", *words, "--batch", 1)
    head, *rows = out.splitlines()
    assert head == "index\tfinish\tnew_tokens\ttext"
    for number, (row, text) in enumerate(zip(rows, texts.values(), strict=True)):
        assert row == f"{number}\tlength\t12\t{json.dumps(text)}"
    out, _ = generate(capsys, work / "ckpt", *words, "--format", "human")
    for number, (prompt, text) in enumerate(texts.items(), start=1):
        assert f"[{number}/2] {prompt}\n" in out
        assert text in out


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_prompts_from_a_file_and_results_to_one(
    work: Path,
    texts: dict[str, str],
    suffix: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = list(texts)
    if suffix == ".jsonl":
        lines = [json.dumps({"prompt": prompt, "id": 3}) for prompt in texts]
    (tmp_path / f"p{suffix}").write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    results = tmp_path / "r.jsonl"
    command = (work / "full.tol", "--prompts", tmp_path / f"p{suffix}", "-o", results)
    out, _ = generate(capsys, *command)
    assert out == f"results\t{results}\nprompts\t2\n"
    written = [json.loads(line) for line in results.read_text().splitlines()]
    assert {record["prompt"]: record["text"] for record in written} == texts
    assert [record["index"] for record in written] == [0, 1]
    assert [record["new_tokens"] for record in written] == [12, 12]
    before = results.read_bytes()
    _, err = generate(capsys, *command, code=2)
    assert "already exists" in err
    generate(capsys, *command, "--force", "--top-k", 50, "--temperature", 3)
    assert results.read_bytes() != before


def test_prompts_from_standard_input(
    work: Path,
    texts: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    out, _ = generate(capsys, work / "ckpt", "--prompts", "-")
    assert out == texts[PROMPT] + "\n"


def test_json_holds_texts_and_figures(
    work: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = generate(capsys, work / "full.tol", "-p", PROMPT, "--json")
    result: dict[str, Any] = json.loads(out)
    assert err == ""
    (generation,) = result["outputs"]["generations"]
    assert generation["text"] == texts[PROMPT]
    assert generation["finish"] == "length"
    metrics = result["metrics"]
    assert (metrics["prompt_tokens"], metrics["new_tokens"], metrics["steps"]) == (16, 12, 11)
    assert metrics["ms_per_token"] > 0
    assert metrics["tables"]["rows_asked"] > 11
    assert result["inputs"]["spec"]["max_new_tokens"] == 12


def test_sampling_is_repeatable(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampled = [
        generate(
            capsys, work / "ckpt", "-p", PROMPT, "--top-p", 0.99, "--temperature", 2, "--seed", s
        )
        for s in (1, 1, 2)
    ]
    first, again, other = (out for out, _ in sampled)
    assert first == again
    assert first != other


def test_a_reader_that_leaves_ends_the_work(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Output, "stdout_closed", property(lambda self: True))
    out, err = generate(capsys, work / "ckpt", "-p", PROMPT)
    assert len(out) == 1
    assert "1 new token" in err


def test_control_characters_do_not_reach_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Output(mode="human").stream("a\x1b[2Jb\n\tc\x9b")
    assert capsys.readouterr().out == "a\\x1b[2Jb\n\tc\\x9b"
    Output(mode="plain").stream("a\x1b")
    assert capsys.readouterr().out == "a\x1b"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "--prompt: there is none"),
        (["-p", "x", "--top-p", "1.5"], 2, "--top-p: expected above 0"),
        (["-p", "x", "--stop", ""], 2, "--stop: an empty text"),
        (["-p", "x", "--tables", "tape"], 2, "--tables: 'tape' is not one of"),
        (["-p", "x", "--context", "999"], 2, "--context: expected at most the model's 64"),
        (["-p", "x" * 64], 2, "prompt 0: has 64 tokens"),
        (["-p", "x" * 60], 2, "--max-new-tokens: 12 and the 60 tokens"),
        (["-p", "x", "--max-table-memory", "much"], 2, "--max-table-memory: 'much' is not a size"),
        (["-p", "x", "--max-table-memory", "10"], 2, ""),
        (["--prompts", "none.txt"], 4, "none.txt: no such file"),
        (["-p", "x", "-o", "no/where.jsonl"], 2, "--out: "),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_mistakes_are_named(
    work: Path,
    options: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, err = generate(capsys, work / "full.tol", *options, code=code)
    assert out == ""
    assert err.startswith(f"error: {message}")


def test_tables_of_a_checkpoint_are_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = generate(capsys, work / "ckpt", "-p", "x", "--tables", "disk", code=2)
    assert "is a checkpoint, which computes its rows" in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"caf\xe9\n", "not UTF-8"),
        (
            "p.jsonl",
            b'{"text": "a"}\n',
            "p.jsonl:1: expected an object with a string",
        ),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "p.jsonl:2: not a JSON object"),
    ],
)
def test_prompt_files_that_are_none(
    work: Path,
    tmp_path: Path,
    name: str,
    content: bytes,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    _, err = generate(capsys, work / "ckpt", "--prompts", tmp_path / name, code=4)
    assert message in err


def test_a_disk_that_fails_is_named_and_no_garbage_follows(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stride = open_bundle(work / "full.tol").manifest.tiers[0].stride
    reads, most = 0, 1 << 60

    def fail(operation: str, path: str) -> None:
        nonlocal reads
        reads += operation == "pread"
        if reads > most:
            raise OSError(errno.EIO, "Input/output error", path)

    command = (work / "full.tol", "-p", PROMPT, "--temperature", 5, "--max-table-memory")
    with fault_hook(fail):
        whole, _ = generate(capsys, *command, 4 * stride)
        reads, most = 0, reads - 3
        out, err = generate(capsys, *command, 4 * stride, code=6)
    assert 1 < len(out) < len(whole)
    assert whole.startswith(out)
    assert "input/output error" in err
    assert "records-" in err


def test_bytes_that_are_no_text_are_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = generate(capsys, work / "ckpt", "-p", "caf\udce9", code=2)
    assert err.startswith("error: prompt 0: not UTF-8 text (character 3)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_the_environments_fault(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(work / "ckpt"), "-p", "x", "--device", "cuda"]) == 6
    assert "cuda is not here" in capsys.readouterr().err


def test_a_dense_checkpoint_runs_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pico_checkpoint(tmp_path / "dense", "dense")
    out, _ = generate(capsys, tmp_path / "dense", "-p", PROMPT)
    session = load_session(tmp_path / "dense", device="cpu")
    spec = GenerateSpec(max_new_tokens=12, ignore_eos=True)
    assert out == "".join(session.stream(PROMPT, spec)) + "\n"
