"""Training around frozen tables: what changes, what must not, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _heal import coded, heal_folder, heal_spec, tables
from _nano import reseal, tree_bytes
from _pico import pico_checkpoint, pico_tokenizer_files
from _training import quiet

from tolkit.build import build
from tolkit.compress import CompressSpec, compress
from tolkit.data import tokens_of
from tolkit.errors import InputError, MismatchError, UnsupportedVersionError, UsageError
from tolkit.model import checkpoint_tensors
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable, require_partners
from tolkit.train import TrainSpec, plan_run
from tolkit_formats.reader import open_bundle
from tolkit_formats.tensorfile import TensorFile
from tolkit_formats.verify import verify

TENSORS_IN_TABLES = (".memory_", "embed_tokens")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heal_folder(tmp_path_factory.mktemp("heal"))


@pytest.fixture
def spec(work: Path, tmp_path: Path) -> TrainSpec:
    return heal_spec(work, tmp_path / "healed.tol")


@pytest.mark.parametrize("arch", ["memory", "flex"])
def test_a_healed_bundle_has_the_same_tables_and_another_backbone(
    spec: TrainSpec, work: Path, arch: str
) -> None:
    source = work / f"{arch}.tol"
    before = tree_bytes(source)
    report = quiet(replace(spec, init=source, steps=30))
    assert tree_bytes(source) == before
    assert tables(spec.out) == tables(source)
    assert verify(spec.out).identity == report.identity
    old, new = open_bundle(source), open_bundle(spec.out)
    assert np.array_equal(old.rows(np.arange(96)), new.rows(np.arange(96)))
    assert new.manifest.sources == old.manifest.sources
    assert new.manifest.tiers == old.manifest.tiers
    *earlier, step = new.manifest.history
    assert tuple(earlier) == old.manifest.history
    assert (step.command, step.parent) == ("train", old.identity)
    assert step.options["steps"] == 30 and step.options["freeze_tables"] is True
    assert str(spec.out.parent) not in (spec.out / "tol.json").read_text()
    theirs, ours = (TensorFile(p / "backbone.safetensors") for p in (source, spec.out))
    assert ours.names == theirs.names
    for name in ours.names:
        assert not np.array_equal(ours.array(name), theirs.array(name)), name
    if arch == "flex":
        assert any(".mlp." in name for name in ours.names)
    assert report.before is not None and report.held_out is not None
    assert report.held_out.loss < report.before.loss - 0.5
    assert report.train_loss < report.before.loss
    assert [p.name for p in spec.out.parent.iterdir()] == ["healed.tol"]


def test_the_loss_reported_is_that_of_the_published_bundle(spec: TrainSpec) -> None:
    report = quiet(spec)
    runnable = load_runnable(spec.out)
    assert runnable.healed and spec.init is not None and not load_runnable(spec.init).healed
    ids = tokens_of(spec.text, runnable.tokenizer).ids.astype(np.int64)
    held = torch.from_numpy(ids[-(len(ids) // 50) :])
    losses = []
    for start in range(0, len(held) - 16, 16):
        window = held[start : start + 17]
        with torch.no_grad():
            logits = runnable.model(window[None, :-1], rows=runnable.rows)[0]
        losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    assert report.held_out is not None and report.held_out.windows == len(losses)
    assert report.held_out.loss == pytest.approx(np.mean(losses), rel=1e-4)


def test_learning_from_the_reference_brings_the_bundle_closer_to_it(
    spec: TrainSpec, work: Path
) -> None:
    report = quiet(replace(spec, distill=work / "memory", steps=40))
    assert report.before is not None and report.held_out is not None
    assert report.before.kl is not None and report.held_out.kl is not None
    assert report.held_out.kl < 0.5 * report.before.kl
    step = open_bundle(spec.out).manifest.history[-1]
    assert step.options["distill"] == load_runnable(work / "memory").identity
    assert step.options["distill_weight"] == 1.0


@pytest.mark.parametrize("arch", ["memory", "flex"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_checkpoint_s_tables_stay_bit_for_bit(
    spec: TrainSpec, tmp_path: Path, arch: str, tie: bool
) -> None:
    init = pico_checkpoint(tmp_path / "init", arch, tie_word_embeddings=tie)
    report = quiet(replace(spec, out=tmp_path / "tuned", init=init))
    assert report.identity is None and report.trained_parameters < report.parameters
    old, new = checkpoint_tensors(init), checkpoint_tensors(tmp_path / "tuned")
    for name in new.names:
        same = torch.equal(old.tensor(name), new.tensor(name))
        assert same == any(part in name for part in TENSORS_IN_TABLES), name
    planes = []
    for folder in (init, tmp_path / "tuned"):
        build(folder, folder.with_suffix(".tol"), dtype="f32", progress=SilentProgress())
        planes.append(open_bundle(folder.with_suffix(".tol")).rows(np.arange(96)))
    assert np.array_equal(*planes)


def test_frozen_embeddings_stay(spec: TrainSpec) -> None:
    quiet(replace(spec, freeze_embeddings=True))
    assert spec.init is not None
    old, new = (load_runnable(path).model.state_dict() for path in (spec.init, spec.out))
    for name, weight in new.items():
        assert torch.equal(weight, old[name]) == ("embed_tokens" in name), name


def test_a_16_bit_backbone_stays_one(spec: TrainSpec, tmp_path: Path) -> None:
    source = coded(pico_checkpoint(tmp_path / "narrow", dtype=torch.bfloat16))
    report = quiet(replace(spec, init=source))
    infos = TensorFile(spec.out / "backbone.safetensors").infos
    assert {info.dtype for info in infos.values()} == {"BF16"}
    assert report.before is not None and report.held_out is not None
    assert report.held_out.loss < report.before.loss
    again = quiet(replace(spec, init=spec.out, out=tmp_path / "again.tol", steps=1))
    assert again.before == report.held_out, "measured with the weights as stored"


@pytest.mark.parametrize("drop", [(0,), (1,)])
def test_a_bundle_with_a_folded_layer_heals(
    spec: TrainSpec, tmp_path: Path, drop: tuple[int, ...]
) -> None:
    source = coded(pico_checkpoint(tmp_path / "folded"), drop=drop)
    quiet(replace(spec, init=source))
    assert tables(spec.out) == tables(source)
    assert load_runnable(spec.out).rows is not None


def test_a_bundle_is_not_trained_whole(spec: TrainSpec) -> None:
    with pytest.raises(UsageError, match="expected --freeze-tables too"):
        quiet(replace(spec, freeze_tables=False))
    with pytest.raises(UsageError, match=r"^arch: flex asked for"):
        quiet(replace(spec, arch="flex"))
    with pytest.raises(UsageError, match=r"^preset: 250m has 24 layers"):
        quiet(replace(spec, preset="250m"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init": None}, "freeze_tables: a new model has nothing"),
        ({"distill_weight": 0.5}, "distill_weight: expected --distill too"),
        ({"distill": Path("x"), "distill_weight": 0.0}, "distill_weight: expected above 0"),
    ],
)
def test_options_that_need_another(spec: TrainSpec, options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        quiet(replace(spec, **options))
    assert said in caught.value.message


def test_a_dense_model_has_no_tables(spec: TrainSpec, work: Path) -> None:
    with pytest.raises(UsageError, match="is a dense model"):
        quiet(replace(spec, init=work / "dense"))


def test_a_dense_model_can_teach(spec: TrainSpec, work: Path) -> None:
    report = quiet(replace(spec, distill=work / "dense", distill_weight=0.5))
    assert report.before is not None and report.before.kl is not None and report.before.kl > 0.1


def test_other_combine_rules_and_partial_tables_are_refused(
    spec: TrainSpec, tmp_path: Path
) -> None:
    assert spec.init is not None
    other = tmp_path / "other.tol"
    shutil.copytree(spec.init, other)
    reseal(other, lambda manifest: manifest.update(combine="other"))
    with pytest.raises(UnsupportedVersionError, match="combine is 'other'"):
        quiet(replace(spec, init=other))
    with pytest.raises(InputError):
        quiet(replace(spec, init=tmp_path / "nothing.tol"))


def test_a_teacher_with_another_tokenizer_is_refused(spec: TrainSpec, tmp_path: Path) -> None:
    other = pico_checkpoint(tmp_path / "other")
    text = pico_tokenizer_files()["tokenizer.json"].decode()
    swapped = text.replace('"a":', '"?":', 1).replace('"b":', '"a":', 1).replace('"?":', '"b":', 1)
    (other / "tokenizer.json").write_text(swapped)
    with pytest.raises(MismatchError, match=r"^distill: .* another tokenizer"):
        quiet(replace(spec, distill=other))


def test_a_teacher_that_reads_less_is_refused(spec: TrainSpec, tmp_path: Path) -> None:
    short = pico_checkpoint(tmp_path / "short", max_position_embeddings=8)
    with pytest.raises(MismatchError, match="reads at most 8 positions, a window has 16"):
        quiet(replace(spec, distill=short))


def test_evaluating_against_the_checkpoint_says_that_the_bundle_was_healed(
    spec: TrainSpec, work: Path
) -> None:
    quiet(spec)
    with pytest.raises(MismatchError, match="was healed: its tables are of this") as caught:
        require_partners(load_runnable(spec.out), load_runnable(work / "memory"))
    assert caught.value.hint is not None and "--other-reference" in caught.value.hint


def test_a_healed_bundle_can_be_healed_and_compressed_again(
    spec: TrainSpec, tmp_path: Path
) -> None:
    quiet(spec)
    again = replace(spec, init=spec.out, out=tmp_path / "twice.tol", seed=1)
    quiet(again)
    commands = [step.command for step in open_bundle(again.out).manifest.history]
    assert commands == ["compress", "train", "train"]
    small = tmp_path / "small.tol"
    compress(again.out, small, CompressSpec(codec="int4"), progress=SilentProgress())
    backbones = [(p / "backbone.safetensors").read_bytes() for p in (again.out, small)]
    assert backbones[0] == backbones[1]


def test_the_plan_says_what_is_trained_and_writes_nothing(
    spec: TrainSpec, work: Path, tmp_path: Path
) -> None:
    plan = plan_run(spec)
    assert (plan.kind, plan.steps, plan.batch, plan.sequence) == ("bundle", 6, 4, 16)
    assert plan.trained_parameters == plan.parameters
    assert plan.size_bytes == open_bundle(work / "memory.tol").manifest.bundle_bytes
    default = plan_run(replace(spec, sequence=None, learning_rate=None, distill=work / "memory"))
    assert (default.sequence, default.learning_rate, default.distill_weight) == (64, 3e-4, 1.0)
    frozen = plan_run(replace(spec, init=work / "memory", out=tmp_path / "tuned"))
    assert frozen.kind == "checkpoint" and frozen.trained_parameters < frozen.parameters / 2
    fresh = plan_run(TrainSpec(tmp_path / "fresh"))
    assert (fresh.kind, fresh.architecture, fresh.steps) == ("checkpoint", "memory", 500)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"^distill: "):
        plan_run(replace(spec, distill=tmp_path / "nothing"))
