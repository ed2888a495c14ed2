"""Choosing layers by measuring, against bundles written and evaluated one by one."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
import torch
from _eval_fakes import NoisyRows, documents_of
from _pico import pico_checkpoint

from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.compress.search.choose import Choice, DropWish, choose_layers, most_evaluations
from tolkit.compress.search.choose_measure import Gone, Meter, SetCost, Side, receivers
from tolkit.compress.search.choose_search import better, exchanges
from tolkit.errors import DataError, GateError, NonFiniteError, UsageError
from tolkit.evaluate import Windows, check_gates, evaluate, parse_gate, windows_of
from tolkit.evaluate.forward import Machine
from tolkit.progress import SilentProgress
from tolkit.tables import Runnable, load_runnable

L = 4
SETS = [s for size in (1, 2, 3) for s in combinations(range(L), size)]
SILENT = SilentProgress()
Key = tuple[tuple[int, int | None], ...]


def keys_of(fold: bool) -> list[Key]:
    """All sets of layers, folded in every way that no two tables cross, or dropped."""
    if not fold:
        return [tuple((layer, None) for layer in layers) for layers in SETS]
    found: dict[Key, None] = {}
    for layers in SETS:
        left = [k for k in range(L) if k not in layers]
        reach = [
            [*[to for to in left if to < k][-1:], *[to for to in left if to > k][:1]]
            for k in layers
        ]
        for into in product(*reach):
            if list(into) == sorted(into):
                found[tuple(zip(layers, into, strict=True))] = None
    return list(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ckpt and raw.tol, of four layers."""
    path = tmp_path_factory.mktemp("choose")
    pico_checkpoint(path / "ckpt", num_hidden_layers=L, seed=3)
    wish = CompressSpec(codec="f32", feedback=False)
    compress(path / "ckpt", path / "raw.tol", wish, resources=Resources(1), progress=SILENT)
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Runnable:
    return load_runnable(folder / "raw.tol")


@pytest.fixture(scope="module")
def windows(bundle: Runnable) -> Windows:
    return text(bundle)


def text(model: Runnable, *sizes: int) -> Windows:
    return windows_of(documents_of(*(sizes or (150, 90, 40))), model.tokenizer, 32)


@pytest.fixture(scope="module", params=[True, False], ids=["folded", "plain"])
def written(
    request: pytest.FixtureRequest,
    folder: Path,
    bundle: Runnable,
    windows: Windows,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[bool, dict[Key, tuple[float, float]]]:
    """fold, and set -> (KL, perplexity change) of the bundle that drop_layers writes."""
    found = {}
    for key in keys_of(request.param):
        out = tmp_path_factory.mktemp("set") / "b.tol"
        into = {layer: to for layer, to in key if to is not None} or None
        spec = DropSpec(tuple(layer for layer, _ in key), request.param, into)
        drop_layers(folder / "raw.tol", out, spec, resources=Resources(1), progress=SILENT)
        found[key] = measured(load_runnable(out), bundle, windows)
    return request.param, found


def measured(candidate: Runnable, reference: Runnable, windows: Windows) -> tuple[float, float]:
    (result,) = evaluate([candidate], reference, windows, device="cpu", progress=SILENT)
    return result.metrics["kl_mean_nats"].value, result.metrics["ppl_increase"].value


def chosen(model: Runnable, windows: Windows, wish: DropWish, **more: Runnable) -> Choice:
    return choose_layers(model, windows, wish, machine=Machine("cpu"), progress=SILENT, **more)


def meter_of(model: Runnable, windows: Windows, *, fold: bool = True) -> Meter:
    return Meter(model, None, windows, fold=fold, machine=Machine("cpu"), progress=SILENT)


def everything(choice: Choice) -> list[SetCost]:
    return [*choice.alone, *(cost for step in choice.steps for cost in step.candidates)]


def key_of(gone: Gone, fold: bool) -> Key:
    if fold:
        return tuple(sorted(receivers(range(L), gone).items()))
    return tuple((layer, None) for layer in sorted(gone))


def key_of_cost(cost: SetCost | None) -> Key:
    assert cost is not None
    return tuple(cost.into.items())


def sides_alone(by_hand: dict[Key, tuple[float, float]]) -> dict[int, Side]:
    """To which side each layer's table goes, by what it costs alone."""
    best: dict[int, tuple[float, Side]] = {}
    for key, (kl, _) in by_hand.items():
        if len(key) == 1:
            ((layer, to),) = key
            side: Side = "previous" if to is not None and to < layer else "next"
            best[layer] = min(best.get(layer, (math.inf, side)), (kl, side))
    return {layer: side for layer, (_, side) in best.items()}


def sides_of(key: Key) -> dict[int, Side]:
    return {k: "previous" if to is not None and to < k else "next" for k, to in key}


def test_every_sets_cost_is_that_of_the_bundle_without_it(
    written: tuple[bool, dict], bundle: Runnable, windows: Windows
) -> None:
    fold, by_hand = written
    assert len(by_hand) == (20 if fold else 14)
    costs = meter_of(bundle, windows, fold=fold).costs([sides_of(k) for k in by_hand], "all")
    assert [key_of_cost(cost) for cost in costs] == list(by_hand)
    for cost in costs:
        assert (cost.kl_nats.value, cost.ppl_increase.value) == pytest.approx(
            by_hand[key_of_cost(cost)], rel=1e-4, abs=1e-6
        )
        assert cost.kl_nats.se > 0
    kls = sorted(kl for kl, _ in by_hand.values())
    # Or the comparisons of searches below would prove nothing.
    assert min(b / a for a, b in pairwise(kls)) > 1 + 2e-4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_forward_is_the_naive_greedy_search(
    written: tuple[bool, dict], bundle: Runnable, windows: Windows, count: int
) -> None:
    fold, by_hand = written
    sides = sides_alone(by_hand)
    gone: set[int] = set()
    path = []
    for _ in range(count):
        longer = [gone | {layer} for layer in {*range(L)} - gone]
        keys = {key_of({k: sides[k] for k in layers}, fold): layers for layers in longer}
        path.append(min(keys, key=lambda key: by_hand[key][0]))
        gone = keys[path[-1]]
    choice = chosen(bundle, windows, DropWish(auto=count, fold=fold, search="forward"))
    assert [key_of_cost(step.taken) for step in choice.steps] == path
    assert choice.layers == tuple(sorted(gone))
    assert choice.evaluations <= most_evaluations(L, choice.wish)
    distinct = {key_of_cost(cost) for cost in everything(choice)}
    assert len(distinct) == choice.evaluations


@pytest.mark.parametrize("count", [1, 2, 3])
def test_backward_is_the_naive_search_from_the_cheapest(
    written: tuple[bool, dict], bundle: Runnable, windows: Windows, count: int
) -> None:
    fold, by_hand = written
    sides = sides_alone(by_hand)
    ranked = sorted(range(L), key=lambda k: by_hand[key_of({k: sides[k]}, fold)][0])
    gone = {*ranked[: min(2 * count, L - 1)]}
    while len(gone) > count:
        shorter = [gone - {layer} for layer in gone]
        keys = {key_of({k: sides[k] for k in layers}, fold): layers for layers in shorter}
        gone = keys[min(keys, key=lambda key: by_hand[key][0])]
    choice = chosen(bundle, windows, DropWish(auto=count, fold=fold, search="backward"))
    assert key_of_cost(choice.cost) == key_of({k: sides[k] for k in gone}, fold)
    assert choice.evaluations <= most_evaluations(L, choice.wish)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_auto_is_no_worse_than_either_and_no_exchange_would_help(
    written: tuple[bool, dict], bundle: Runnable, windows: Windows, count: int
) -> None:
    fold, by_hand = written
    choice = chosen(bundle, windows, DropWish(auto=count, fold=fold))
    for search in ("forward", "backward"):
        other = chosen(bundle, windows, DropWish(auto=count, fold=fold, search=search))
        assert choice.cost.kl_nats.value <= other.cost.kl_nats.value
    own, alone = choice.cost.sides, sides_alone(by_hand)
    ours = by_hand[key_of_cost(choice.cost)][0]
    for old, side in own.items():
        rest = {k: v for k, v in own.items() if k != old}
        turned: Side = "next" if side == "previous" else "previous"
        tried = [{**rest, old: turned}]
        tried += [{**rest, new: alone[new]} for new in (old - 1, old + 1) if new in alone]
        for gone in tried:
            if len(gone) == count:
                assert by_hand[key_of(gone, fold)][0] >= ours * (1 - 1e-4)


def test_exchanges_lead_from_the_worst_pair_to_a_better_one(
    written: tuple[bool, dict], bundle: Runnable, windows: Windows
) -> None:
    fold, by_hand = written
    meter = meter_of(bundle, windows, fold=fold)
    pairs = meter.costs([sides_of(k) for k in by_hand if len(k) == 2], "pairs")
    before = meter.evaluations
    worst = max(pairs, key=lambda cost: cost.kl_nats.value)
    steps = exchanges(meter, DropWish(auto=2), sides_alone(by_hand), worst)
    kls = [worst.kl_nats.value, *(s.taken.kl_nats.value for s in steps if s.taken is not None)]
    assert len(kls) > 1
    assert kls == sorted(kls, reverse=True)
    assert meter.evaluations == before  # all pairs were known


def test_a_bound_is_met_as_a_gate_meets_it_and_nothing_more_fits(
    folder: Path, bundle: Runnable, windows: Windows, tmp_path: Path
) -> None:
    path = chosen(bundle, windows, DropWish(auto=3, search="forward")).steps
    uppers = [step.taken.kl_nats.interval[1] for step in path if step.taken]
    bound = (uppers[1] + uppers[2]) / 2
    wish = DropWish(max_kl=bound, search="forward")
    choice = chosen(bundle, windows, wish)
    assert choice.layers == path[1].taken.layers  # type: ignore[union-attr]
    assert choice.steps[-1].taken is None
    assert all(c.kl_nats.interval[1] > bound for c in choice.steps[-1].candidates)
    out = tmp_path / "b.tol"
    spec = DropSpec(choice.layers, into=choice.into)
    drop_layers(folder / "raw.tol", out, spec, progress=SILENT)
    (result,) = evaluate([load_runnable(out)], bundle, windows, device="cpu", progress=SILENT)
    (verdict,) = check_gates(result, [parse_gate(f"kl_mean<={bound}")])
    assert verdict.status == "passed"
    # The estimate alone would have let one more pass here.
    tight = path[1].taken.kl_nats.value * 1.0001  # type: ignore[union-attr]
    assert len(chosen(bundle, windows, DropWish(max_kl=tight, search="forward")).layers) < 2


@pytest.mark.parametrize("search", ["forward", "backward", "auto"])
def test_a_bound_on_perplexity_holds_for_whatever_is_chosen(
    bundle: Runnable, windows: Windows, search: str
) -> None:
    alone = chosen(bundle, windows, DropWish(auto=1, search="forward")).alone
    bound = sorted(c.ppl_increase.interval[1] for c in alone)[1] * 1.5
    choice = chosen(bundle, windows, DropWish(max_ppl_increase=bound, search=search))  # type: ignore[arg-type]
    assert choice.cost.ppl_increase.interval[1] <= bound
    for step in choice.steps:
        assert step.taken is None or step.taken.ppl_increase.interval[1] <= bound
    assert choice.cost == better(list(choice.found.values()))


def test_a_bound_that_all_but_one_layer_meet_leaves_one(bundle: Runnable, windows: Windows) -> None:
    for search in ("forward", "backward", "auto"):
        choice = chosen(bundle, windows, DropWish(max_kl=1e9, search=search))  # type: ignore[arg-type]
        assert len(choice.layers) == L - 1


def test_an_unreachable_bound_says_what_the_cheapest_costs(
    bundle: Runnable, windows: Windows
) -> None:
    alone = chosen(bundle, windows, DropWish(auto=1, search="forward")).alone
    cheapest = min(alone, key=lambda cost: cost.kl_nats.interval[1])
    with pytest.raises(GateError, match=f"the cheapest, layer {cheapest.layers[0]}, costs KL"):
        chosen(bundle, windows, DropWish(max_kl=1e-9))
    with pytest.raises(GateError, match=r"max_ppl_increase: no layer can go within 0\.0001 %"):
        chosen(bundle, windows, DropWish(max_ppl_increase=1e-6))


def test_what_cannot_be_chosen_is_refused(bundle: Runnable, windows: Windows) -> None:
    with pytest.raises(UsageError, match="auto: 4 of 4 layers that have a table, expected 1 to 3"):
        chosen(bundle, windows, DropWish(auto=4))
    with pytest.raises(DataError, match="text: one window, expected at least 2"):
        chosen(bundle, text(bundle, 20), DropWish(auto=1))
    long = windows_of(documents_of(300), bundle.tokenizer, 65)
    with pytest.raises(UsageError, match="window: 65 tokens"):
        chosen(bundle, long, DropWish(auto=1))


def test_a_dense_model_and_a_single_table_are_refused(tmp_path: Path) -> None:
    dense = load_runnable(pico_checkpoint(tmp_path / "dense", "dense"))
    with pytest.raises(UsageError, match="is a dense model"):
        chosen(dense, text(dense), DropWish(auto=1))
    single = load_runnable(pico_checkpoint(tmp_path / "one", num_hidden_layers=1))
    with pytest.raises(UsageError, match="only one layer has a table"):
        chosen(single, text(single), DropWish(max_kl=1.0))


def test_layers_folded_before_go_along_with_their_receiver(folder: Path, tmp_path: Path) -> None:
    once = tmp_path / "once.tol"
    drop_layers(folder / "raw.tol", once, DropSpec((1,)), progress=SILENT)
    model = load_runnable(once)
    windows = text(model)
    choice = chosen(model, windows, DropWish(auto=2))
    assert [dict(cost.into) for cost in choice.alone] == [{0: 2}, {2: 0}, {2: 3}, {3: 2}]
    assert all(1 not in cost.layers for cost in everything(choice))
    for i, cost in enumerate(choice.alone):
        twice = tmp_path / f"{i}.tol"
        spec = DropSpec(cost.layers, into={k: to for k, to in cost.into.items() if to is not None})
        drop_layers(once, twice, spec, progress=SILENT)
        kl, change = measured(load_runnable(twice), model, windows)
        assert (cost.kl_nats.value, cost.ppl_increase.value) == pytest.approx(
            (kl, change), rel=1e-4, abs=1e-6
        )


def test_compressed_tables_against_their_checkpoint(folder: Path, tmp_path: Path) -> None:
    coded = tmp_path / "nf4.tol"
    compress(folder / "ckpt", coded, CompressSpec(codec="nf4"), progress=SILENT)
    model, reference = load_runnable(coded), load_runnable(folder / "ckpt")
    windows = text(model)
    choice = chosen(model, windows, DropWish(auto=1), reference=reference)
    assert choice.as_is is not None
    kl, change = measured(model, reference, windows)
    assert (choice.as_is.kl_nats.value, choice.as_is.ppl_increase.value) == pytest.approx(
        (kl, change), rel=1e-5
    )
    assert kl > 0
    assert choice.to_history()["reference"] == reference.identity[:16]
    spec = DropSpec(choice.layers, into=choice.into)
    report = drop_layers(coded, tmp_path / "b.tol", spec, progress=SILENT)
    assert any("encoded a second time" in warning for warning in report.warnings)


def test_a_checkpoint_costs_what_its_tables_cost(
    folder: Path, bundle: Runnable, windows: Windows
) -> None:
    ours = chosen(load_runnable(folder / "ckpt"), windows, DropWish(auto=2))
    theirs = chosen(bundle, windows, DropWish(auto=2))
    assert ours.layers == theirs.layers
    assert ours.as_is is None
    assert [c.kl_nats.value for c in ours.alone] == pytest.approx(
        [c.kl_nats.value for c in theirs.alone], rel=1e-4
    )


def test_equal_runs_choose_alike_and_the_history_holds_no_measurement(
    bundle: Runnable, windows: Windows
) -> None:
    first, second = (chosen(bundle, windows, DropWish(auto=2)) for _ in range(2))
    assert everything(first) == everything(second)
    assert first.to_history() == {
        "auto": 2,
        "search": "auto",
        "text": windows.text_digest[:16],
        "window": 32,
    }
    assert chosen(bundle, windows, DropWish(max_kl=1e9)).to_history()["max_kl"] == 1e9


def test_rows_are_fetched_once_a_batch_for_the_reference_and_all_sets(
    bundle: Runnable, windows: Windows
) -> None:
    rows = NoisyRows(bundle.model, 0.0)
    rows.model = load_runnable(bundle.path.parent / "ckpt").model
    counted = dataclasses.replace(bundle, rows=rows)
    meter = meter_of(counted, windows)
    rows.calls = 0
    meter.costs([{0: "next"}, {1: "next"}, {2: "previous"}, {3: "next"}], "alone")
    assert rows.calls == 1


def test_broken_numbers_are_no_choice(bundle: Runnable, windows: Windows) -> None:
    class Broken:
        def fetch(self, ids_n: torch.Tensor) -> list[torch.Tensor | None]:
            planes = bundle.rows.fetch(ids_n)  # type: ignore[union-attr]
            return [planes[0], torch.full_like(planes[1], torch.nan), *planes[2:]]  # type: ignore[arg-type]

    broken = dataclasses.replace(bundle, rows=Broken())
    with pytest.raises(NonFiniteError, match="NaN or infinite logits without layers 0"):
        chosen(broken, windows, DropWish(auto=1))
