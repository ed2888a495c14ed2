"""Sessions: greedy tokens equal the slow oracle and transformers, alone and in any company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _hf import HF_KINDS, both_forms, naive_greedy
from _pico import PICO_VOCAB, pico_checkpoint, pico_ids, pico_model

from tolkit.compress import CompressSpec, compress
from tolkit.errors import CheckpointError, MismatchError, ResourceError, UsageError
from tolkit.model import Decoder, KVCache, RowSource, load_checkpoint
from tolkit.progress import SilentProgress
from tolkit.runtime import GenerateSpec, Generation, Session, load_session
from tolkit.runtime.decoding import Decoding, StepKind, step_kind
from tolkit_formats import open_bundle

KINDS: dict[str, dict[str, Any]] = {**HF_KINDS, "dense": {"architecture": "dense"}}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
PLACES = ("disk", "host", "device")
PROMPTS = [pico_ids(1, length, seed=length)[0].tolist() for length in (5, 1, 17, 9, 9)]
LONG = GenerateSpec(max_new_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ckpt, full.tol (float32) and small.tol (nf4)."""
    folder = tmp_path_factory.mktemp("generate")
    both_forms(folder)
    compress(
        folder / "ckpt", folder / "small.tol", CompressSpec(codec="nf4"), progress=SilentProgress()
    )
    return folder


def session_of(path: Path, **options: Any) -> Session:
    return load_session(path, device="cpu", **options)


def tokens(results: list[Generation]) -> list[list[int]]:
    return [list(result.ids) for result in results]


@kinds
def test_greedy_equals_computing_everything_anew(kind: dict[str, Any], tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", **kind)
    model = load_checkpoint(path)
    results = session_of(path).generate(PROMPTS, LONG)
    assert tokens(results) == [naive_greedy(model, p, 20)[len(p) :] for p in PROMPTS]
    assert [list(result.prompt_ids) for result in results] == PROMPTS
    assert [result.index for result in results] == [0, 1, 2, 3, 4]
    assert {result.finish for result in results} == {"length"}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("fields", [{}, {"temperature": 1.4, "top_p": 0.9, "seed": 5}], ids=str)
def test_any_batch_gives_what_prompts_give_alone(
    work: Path, batch: int, fields: dict[str, Any]
) -> None:
    session = session_of(work / "ckpt")
    spec = GenerateSpec(max_new_tokens=20, repetition_penalty=1.1, batch=batch, **fields)
    together = session.generate(PROMPTS, spec)
    whole = GenerateSpec(**{**vars(spec), "batch": 8})
    assert tokens(together) == tokens(session.generate(PROMPTS, whole))
    if not fields:
        alone = [session.generate([prompt], spec)[0] for prompt in PROMPTS]
        assert tokens(together) == tokens(alone)
        assert [r.finish for r in together] == [r.finish for r in alone]


def test_rows_that_end_early_leave_the_others_as_they_are(work: Path) -> None:
    session = session_of(work / "ckpt")
    free = session.generate(PROMPTS, LONG)
    ends = sorted({result.ids[3] for result in free})[:2]
    session._eos = frozenset(ends)
    ended = session.generate(PROMPTS, GenerateSpec(max_new_tokens=20))
    assert {"eos", "length"} <= {result.finish for result in ended}
    for long, short in zip(free, ended, strict=True):
        at = next((i for i, token in enumerate(long.ids) if token in ends), 19)
        assert short.ids == long.ids[: at + 1]


@pytest.mark.parametrize("tables", PLACES)
def test_raw_tables_give_the_ffn_paths_tokens(work: Path, tables: str) -> None:
    with session_of(work / "full.tol", tables=tables) as session:
        results = session.generate(PROMPTS, LONG)
    assert tokens(results) == tokens(session_of(work / "ckpt").generate(PROMPTS, LONG))


def test_compressed_tables_give_the_same_from_anywhere(work: Path) -> None:
    found = []
    for tables in PLACES:
        with session_of(work / "small.tol", tables=tables) as session:
            found.append(tokens(session.generate(PROMPTS, LONG)))
    assert found[0] == found[1] == found[2]


def test_dense_greedy_equals_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = pico_checkpoint(tmp_path / "dense", "dense")
    theirs = transformers.LlamaForCausalLM.from_pretrained(path)
    ours = session_of(path)
    for prompt in PROMPTS:
        want = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, repetition_penalty=1.2
        )[0, len(prompt) :]
        spec = GenerateSpec(max_new_tokens=20, repetition_penalty=1.2)
        assert tokens(ours.generate([prompt], spec)) == [want.tolist()]


def test_a_prompt_longer_than_a_piece_of_it(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = session_of(work / "ckpt").generate(PROMPTS, LONG)
    monkeypatch.setattr("tolkit.runtime.decoding._PROMPT_POSITIONS", 4)
    session = session_of(work / "ckpt")
    assert tokens(session.generate(PROMPTS, LONG)) == tokens(whole)
    assert tokens(session.generate(PROMPTS[2:3], LONG)) == tokens(whole[2:3])


def test_text_streams_as_it_is_generated(work: Path) -> None:
    session = session_of(work / "ckpt")
    spec = GenerateSpec(max_new_tokens=12, ignore_eos=True)
    heard: list[tuple[int, str]] = []
    results = session.generate(
        ["a table", "of words"], spec, on_text=lambda index, piece: heard.append((index, piece))
    )
    for result in results:
        assert result.text == session.tokenizer.decode(result.ids)
        assert result.text == "".join(piece for index, piece in heard if index == result.index)
    assert [index for index, _ in heard[:4]] == [0, 1, 0, 1]
    assert "".join(session.stream("a table", spec)) == results[0].text


def test_a_stop_text_ends_and_is_left_out(work: Path) -> None:
    session = session_of(work / "ckpt")
    (free,) = session.generate(["hello"], LONG)
    stop = free.text[6:9]
    (cut,) = session.generate(
        ["hello"], GenerateSpec(max_new_tokens=20, ignore_eos=True, stop=("never", stop))
    )
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish == "stop"
    assert cut.ids == free.ids[: len(cut.ids)]
    assert len(cut.ids) <= 9


def test_an_abandoned_stream_costs_only_what_was_read(work: Path) -> None:
    session = session_of(work / "ckpt")
    stream = session.stream("hello", LONG)
    next(stream)
    del stream
    assert session.statistics.new_tokens < 5


def test_the_same_seed_gives_the_same_text(work: Path) -> None:
    session = session_of(work / "ckpt")
    specs = [GenerateSpec(max_new_tokens=30, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (tokens(session.generate(PROMPTS, spec)) for spec in specs)
    assert first == again
    assert first != other
    assert len({tuple(ids) for ids in tokens(session.generate([PROMPTS[0]] * 4, specs[0]))}) == 4


def test_an_empty_prompt_starts_from_bos(work: Path) -> None:
    session = session_of(work / "ckpt")
    (result,) = session.generate([""], LONG)
    assert result.prompt_ids == (0,)
    session.tokenizer.bos_id = None
    with pytest.raises(UsageError, match="prompt 1: has no tokens") as caught:
        session.generate(["a", ""], LONG)
    assert caught.value.hint
    with pytest.raises(UsageError, match="prompt 0: has no tokens"):
        session.generate([[]], LONG)


@pytest.mark.parametrize("token", [-1, PICO_VOCAB, 1 << 40])
def test_tokens_outside_the_vocabulary_are_refused(work: Path, token: int) -> None:
    with pytest.raises(UsageError, match=f"prompt 0: token {token} is outside"):
        session_of(work / "ckpt").generate([[3, token]], LONG)


def test_the_context_bounds_what_is_generated(work: Path) -> None:
    session = session_of(work / "ckpt")  # 64 positions
    (free,) = session.generate([PROMPTS[0]], GenerateSpec(ignore_eos=True))
    assert (len(free.ids), free.finish) == (59, "context")
    spec = GenerateSpec(max_new_tokens=7, context=12, ignore_eos=True)
    (cut,) = session.generate([PROMPTS[0]], spec)
    assert (cut.ids, cut.finish) == (free.ids[:7], "length")
    spec = GenerateSpec(max_new_tokens=20, context=18, ignore_eos=True)
    results = session.generate(PROMPTS, spec)
    assert [len(r.ids) for r in results] == [13, 17, 1, 9, 9]
    assert {r.finish for r in results} == {"context"}
    with pytest.raises(UsageError, match="max_new_tokens: 60 and the 5 tokens") as caught:
        session.generate([PROMPTS[0]], GenerateSpec(max_new_tokens=60))
    assert "--max-new-tokens 59" in str(caught.value.hint)
    with pytest.raises(UsageError, match="prompt 0: has 64 tokens") as caught:
        session.generate([[5] * 64], GenerateSpec(max_new_tokens=1))
    assert "63 tokens" in str(caught.value.hint)
    with pytest.raises(UsageError, match="context: expected at most the model's 64"):
        session.generate(PROMPTS, GenerateSpec(context=65))


def test_statistics_add_up(work: Path) -> None:
    session = session_of(work / "ckpt")
    results = session.generate(PROMPTS, GenerateSpec(max_new_tokens=6, batch=2, ignore_eos=True))
    figures = session.statistics
    assert figures.prompts == 5
    assert figures.prompt_tokens == sum(map(len, PROMPTS))
    assert figures.new_tokens == sum(len(result.ids) for result in results) == 30
    assert figures.steps == 15
    weights = load_checkpoint(work / "ckpt").parameters()
    assert figures.weights_bytes == sum(weight.nbytes for weight in weights)
    assert (figures.tables, figures.bytes_read_per_token, figures.hit_rate) == (None, None, None)
    facts = json.loads(json.dumps(figures.to_json()))
    assert facts["ms_per_token"] == pytest.approx(1e3 * figures.decode_s / 15)
    assert facts["tokens_per_s"] == pytest.approx(25 / figures.decode_s)
    session.generate([PROMPTS[0]], LONG)
    assert session.statistics.prompts == 1


def test_reads_are_counted_for_the_call(work: Path) -> None:
    stride = open_bundle(work / "full.tol").manifest.tiers[0].stride
    with session_of(work / "full.tol", max_table_bytes=8 * stride) as session:
        (result,) = session.generate([PROMPTS[2]], LONG)
        figures = session.statistics
        assert figures.tables is not None
        passed = [*PROMPTS[2], *result.ids[:-1]]
        assert figures.tables.rows_distinct == len(set(PROMPTS[2])) + 19
        assert figures.tables.bytes_read >= stride * figures.tables.rows_read > 0
        assert figures.bytes_read_per_token == figures.tables.bytes_read / len(passed)
        assert figures.hit_rate is not None
        assert 0 < figures.hit_rate < 1
        assert 0 < figures.tables.cache_bytes <= 8 * stride
    with session_of(work / "full.tol", tables="host") as session:
        session.generate(PROMPTS, LONG)
        assert session.statistics.bytes_read_per_token == 0
        assert session.statistics.hit_rate == 1


def test_bfloat16_weights_stay_bfloat16(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", dtype=torch.bfloat16)
    session = session_of(path)
    assert {p.dtype for p in session.model.parameters()} == {torch.bfloat16}
    session.generate(PROMPTS, LONG)
    wide = session_of(path, dtype="float32")
    assert wide.model.embedding.dtype == torch.float32
    assert wide.statistics.weights_bytes == 2 * session.statistics.weights_bytes


def test_a_cache_keeps_the_rows_asked_for() -> None:
    model = pico_model()
    ids = pico_ids(3, 6)
    cache, single = KVCache(model.config, 3, 8), KVCache(model.config, 1, 8)
    with torch.no_grad():
        model.hidden(ids[:, :5], cache=cache)
        model.hidden(ids[2:, :5], cache=single)
        cache.keep_rows(torch.tensor([2, 0]))
        after = model.hidden(ids[[2, 0], 5:], cache=cache)
        want = model.hidden(ids[2:, 5:], cache=single)
    assert cache.keys_LBHSC.shape[1] == 2
    torch.testing.assert_close(after[:1], want)


def test_what_cannot_be_loaded_is_named(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tables: expected one of disk, host, device, got 'tape'"):
        session_of(work / "full.tol", tables="tape")
    with pytest.raises(UsageError, match=r"tables: .* is a checkpoint"):
        session_of(work / "ckpt", tables="disk")
    with pytest.raises(UsageError, match=r"max_table_bytes: .* is a checkpoint"):
        session_of(work / "ckpt", max_table_bytes=1 << 20)
    path = pico_checkpoint(tmp_path / "ckpt", vocab_size=90, counts=False)
    with pytest.raises(MismatchError, match="96 token ids"):
        session_of(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        session_of(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here(work: Path) -> None:
    with pytest.raises(ResourceError, match="cuda is not here"):
        load_session(work / "ckpt", device="cuda")


@kinds
def test_steps_of_one_shape_give_the_same_scores(kind: dict[str, Any], tmp_path: Path) -> None:
    model = load_checkpoint(pico_checkpoint(tmp_path / "ckpt", **kind))
    compare_steps(model, None, "yes")


@pytest.mark.parametrize("name", ["full.tol", "small.tol"])
def test_steps_of_one_shape_take_rows_of_the_device(work: Path, name: str) -> None:
    session = session_of(work / name, tables="device")
    compare_steps(session.model, session.rows, "yes")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["ckpt", "full.tol", "small.tol"])
def test_a_cuda_graph_gives_the_same_scores(work: Path, name: str) -> None:
    tables = None if name == "ckpt" else "device"
    session = load_session(work / name, device="cuda", tables=tables)
    assert step_kind(session.model, session.rows) == "graph"
    compare_steps(session.model, session.rows, "graph")
    host = session_of(work / name, tables=tables)
    assert tokens(session.generate(PROMPTS, LONG)) == tokens(host.generate(PROMPTS, LONG))


def compare_steps(model: Decoder, rows: RowSource | None, kind: StepKind) -> None:
    """Scores after each of six tokens, rows leaving on the way, against plain steps."""
    for prompts in (PROMPTS, PROMPTS[:1]):
        plain = Decoding(model, rows, prompts, 30)
        static = Decoding(model, rows, prompts, 30, static=kind)
        with torch.inference_mode():
            assert torch.equal(plain.prompt_scores(), static.prompt_scores())
            count = len(prompts)
            for token in range(6):
                ids = [(7 * token + row) % 40 for row in range(count)]
                want_BV, got_BV = plain.step(ids), static.step(ids)
                torch.testing.assert_close(got_BV, want_BV, rtol=1e-4, atol=1e-4)
                if token == 2 and count > 2:
                    kept = [0, 2]
                    count = len(kept)
                    plain.keep(kept)
                    static.keep(kept)
        assert plain.length == static.length


def test_plain_steps_on_the_cpu(work: Path) -> None:
    session = session_of(work / "full.tol", tables="device")
    assert step_kind(session.model, session.rows) == "no"
