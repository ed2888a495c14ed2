"""Replays: hits, reads and bytes are exactly those of caches that look at everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _bands import write_bands
from _coded import write_coded
from _hf import both_forms
from _nano import NF4, RAW_F32, write_nano
from _pages import require_evictable
from _pico import PICO_VOCAB

from tolkit.bench import ReplaySpec, bench_replay
from tolkit.bench.replay import replay_ids, token_ids
from tolkit.errors import DataError, ResourceError, UsageError
from tolkit_formats import Bundle, open_bundle
from tolkit_formats.frame_plan import least_cache_bytes, plan_frames
from tolkit_formats.frames import Frames

NANO: dict[str, Callable[[Path], object]] = {
    "one tier": lambda path: write_nano(path, [RAW_F32, NF4]),
    "no counts": lambda path: write_nano(path, [NF4], counts=False),
    "three tiers, predictors": write_bands,
    "coded, two tiers": write_coded,
}


@pytest.fixture(params=NANO)
def nano(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    NANO[request.param](tmp_path / "b.tol")
    return open_bundle(tmp_path / "b.tol")


def cache_of(bundle: Bundle, records: int) -> int:
    """A cache with about so many frames for each tier."""
    more = sum(Frames.frame_bytes(tier.stride) for tier in bundle.manifest.tiers)
    return least_cache_bytes(bundle) + (records - 1) * more


def naive_lru(rows: Sequence[int], frames: int, held: list[int], kept: int = 0) -> int:
    """Hits of `frames` that hold `held`, oldest first, beside rows that are always there."""
    hits = 0
    for row in rows:
        if row < kept:
            hits += 1
            continue
        if row in held:
            hits += 1
            held.remove(row)
        held = [*held, row][-frames:]
    return hits


def expected_hits(bundle: Bundle, ids: np.ndarray, cache_bytes: int, *, seeded: bool) -> int:
    slots = bundle.slots_of(ids)
    hits = 0
    plan = plan_frames(bundle, cache_bytes, seeded=seeded)
    for tier, part in zip(bundle.manifest.tiers, plan, strict=True):
        here = (slots >= tier.first_slot) & (slots < tier.first_slot + tier.num_rows)
        rows = (slots[here] - tier.first_slot).tolist()
        held = list(range(part.count - 1, part.kept - 1, -1)) if seeded else []
        hits += naive_lru(rows, part.count - part.kept, held, part.kept)
    return hits


def ids_of(bundle: Bundle, count: int = 400, *, seed: int = 0) -> np.ndarray:
    """Ids with records, some far more often than others."""
    slots_V = bundle.slot_of_token
    known = np.arange(bundle.vocab_size)
    if slots_V is not None:
        known = np.flatnonzero(slots_V < bundle.manifest.num_rows)
    random = np.random.default_rng(seed)
    return np.asarray(known[(random.zipf(1.2, count) - 1) % len(known)], np.int64)


@pytest.mark.parametrize("records", [1, 3, 10])
def test_what_is_run_hits_as_the_oracle_does(nano: Bundle, records: int) -> None:
    ids, cache_bytes = ids_of(nano), cache_of(nano, records)
    known = nano.token_counts() is not None and nano.slot_of_token is not None
    spec = ReplaySpec(nano.path, ("unread",), (cache_bytes,))
    report = replay_ids(spec, ids)
    assert [r.policy for r in report.results] == (["seeded", "lru"] if known else ["lru"])
    assert (report.tokens, report.distinct) == (len(ids), len(set(ids.tolist())))
    for result in report.results:
        seeded = result.policy == "seeded"
        assert result.hits == expected_hits(nano, ids, cache_bytes, seeded=seeded)
        assert result.hit_rate == result.hits / len(ids)
        assert result.reads_per_token == pytest.approx(1 - result.hit_rate)
        assert (result.by, result.state) == ("runtime", "warm")
        assert result.resident_before in {1, None}
        assert (result.seed_bytes > 0) == seeded
        assert result.us_per_token is not None


def test_simulated_lru_would_be_the_runtimes(nano: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation's frames and tiers are those of the real cache."""
    from tolkit.bench import policies, replay, specs

    ids, cache_bytes = ids_of(nano), cache_of(nano, 4)
    monkeypatch.setattr(replay, "SIMULATED", {"optimal": policies.lru_hits})
    spec = ReplaySpec(nano.path, ("unread",), (cache_bytes,), ("lru", "optimal"))
    assert "optimal" in specs.POLICIES
    real, simulated = replay_ids(spec, ids).results
    assert simulated.hits == real.hits
    assert simulated.frames == real.frames
    assert (simulated.by, simulated.state, simulated.us_per_token) == ("simulated", "", None)
    if not nano.manifest.tiers[0].coded:
        assert simulated.bytes_per_token == pytest.approx(real.bytes_per_token)


def test_bytes_are_those_of_the_records_read(tmp_path: Path) -> None:
    bundle = open_bundle(write_nano(tmp_path / "b.tol", [RAW_F32, NF4]).path)
    (tier,) = bundle.manifest.tiers
    ids = np.arange(40).repeat(2)
    each = ("lru", "seeded", "static", "lfu")
    spec = ReplaySpec(bundle.path, ("unread",), (cache_of(bundle, 5),), each)
    lru, seeded, static, lfu = replay_ids(spec, ids).results
    assert (lru.hits, lru.seed_bytes, lru.frames) == (40, 0, 5)
    assert lru.bytes_per_token == tier.stride / 2
    assert (seeded.seed_bytes, seeded.frames) == (5 * tier.stride, 5)
    assert static.hits == 10, "the five most frequent, twice each"
    assert static.seed_bytes == 5 * tier.stride
    assert lfu.hits == 40


def test_the_prediction_is_arithmetic(tmp_path: Path) -> None:
    write_nano(tmp_path / "b.tol", [NF4])
    bundle = open_bundle(tmp_path / "b.tol")
    stride = bundle.manifest.tiers[0].stride
    ids = np.arange(bundle.vocab_size)
    spec = ReplaySpec(
        bundle.path,
        ("unread",),
        (cache_of(bundle, 1),),
        ("lru",),
        read_latency_s=1e-3,
        read_bytes_per_s=1e6,
        step_s=2e-3,
    )
    (result,) = replay_ids(spec, ids).results
    assert result.predicted_tokens_per_s == pytest.approx(1 / (3e-3 + stride / 1e6))
    (quick,) = replay_ids(dataclasses.replace(spec, policies=("optimal",)), ids[:1]).results
    assert quick.reads_per_token == 1


def test_cold_and_warm_are_made(tmp_path: Path) -> None:
    require_evictable(tmp_path)
    forms = both_forms(tmp_path, num_hidden_layers=12)
    path = forms["bundle"]
    (tmp_path / "t.txt").write_text("a table of words " * 30)
    cache_bytes = cache_of(open_bundle(path), 8)
    spec = ReplaySpec(path, (str(tmp_path / "t.txt"),), (cache_bytes,), ("lru",), ("cold", "warm"))
    cold, warm = bench_replay(spec).results
    assert (cold.state, warm.state) == ("cold", "warm")
    assert cold.resident_before == 0 and warm.resident_before == 1
    assert cold.resident_after is not None and 0 < cold.resident_after <= 1
    assert cold.hits == warm.hits


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("replay")
    (folder / "t.txt").write_text("a table of words")
    (folder / "empty.txt").write_text("")
    return {**both_forms(folder), "text": folder / "t.txt", "empty": folder / "empty.txt"}


def test_a_text_becomes_ids_with_its_end(forms: dict[str, Path]) -> None:
    bundle = open_bundle(forms["bundle"])
    ids = token_ids(bundle, [str(forms["text"])], None)
    assert len(ids) == len("a table of words") + 1
    assert ids[-1] == 1 and ids[0] == ord("a") - 32 + 3
    short = token_ids(bundle, [str(forms["text"])], 5)
    assert short[:5].tolist() == ids[:5].tolist() and len(short) == 6
    assert ids.max() < PICO_VOCAB


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"cache_bytes": (10,)}, UsageError, "10 bytes hold no record"),
        ({"cache_bytes": ()}, UsageError, "cache_bytes: there is none"),
        (
            {"policies": ("clock",)},
            UsageError,
            "policy: expected seeded, lru, lfu, static, optimal",
        ),
        ({"states": ("hot",)}, UsageError, "state: expected cold, warm"),
        ({"limit_tokens": 0}, UsageError, "limit_tokens: expected at least 1"),
        ({"read_bytes_per_s": 0.0}, UsageError, "read_bytes_per_s: expected above 0"),
        ({"step_s": -1.0}, UsageError, "expected at least 0"),
    ],
)
def test_what_cannot_be_replayed(
    forms: dict[str, Path], options: dict[str, Any], error: type[Exception], said: str
) -> None:
    values = {"bundle": forms["bundle"], "data": (str(forms["text"]),), **options}
    with pytest.raises(error, match=said):
        bench_replay(ReplaySpec(**values))


def test_a_text_without_tokens(forms: dict[str, Path]) -> None:
    with pytest.raises(DataError):
        bench_replay(ReplaySpec(forms["bundle"], (str(forms["empty"]),)))


def test_policies_that_need_counts(tmp_path: Path) -> None:
    write_nano(tmp_path / "b.tol", [NF4], counts=False)
    for policy in ("seeded", "static"):
        spec = ReplaySpec(tmp_path / "b.tol", ("unread",), (1 << 20,), (policy,))
        with pytest.raises(UsageError, match=f"{policy} needs token counts"):
            replay_ids(spec, np.arange(3))


def test_a_state_that_cannot_be_had(
    forms: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tolkit.bench import residency

    monkeypatch.setattr(residency, "evict", lambda paths: None)
    monkeypatch.setattr(residency, "resident_share", lambda paths: 1.0)
    monkeypatch.setattr(residency, "_PAUSE_S", 0)
    spec = ReplaySpec(forms["bundle"], (str(forms["text"]),), states=("cold",))
    with pytest.raises(ResourceError, match="would not be cold"):
        bench_replay(spec)
