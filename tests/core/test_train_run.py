"""Whole runs: what is written, exact resume, kills at any I/O call, refusals."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _nano import fault_hook
from _pico import pico_checkpoint
from _training import Interrupted, Interrupting, kill_at, lines_of_words, quiet

from tolkit.data import Tokenizer, count_tokens, tokens_of
from tolkit.errors import (
    DataError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    ResourceError,
    UsageError,
)
from tolkit.model import Decoder, checkpoint_tensors, load_checkpoint
from tolkit.train import TrainSpec, loop, train
from tolkit_formats import files


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sky.txt"
    path.write_text(lines_of_words(400))
    return path


@pytest.fixture
def spec(text: Path, tmp_path: Path) -> TrainSpec:
    return TrainSpec(
        out=tmp_path / "out",
        text=(str(text),),
        layers=2,
        hidden_size=32,
        vocab_size=280,
        steps=6,
        sequence=16,
        batch=4,
        micro_batch=2,
        learning_rate=1e-2,
        eval_every=2,
        save_every=2,
        dtype="float32",
    )


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def log(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "train_log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("tokens_per_s", None)
    return records


@pytest.mark.parametrize("arch", ["memory", "flex", "dense"])
def test_a_run_writes_a_checkpoint_that_learned(spec: TrainSpec, arch: str, text: Path) -> None:
    report = quiet(replace(spec, arch=arch, steps=30))
    records = [r for r in log(spec.out) if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, 31))
    assert set(records[0]) == {
        "step", "tokens", "loss", "z_loss", "lr", "grad_norm", "distinct_ids"
    }  # fmt: skip
    assert records[-1]["loss"] < records[0]["loss"] - 1
    assert report.held_out is not None and report.held_out.perplexity < 100
    assert report.tokens == 30 * 4 * 16 and report.resumed_step == 0
    tokenizer = Tokenizer.load(spec.out)
    model = load_checkpoint(spec.out)
    assert model.config.architecture == arch
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    assert model.config.vocab_size == tokenizer.vocab_size == report.vocab_size
    counts = checkpoint_tensors(spec.out).token_counts()
    assert counts is not None
    whole = tokens_of([str(text)], tokenizer).ids
    held_out = len(whole) // 50
    assert (counts == count_tokens(whole[:-held_out], len(counts))).all()
    assert not spec.out.with_name("out.partial").exists()


def test_the_held_out_loss_is_that_of_the_published_weights(spec: TrainSpec, text: Path) -> None:
    report = quiet(spec)
    assert report.held_out is not None
    whole = tokens_of([str(text)], Tokenizer.load(spec.out)).ids.astype(np.int64)
    ids = torch.from_numpy(whole[-(len(whole) // 50) :])
    model = load_checkpoint(spec.out)
    losses = []
    for start in range(0, len(ids) - 16, 16):
        window = ids[start : start + 17]
        with torch.no_grad():
            logits = model(window[None, :-1])[0]
        losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    assert report.held_out.windows == len(losses)
    assert report.held_out.loss == pytest.approx(np.mean(losses), rel=1e-5)
    se = np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert report.held_out.loss_se == pytest.approx(se, rel=1e-4)
    assert report.held_out.perplexity == pytest.approx(math.exp(report.held_out.loss))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("after", [1, 2, 5, 6])
def test_an_interrupted_run_continues_to_the_same_bits(
    spec: TrainSpec, tmp_path: Path, dtype: str, after: int
) -> None:
    whole = replace(spec, out=tmp_path / "whole", dtype=dtype)
    quiet(whole)
    spec = replace(spec, dtype=dtype)
    with pytest.raises(Interrupted):
        train(spec, Interrupting(after))
    report = quiet(spec)
    assert report.resumed_step == (after - 1) // 2 * 2
    assert weights(spec.out) == weights(whole.out)
    assert log(spec.out) == log(whole.out)


def test_batch_order_and_weights_depend_on_the_seed(spec: TrainSpec, tmp_path: Path) -> None:
    runs = [replace(spec, out=tmp_path / f"{i}", seed=i // 2) for i in range(3)]
    for run in runs:
        quiet(run)
    assert weights(runs[0].out) == weights(runs[1].out) != weights(runs[2].out)


def test_micro_batches_change_nothing_but_rounding(spec: TrainSpec, tmp_path: Path) -> None:
    runs = [replace(spec, out=tmp_path / f"{m}", micro_batch=m) for m in (1, 4)]
    for run in runs:
        quiet(run)
    for name in checkpoint_tensors(runs[0].out).names:
        first, second = (checkpoint_tensors(run.out).tensor(name) for run in runs)
        torch.testing.assert_close(first, second, rtol=0, atol=3e-4)


def test_a_kill_at_any_io_call_leaves_a_run_that_continues(spec: TrainSpec, tmp_path: Path) -> None:
    spec = replace(spec, steps=3, save_every=1, eval_every=0)
    calls: list[str] = []
    with fault_hook(lambda operation, path: calls.append(operation)):
        quiet(replace(spec, out=tmp_path / "whole"))
    expected = weights(tmp_path / "whole")
    assert len(calls) > 100
    for call in range(1, len(calls), max(1, len(calls) // 12)):
        run = replace(spec, out=tmp_path / f"run{call}")
        try:
            with fault_hook(kill_at(call)):
                quiet(run)
        except Interrupted:
            if not run.out.exists():
                quiet(run)
        assert weights(run.out) == expected, call


def test_a_damaged_state_is_passed_over(spec: TrainSpec, tmp_path: Path) -> None:
    quiet(replace(spec, out=tmp_path / "whole"))
    with pytest.raises(Interrupted):
        train(spec, Interrupting(5))
    work = tmp_path / "out.partial"
    assert sorted(p.name for p in work.glob("state-*.safetensors")) == [
        "state-000000002.safetensors",
        "state-000000004.safetensors",
    ]
    state = work / "state-000000004.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    report = quiet(spec)
    assert report.resumed_step == 2
    assert any("step 4 is damaged" in warning for warning in report.warnings)
    assert weights(spec.out) == weights(tmp_path / "whole")


@pytest.mark.parametrize("plan", [b"", b"[1]", b'{"steps": ', None])
def test_states_without_their_plan_are_not_used(
    spec: TrainSpec, tmp_path: Path, plan: bytes | None
) -> None:
    quiet(replace(spec, out=tmp_path / "whole"))
    with pytest.raises(Interrupted):
        train(replace(spec, seed=9), Interrupting(5))
    path = tmp_path / "out.partial" / "plan.json"
    if plan is None:
        path.unlink()
    else:
        path.write_bytes(plan)
    assert quiet(spec).resumed_step == 0
    assert weights(spec.out) == weights(tmp_path / "whole")
    assert log(spec.out) == log(tmp_path / "whole")


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", 1), ("learning_rate", 2e-2), ("layers", 3), ("steps", 9), ("arch", "dense")],
)
def test_an_unfinished_run_with_other_options_is_refused(
    spec: TrainSpec, option: str, value: object
) -> None:
    with pytest.raises(Interrupted):
        train(spec, Interrupting(3))
    other = replace(spec, **{option: value})
    with pytest.raises(MismatchError, match="holds an unfinished run with another"):
        quiet(other)
    assert quiet(replace(other, restart=True)).resumed_step == 0


def test_edited_text_is_another_run(spec: TrainSpec, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(Path(spec.text[0]).read_text())
    spec = replace(spec, text=(str(copy),))
    with pytest.raises(Interrupted):
        train(spec, Interrupting(3))
    copy.write_text(copy.read_text() + "one more line\n")
    with pytest.raises(MismatchError, match="another text"):
        quiet(spec)


def test_an_existing_output_stays(spec: TrainSpec) -> None:
    quiet(spec)
    before = weights(spec.out)
    with pytest.raises(OutputExistsError):
        quiet(replace(spec, seed=3))
    assert weights(spec.out) == before
    quiet(replace(spec, seed=3, force=True))
    assert weights(spec.out) != before


def test_force_replaces_only_checkpoints(spec: TrainSpec) -> None:
    spec.out.mkdir()
    (spec.out / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is not a checkpoint folder"):
        quiet(replace(spec, force=True))
    assert (spec.out / "thesis.tex").exists()


def test_two_processes_do_not_share_an_output(spec: TrainSpec, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    with files.lock(work / "lock"), pytest.raises(ResourceError, match="another process"):
        quiet(spec)


def test_text_shorter_than_a_window(spec: TrainSpec, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("sun")
    with pytest.raises(DataError, match="shorter than one window of 16"):
        quiet(replace(spec, text=(str(short),)))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt: empty text"):
        quiet(replace(spec, text=(str(tmp_path / "empty.txt"),), restart=True))


def test_text_too_short_to_hold_out_trains_without_validation(
    spec: TrainSpec, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the sun rises in the blue sky\n" * 10)
    report = quiet(replace(spec, text=(str(short),)))
    assert report.held_out is None
    assert any("no validation" in warning for warning in report.warnings)


def test_fine_tuning_goes_on_from_the_weights(spec: TrainSpec, tmp_path: Path) -> None:
    quiet(replace(spec, steps=30))
    tuned = replace(
        spec, out=tmp_path / "tuned", init=spec.out, layers=None, hidden_size=None, vocab_size=None
    )
    quiet(tuned)
    assert log(tuned.out)[0]["loss"] < log(spec.out)[0]["loss"] - 1
    assert Tokenizer.load(tuned.out).files() == Tokenizer.load(spec.out).files()
    first, second = (checkpoint_tensors(p).token_counts() for p in (spec.out, tuned.out))
    assert first is not None and second is not None and (second == 2 * first).all()


def test_partners_that_do_not_fit(spec: TrainSpec, tmp_path: Path, text: Path) -> None:
    init = pico_checkpoint(tmp_path / "init")
    base = replace(spec, layers=None, hidden_size=None, vocab_size=None, init=init)
    quiet(base)
    other = Tokenizer.train(iter([]), 258)
    (tmp_path / "other").mkdir()
    for name, content in other.files().items():
        (tmp_path / "other" / name).write_bytes(content)
    wrong = replace(base, out=tmp_path / "wrong")
    with pytest.raises(MismatchError, match="not the tokenizer of the init checkpoint"):
        quiet(replace(wrong, tokenizer=tmp_path / "other"))
    with pytest.raises(UsageError, match=r"^layers: 5 asked for"):
        quiet(replace(wrong, layers=5))
    with pytest.raises(MismatchError, match="reads at most 64 positions"):
        quiet(replace(wrong, sequence=65))
    (init / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        quiet(replace(wrong))
    with pytest.raises(MismatchError, match="has 96 embedding rows"):
        quiet(replace(wrong, tokenizer=tmp_path / "other"))
    fresh = replace(spec, out=tmp_path / "fresh", tokenizer=tmp_path / "other")
    with pytest.raises(MismatchError, match="vocab_size: 200"):
        quiet(replace(fresh, vocab_size=200))
    assert quiet(replace(fresh, vocab_size=264)).vocab_size == 264


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_diverges_stops_and_keeps_the_last_good_weights(
    spec: TrainSpec, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(replace(spec, out=tmp_path / "whole", steps=6))
    real = loop.accumulate_gradients
    good: list[dict[str, torch.Tensor]] = []

    def poisoned(model: Decoder, *arguments: object, **options: object) -> object:
        loss = real(model, *arguments, **options)  # type: ignore[arg-type]
        good.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return replace(loss, cross_entropy=value) if len(good) == 4 else loss

    monkeypatch.setattr(loop, "accumulate_gradients", poisoned)
    with pytest.raises(NonFiniteError, match=r"in step 4 of 6") as caught:
        quiet(spec)
    kept = tmp_path / "out.partial" / "last_good"
    assert str(kept) in caught.value.message and not spec.out.exists()
    for name, weight in load_checkpoint(kept).state_dict().items():
        assert torch.equal(weight, good[-1][name])
    monkeypatch.setattr(loop, "accumulate_gradients", real)
    quiet(spec)
    assert weights(spec.out) == weights(tmp_path / "whole")


def test_minutes_become_steps_before_the_first_one(spec: TrainSpec) -> None:
    spec = replace(spec, steps=None, minutes=0.004)
    with pytest.raises(Interrupted):
        train(spec, Interrupting(1))
    plan = json.loads((spec.out.with_name("out.partial") / "plan.json").read_text())
    report = quiet(spec)
    assert report.steps == plan["steps"] >= 2


def test_the_recipe_is_recorded_with_the_checkpoint(spec: TrainSpec) -> None:
    quiet(spec)
    plan = json.loads((spec.out / "train.json").read_text())
    assert (plan["steps"], plan["seed"], plan["dtype"]) == (6, 0, "float32")
    assert str(spec.out) not in (spec.out / "train.json").read_text()
