"""The decode benchmark: its counts are exact, its shapes the paper's; its times are not judged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _hf import both_forms
from _pages import require_evictable
from _pico import pico_checkpoint, pico_config, pico_model

from tolkit.bench import DecodeReport, DecodeSpec, bench_decode, variants
from tolkit.bench.generated import CODECS, generated_bundle, generated_decoder, table_bytes
from tolkit.bench.shapes import ARCHITECTURES, arithmetic, preset_config, twin_config
from tolkit.bench.token_draw import zipf_ids
from tolkit.compress import CompressSpec, compress
from tolkit.errors import ResourceError, TolError, UsageError
from tolkit.model import Decoder
from tolkit.progress import SilentProgress
from tolkit.runtime.decoding import Decoding
from tolkit_formats import open_bundle
from tolkit_formats.verify import verify

D, K, L, V = 192, 512, 3, 300  # the tiny preset, smaller
SMALL: dict[str, Any] = {
    "preset": "tiny",
    "layers": L,
    "vocab_size": V,
    "context": 12,
    "tokens": 4,
    "rounds": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> DecodeReport:
    """All architectures, tables in every place."""
    work = tmp_path_factory.mktemp("tables")
    spec = DecodeSpec(**SMALL, tables=("disk", "host", "device"), work=work)
    return bench_decode(spec)


def values_of(architecture: str) -> int:
    """Parameters of the small model, tables' FFNs left out, counted by hand."""
    inner = {"dense": K, "memory": 0, "flex-1": 64, "flex-2": 128, "flex-3": 192}[architecture]
    norms = 1 if architecture == "memory" else 2
    return V * D + L * (4 * D * D + 3 * D * inner + norms * D) + D


def test_every_architecture_in_every_place(report: DecodeReport) -> None:
    names = [(result.name, result.tables) for result in report.results]
    places = ("disk", "host", "device")
    assert names == [("dense", ""), *((a, p) for a in ARCHITECTURES[1:] for p in places)]
    assert (report.layers, report.vocab_size, report.dtype) == (L, V, "bfloat16")
    first = report.results[0]
    assert (first.ratio, first.cpu_ratio, first.memory_ratio, first.bound) == (1, 1, 1, 1)


def test_bytes_and_operations_are_those_of_the_shape(report: DecodeReport) -> None:
    dense = 2 * values_of("dense") + 2 * D
    for result in report.results:
        values = values_of(result.architecture)
        assert result.weights_bytes == 2 * values
        assert result.read_bytes == 2 * values + 2 * D, "the embedding is tied: the head, and a row"
        assert result.bound == result.read_bytes / dense
        keys_values = 2 * L * 12 * D * 4  # float32 on the CPU
        assert result.cache_bytes == keys_values
        with_cache = (result.read_bytes + keys_values) / (dense + keys_values)
        assert result.bound_with_cache == pytest.approx(with_cache)
        norms = (1 if result.architecture == "memory" else 2) * L * D + D
        assert result.flops == 2 * (values - norms) + 4 * L * 12 * D
        assert len(result.rounds_ms) == 2 and min(result.rounds_ms) > 0


def test_tables_are_counted_where_they_lie(report: DecodeReport) -> None:
    nf4 = D // 2 + 4 * D // 64
    stride = -(-(L * nf4 + 4) // 16) * 16
    for result in report.results:
        if result.tables == "":
            assert (result.tables_bytes, result.table_read_bytes) == (0, None)
        elif result.tables == "disk":
            assert result.hit_rate is not None
            assert result.table_read_bytes == pytest.approx(stride * (1 - result.hit_rate))
            assert 64 * stride < result.tables_bytes <= V * stride
        else:
            assert (result.table_read_bytes, result.hit_rate) == (0, 1)
            assert result.tables_bytes >= V * stride
        weights = result.weights_bytes + result.tables_bytes
        assert result.memory_ratio == weights / report.results[0].weights_bytes


def test_anonymous_memory_holds_the_weights() -> None:
    spec = DecodeSpec(**{**SMALL, "layers": 12, "vocab_size": 200_000}, architectures=("dense",))
    (result,) = bench_decode(spec).results
    if result.anonymous_bytes is None:
        pytest.skip("this system does not tell a process's anonymous memory")
    assert result.anonymous_bytes > 0.7 * result.weights_bytes


def test_cold_rounds_begin_without_records_in_memory(tmp_path: Path) -> None:
    require_evictable(tmp_path)
    spec = DecodeSpec(**SMALL, architectures=("memory",), cold=True, work=tmp_path)
    (result,) = bench_decode(spec).results
    assert result.resident_before == 0
    assert result.resident_after is not None and result.resident_after > 0


def test_the_bound_at_one_billion() -> None:
    """The 0.452 of the design: 665.4 M of 1,471.1 M weights, head among them."""

    def read_bytes(architecture: str) -> int:
        with torch.device("meta"):
            model = Decoder(preset_config("1b", architecture), with_ffn=False).bfloat16()
        return arithmetic(model, 256, torch.float32).weights_read_bytes

    dense = 128_256 * 2048 + 24 * (4 * 2048**2 + 3 * 2048 * 5464 + 2 * 2048) + 2048
    assert read_bytes("dense") == 2 * dense + 2 * 2048
    assert read_bytes("memory") / read_bytes("dense") == pytest.approx(0.4523, abs=1e-4)


def test_real_models_beside_their_twins(tmp_path: Path) -> None:
    forms = both_forms(tmp_path)
    spec = DecodeSpec(
        inputs=(forms["bundle"], forms["checkpoint"]),
        architectures=("dense",),
        tables=("disk", "device"),
        context=10,
        tokens=3,
        rounds=1,
        dtype="float32",
        device="cpu",
    )
    results = bench_decode(spec).results
    assert [(r.name, r.tables, r.generated) for r in results] == [
        ("dense", "", True),
        ("full.tol", "disk", False),
        ("full.tol", "device", False),
        ("ckpt", "ffn", False),
    ]
    dense, disk, _, computed = results
    config = pico_config()
    ffn = 3 * 32 * 48 + 32
    assert computed.weights_bytes == disk.weights_bytes + 4 * config.num_hidden_layers * ffn
    assert dense.weights_bytes == computed.weights_bytes, "K is kept, a norm is a norm"
    alone = bench_decode(dataclasses.replace(spec, architectures=(), tables=("disk",)))
    assert [r.name for r in alone.results] == ["full.tol", "ckpt"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_twins_keep_the_shape(architecture: str) -> None:
    memory = preset_config("250m", "memory")
    twin = twin_config(memory, architecture)
    expected = preset_config("250m", architecture)
    assert twin.intermediate_size == expected.intermediate_size
    assert abs(twin.memory_intermediate_size - expected.memory_intermediate_size) <= 0.002 * 2560


@pytest.mark.parametrize("codec", CODECS)
def test_generated_tables_are_a_valid_bundle(codec: str, tmp_path: Path) -> None:
    config = preset_config("tiny", "memory", layers=3, vocab_size=1500)
    bundle = generated_bundle(tmp_path / "new", config, codec, SilentProgress())
    verify(bundle.path)
    assert table_bytes(config, codec) == sum(
        tier.num_rows * tier.stride for tier in bundle.manifest.tiers
    )
    rows = bundle.rows([0, 1023, 1024, 1499])
    assert rows.shape == (4, 3, D)
    assert 0.02 < rows.std() < 0.1
    before = bundle.path.stat().st_mtime_ns
    again = generated_bundle(tmp_path / "new", config, codec, SilentProgress())
    assert again.identity == bundle.identity and bundle.path.stat().st_mtime_ns == before


def test_generated_weights_are_equal_for_equal_arguments() -> None:
    config = pico_config()
    cpu = torch.device("cpu")
    one, two = (generated_decoder(config, dtype=torch.float32, device=cpu) for _ in range(2))
    other = generated_decoder(config, dtype=torch.float32, device=cpu, seed=1)
    assert torch.equal(one.embedding, two.embedding)
    assert not torch.equal(one.embedding, other.embedding)
    assert 0.015 < float(one.embedding.std()) < 0.025


@pytest.mark.parametrize("static", ["no", "yes"])
@torch.inference_mode()
def test_a_decoding_set_back_gives_what_it_gave(static: Any) -> None:
    model = pico_model().eval()
    decoding = Decoding(model, None, [[5]], 12, static=static)
    decoding.prompt_scores()
    first = [decoding.step([token]).clone() for token in (7, 8, 9)]
    decoding.pretend(1)
    again = [decoding.step([token]).clone() for token in (7, 8, 9)]
    for one, two in zip(first, again, strict=True):
        assert torch.allclose(one, two, atol=1e-6)
    decoding.pretend(10)
    assert decoding.length == 10
    far = decoding.step([7])
    assert torch.isfinite(far).all() and not torch.allclose(far, first[0])


def test_a_partial_bundle_computes_what_it_lacks(tmp_path: Path) -> None:
    checkpoint = pico_checkpoint(tmp_path / "ckpt")
    spec = CompressSpec(codec="int8", keep_rows="5")
    compress(checkpoint, tmp_path / "p.tol", spec, progress=SilentProgress())
    bundle = open_bundle(tmp_path / "p.tol")
    counts_V = bundle.token_counts()
    assert counts_V is not None
    order = torch.from_numpy(np.argsort(-counts_V.astype(float), kind="stable"))
    ids = [i for n in (1, 2) for i in zipf_ids(96, 20, n, order)]
    cold = sum(not bool(has) for has in bundle.has_record(np.asarray(ids)))
    assert 0 < cold < len(ids)
    asked = DecodeSpec(inputs=(bundle.path,), context=32, tokens=20, rounds=2, device="cpu")
    (result,) = bench_decode(asked).results
    assert result.computed == cold / len(ids)


def test_ids_follow_zipf() -> None:
    ids = zipf_ids(1000, 5000, 3)
    assert ids == zipf_ids(1000, 5000, 3) != zipf_ids(1000, 5000, 4)
    assert 0 <= min(ids) and max(ids) < 1000
    most = max(ids.count(token) for token in set(ids))
    assert 0.1 * 5000 < most < 0.17 * 5000, "1 / H(1000) = 0.134 of them are the most frequent one"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "2b"}, "preset: expected one of tiny"),
        ({"architectures": ("flex-4",)}, "arch: expected dense"),
        ({"architectures": ("dense", "dense")}, "names one twice"),
        ({"tables": ("tape",)}, "tables: expected disk, host, device"),
        ({"tables": ()}, "tables: names no place"),
        ({"codec": "mp3"}, "codec: expected f16, int8, nf4"),
        ({"tokens": 12}, "context: 12 positions have no room"),
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"layers": 0}, "layers: expected at least 1"),
        ({"dtype": "int8"}, "dtype"),
        ({"max_table_bytes": 100, "architectures": ("memory",)}, "100 bytes hold no record"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        bench_decode(DecodeSpec(**{**SMALL, **options}))


def test_inputs_have_their_own_shape(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt")
    spec = DecodeSpec(inputs=(path,), context=100, tokens=4, device="cpu")
    with pytest.raises(UsageError, match="context: ckpt has 64 positions, got 100"):
        bench_decode(spec)
    with pytest.raises(UsageError, match="layers: as the vocabulary, that of the input"):
        bench_decode(DecodeSpec(inputs=(path,), architectures=("dense",), layers=2, device="cpu"))


def test_no_room_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 99999 kB\nMemAvailable:     17 kB\n")
    monkeypatch.setattr(variants, "_MEMINFO", tmp_path / "meminfo")
    with pytest.raises(ResourceError, match=r"memory: the models take [\d,]+ bytes together, 17,4"):
        bench_decode(DecodeSpec(**SMALL))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu_is_said() -> None:
    with pytest.raises(ResourceError, match="cuda") as caught:
        bench_decode(DecodeSpec(**{**SMALL, "device": "cuda"}))
    assert caught.value.exit_code == 6


def test_a_bundle_of_another_kind_in_the_way(tmp_path: Path) -> None:
    config = preset_config("tiny", "memory", layers=L, vocab_size=V)
    (tmp_path / f"tables-{V}x{L}x{D}-nf4.tol").write_text("mine")
    with pytest.raises(TolError):
        generated_bundle(tmp_path, config, "nf4", SilentProgress())
    assert open_bundle(generated_bundle(tmp_path, config, "int8", SilentProgress()).path)
