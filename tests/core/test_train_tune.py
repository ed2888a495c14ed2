"""Training what a bundle's rows share: what changes, what must not, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _heal import heal_folder, heal_spec
from _nano import tree_bytes
from _pico import pico_checkpoint
from _training import Interrupted, Interrupting, quiet

from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, compress
from tolkit.compress.spec import BandsWish
from tolkit.counts import save_counts
from tolkit.data import Tokenizer
from tolkit.errors import UsageError
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable, require_partners
from tolkit.train import TrainSpec, plan_run, train
from tolkit.train.tuned import TunedTables
from tolkit_formats.reader import Bundle, open_bundle, shared_name
from tolkit_formats.verify import verify

WAYS = {
    "bands": {"bits_per_value": 10.0, "bands": BandsWish("klt", 3)},
    "plain": {"bits_per_value": 8.0, "bands": BandsWish("klt", 0), "feedback": False},
    "hadamard": {"bits_per_value": 6.0, "bands": BandsWish("hadamard", 0)},
    "steps": {"bits_per_value": 8.0, "coding": "entropy", "bands": BandsWish("klt", 3)},
    "rotated": {"bits_per_value": 7.0, "coding": "entropy", "bands": BandsWish("hadamard", 0)},
    "dropped": {"bits_per_value": 5.0, "bands": BandsWish("klt", 3), "drop": (0,)},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = heal_folder(tmp_path_factory.mktemp("tune"))
    counts = folder / "counts.safetensors"
    digest = Tokenizer.load(folder / "memory").digest
    save_counts(counts, np.repeat([1000, 1], 48).astype(np.uint64), digest)
    for way, options in WAYS.items():
        compress(
            folder / "memory",
            folder / f"{way}.tol",
            CompressSpec(weights=str(counts), **options),  # type: ignore[arg-type]
            resources=Resources(threads=1),
            progress=SilentProgress(),
        )
    return folder


@pytest.fixture
def spec(work: Path, tmp_path: Path) -> TrainSpec:
    return tune_spec(work, tmp_path)


def tune_spec(work: Path, out: Path) -> TrainSpec:
    return replace(
        heal_spec(work, out / "tuned.tol"),
        init=work / "bands.tol",
        freeze_tables=False,
        tune_tables=True,
        distill=work / "memory",
        learning_rate=1e-2,
    )


def tables_of(path: Path) -> tuple[Bundle, TunedTables]:
    bundle = open_bundle(path)
    embedding_VD = load_runnable(path).model.embedding
    return bundle, TunedTables(bundle, embedding_VD, torch.device("cpu"))


def stirred(tables: TunedTables, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tables.parameters():
            parameter.normal_(0.0, size, generator=generator)


@torch.no_grad()
def fetched(bundle: Bundle, tables: TunedTables, ids: np.ndarray) -> np.ndarray:
    planes = tables.fetch(torch.from_numpy(ids))
    kept = [planes[layer] for layer in bundle.layer_ids]
    return torch.stack([plane for plane in kept if plane is not None], dim=1).numpy()


@pytest.mark.parametrize("way", WAYS)
def test_before_the_first_step_rows_and_arrays_are_the_bundle_s(work: Path, way: str) -> None:
    bundle, tables = tables_of(work / f"{way}.tol")
    assert len(bundle.manifest.tiers) > 1
    ids = np.random.default_rng(0).permutation(96)[:50]
    wanted = bundle.rows(ids)
    assert np.abs(fetched(bundle, tables, ids) - wanted).max() < 1e-5 * np.abs(wanted).max()
    file = bundle.tensor_file("tables/bases.safetensors")
    stored = tables.stored()
    assert set(stored) == set(file.names)
    for name, (dtype, array) in stored.items():
        assert dtype == file.infos[name].dtype
        assert np.array_equal(array, file.array(name)), name
    dropped = set(range(2)) - set(bundle.layer_ids)
    assert all(tables.fetch(torch.from_numpy(ids))[layer] is None for layer in dropped)


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_those_of_the_arrays_that_would_be_stored(work: Path, way: str) -> None:
    bundle, tables = tables_of(work / f"{way}.tol")
    stirred(tables, 0.2)
    ids = np.arange(96)
    stored = {name: array for name, (_, array) in tables.stored().items()}
    wanted = np.zeros((96, len(bundle.layer_ids), 32), np.float32)
    embedded_ND = bundle.embedded(ids).astype(np.float64)
    unit_ND = embedded_ND / np.sqrt((embedded_ND**2).mean(axis=1, keepdims=True))
    for place, layer in enumerate(bundle.layer_ids):
        names = bundle.shared(layer)
        arrays = {name: stored[shared_name(layer, name)] for name in names} | dict(bundle.common)
        for tier, where in bundle.by_tier(bundle.slots_of(ids)):
            records = bundle.shards.take(tier, bundle.slots_of(ids)[where])
            plane = tier.planes[place]
            part = records[:, plane.offset : plane.offset + plane.length]
            wanted[where, place] = plane.codec.decode(part, arrays)
        if layer in bundle.manifest.predictors:
            weights_DD = bundle.manifest.predictors[layer].weights_DD(arrays)
            wanted[:, place] += unit_ND @ weights_DD.T
    changed = np.abs(wanted - bundle.rows(ids)).max()
    assert changed > 0.05 * np.abs(wanted).max()
    assert np.abs(fetched(bundle, tables, ids) - wanted).max() < 1e-4 * changed


def test_codebooks_rise_whatever_the_steps_did(work: Path) -> None:
    bundle, tables = tables_of(work / "bands.tol")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tables.named_parameters():
            if "codebooks" in name:
                parameter.normal_(0.0, 5.0, generator=generator)
    for layer in bundle.layer_ids:
        stored = tables.stored()[shared_name(layer, "codebooks")][1]
        assert not np.array_equal(stored, bundle.shared(layer)["codebooks"])
        start = 0
        for bits in bundle.plane(layer).codec.codebooks:
            book = stored[start : start + (1 << bits)]
            assert (np.diff(book) >= 0).all()
            start += 1 << bits
        assert start == len(stored)


@pytest.mark.parametrize("way", ["hadamard", "rotated", "bands"])
def test_gradients_are_those_of_small_moves(work: Path, way: str) -> None:
    """Of arrays that are rounded finely, or not at all; codes go by the same rule as scales."""
    _, tables = tables_of(work / f"{way}.tol")
    ids = torch.arange(96)
    weights = torch.randn(96, 32, generator=torch.Generator().manual_seed(2))

    def total() -> torch.Tensor:
        return sum((plane * weights).sum() for plane in tables.fetch(ids) if plane is not None)

    total().backward()
    names = ("mean", "scales", "codebooks", "steps", "predictor.codes", "basis.codes")
    for name, parameter in tables.named_parameters():
        if not any(part in name for part in names) or not parameter.numel():
            continue
        assert parameter.grad is not None
        # f16 and codes have to move by whole units of theirs for a difference to show.
        move = torch.sign(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        move *= 1 / 3 if name.endswith("codes") else 0.05
        expected = float((parameter.grad * move).sum())
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(sign * move)
                values.append(float(total()))
                parameter.sub_(sign * move)
        size = float((parameter.grad * move).norm())
        assert abs((values[0] - values[1]) / 2 - expected) < 0.2 * size + 1e-3, name


@pytest.mark.parametrize("way", ["bands", "steps"])
def test_a_tuned_bundle_is_closer_and_has_the_same_records_and_backbone(
    spec: TrainSpec, work: Path, way: str
) -> None:
    source = work / f"{way}.tol"
    before = tree_bytes(source)
    report = quiet(replace(spec, init=source, steps=40))
    assert tree_bytes(source) == before
    old, new = open_bundle(source), open_bundle(spec.out)
    changed = {name for name, data in tree_bytes(spec.out).items() if data != before.get(name)}
    assert changed == {
        "README.md",
        "tables/bases.safetensors",
        "tables/checksums.safetensors",
        "tol.json",
    }
    assert new.table_bytes == old.table_bytes
    assert verify(spec.out).identity == report.identity
    assert new.manifest.tiers == old.manifest.tiers
    assert old.manifest.encoding.errors and not new.manifest.encoding.errors
    step = new.manifest.history[-1]
    assert (step.command, step.parent) == ("train", old.identity)
    assert step.options["tune_tables"] is True and step.options["freeze_tables"] is False
    assert report.before is not None and report.held_out is not None
    assert report.before.kl is not None and report.held_out.kl is not None
    assert report.held_out.kl < 0.8 * report.before.kl
    require_partners(load_runnable(spec.out), load_runnable(work / "memory"))


def test_what_was_measured_last_is_what_was_published(spec: TrainSpec, tmp_path: Path) -> None:
    report = quiet(spec)
    again = quiet(replace(spec, init=spec.out, out=tmp_path / "again.tol", steps=1))
    assert report.held_out is not None and again.before is not None
    assert again.before.kl == pytest.approx(report.held_out.kl, rel=1e-5)


def test_a_tuned_bundle_heals(spec: TrainSpec, tmp_path: Path) -> None:
    quiet(spec)
    healing = replace(spec, init=spec.out, freeze_tables=True, tune_tables=False)
    report = quiet(replace(healing, out=tmp_path / "healed.tol", steps=20, learning_rate=3e-3))
    assert report.before is not None and report.held_out is not None
    assert report.before.kl is not None and report.held_out.kl is not None
    assert report.held_out.kl < report.before.kl
    assert load_runnable(tmp_path / "healed.tol").healed and not load_runnable(spec.out).healed


@pytest.mark.parametrize("after", [1, 3, 6])
def test_an_interrupted_tuning_continues_to_the_same_bits(
    spec: TrainSpec, tmp_path: Path, after: int
) -> None:
    whole = replace(spec, out=tmp_path / "whole.tol")
    quiet(whole)
    with pytest.raises(Interrupted):
        train(spec, Interrupting(after))
    assert not spec.out.exists()
    assert quiet(spec).resumed_step == (after - 1) // 2 * 2
    assert tree_bytes(spec.out) == tree_bytes(whole.out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init": None, "distill": None}, "tune_tables: a new model has nothing"),
        ({"freeze_tables": True}, "tune_tables: freeze_tables given too"),
        ({"init": "memory"}, "is a checkpoint, expected a bundle"),
        ({"init": "memory.tol"}, "layer 0 is svd, whose rows share nothing"),
    ],
)
def test_what_cannot_be_tuned(
    spec: TrainSpec, work: Path, options: dict[str, object], said: str
) -> None:
    if isinstance(options.get("init"), str):
        options = {"init": work / str(options["init"])}
    with pytest.raises(UsageError) as caught:
        quiet(replace(spec, **options))  # type: ignore[arg-type]
    assert said in caught.value.message
    assert not spec.out.exists()


@pytest.mark.parametrize("way", WAYS)
def test_the_plan_counts_what_is_trained(spec: TrainSpec, work: Path, way: str) -> None:
    plan = plan_run(replace(spec, init=work / f"{way}.tol", learning_rate=None, steps=None))
    _, tables = tables_of(work / f"{way}.tol")
    assert plan.tuned and plan.trained_parameters == sum(p.numel() for p in tables.parameters())
    assert (plan.learning_rate, plan.steps) == (1e-2, 200)


def test_a_flex_model_s_tables_tune(spec: TrainSpec, tmp_path: Path) -> None:
    checkpoint = pico_checkpoint(tmp_path / "flex", "flex")
    source = tmp_path / "flex.tol"
    wish = CompressSpec(bits_per_value=8.0, bands=BandsWish("klt", 3))
    compress(checkpoint, source, wish, progress=SilentProgress())
    report = quiet(replace(spec, init=source, distill=checkpoint, steps=30))
    assert report.before is not None and report.held_out is not None
    assert report.held_out.kl is not None and report.before.kl is not None
    assert report.held_out.kl < report.before.kl
