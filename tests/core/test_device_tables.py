"""Tables resident on a device, by the torch path (the kernels have their own tests)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from _bands import write_bands
from _coded import write_coded
from _nano import MIXED, write_nano
from _tiny_bundles import known_rows, write_bundle

from tolkit.errors import BundleError, UsageError
from tolkit.runtime.device_tables import DeviceTables
from tolkit.runtime.kernels import SWITCH, why_not
from tolkit_formats import open_bundle
from tolkit_formats.limits import NO_SLOT
from tolkit_formats.reader import Bundle

GOLDEN = Path(__file__).parents[1] / "golden"
BUNDLES = sorted(GOLDEN.glob("v1.*/*.tol"))
CPU = torch.device("cpu")
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def require_close(got: torch.Tensor, want: np.ndarray, bound: float = 1e-6) -> None:
    norm = np.linalg.norm(want, axis=-1, keepdims=True)
    assert (np.abs(got.cpu().float().numpy() - want) <= bound * norm).all()


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.stem)
def test_rows_are_the_readers(path: Path, fixed_shapes: bool) -> None:
    """Both ways to find the tier: by picking rows, and (as on CUDA) by decoding in every tier."""
    bundle = open_bundle(path)
    tables = DeviceTables(bundle, CPU)
    assert not tables.fused and tables.layer_ids == bundle.layer_ids
    tables._fixed_shapes = fixed_shapes
    ids = np.random.default_rng(1).integers(0, bundle.vocab_size, 50)
    got = tables.rows(torch.from_numpy(ids))
    assert got.dtype == torch.float32
    require_close(got, bundle.rows(ids))
    if not path.name.startswith(("svd", "bands", "steps")):
        assert np.array_equal(got.numpy(), bundle.rows(ids))


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_tiers_and_symbols(tmp_path: Path, fixed_shapes: bool) -> None:
    for bundle, want in (
        ((made := write_bands(tmp_path / "b.tol")).path, made.rows_VKD),
        ((coded := write_coded(tmp_path / "c.tol")).path, coded.rows_VLD),
    ):
        tables = DeviceTables(open_bundle(bundle), CPU)
        tables._fixed_shapes = fixed_shapes
        require_close(tables.rows(torch.arange(len(want))), want)


def test_several_shards_and_loads(tmp_path: Path) -> None:
    made = write_nano(tmp_path / "n.tol", MIXED, vocab_size=3000, max_shard_bytes=1 << 17)
    bundle = open_bundle(made.path)
    assert bundle.manifest.tiers[0].num_shards > 1
    require_close(DeviceTables(bundle, CPU).rows(torch.arange(3000)), made.rows_VKD)


def test_no_rows_repeats_and_half_precision(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "t.tol"))
    tables = DeviceTables(bundle, CPU, torch.bfloat16)
    assert tables.rows(torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 8)
    got = tables.rows(torch.tensor([5, 5, 0]))
    assert torch.equal(got, torch.from_numpy(known_rows()[[5, 5, 0]]).bfloat16())


@pytest.mark.parametrize("wrong", [-1, 40])
@pytest.mark.parametrize("counts", [False, True])
def test_an_id_out_of_range(tmp_path: Path, wrong: int, counts: bool) -> None:
    made = write_nano(tmp_path / "n.tol", MIXED, counts=counts)
    tables = DeviceTables(open_bundle(made.path), CPU)
    ids = torch.tensor([3, wrong, 2])
    with pytest.raises(UsageError, match=f"token id {wrong}: out of range, the vocabulary has 40"):
        tables.rows(ids)
    for fixed_shapes in (False, True):
        tables._fixed_shapes = fixed_shapes
        rows = tables.rows(ids, check=False)
        assert rows[1].isnan().all()
        require_close(rows[[0, 2]], made.rows_VKD[[3, 2]])


def test_a_token_without_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_nano(tmp_path / "n.tol", MIXED)
    bundle = open_bundle(made.path)
    assert bundle.slot_of_token is not None
    slots_V = bundle.slot_of_token.copy()
    slots_V[7] = NO_SLOT
    monkeypatch.setattr(Bundle, "slot_of_token", property(lambda self: slots_V))
    tables = DeviceTables(bundle, CPU)
    with pytest.raises(BundleError, match="token id 7 has no record"):
        tables.rows(torch.tensor([1, 7]))
    rows = tables.rows(torch.tensor([1, 7]), check=False)
    assert rows[1].isnan().all() and not rows[0].isnan().any()


def test_a_damaged_record_is_named_when_loading(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "t.tol")
    shard = path / "tables" / "records-0-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-40] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    with pytest.raises(BundleError, match="record in slot 39 does not match its CRC-32"):
        DeviceTables(open_bundle(path), CPU)


def test_a_basis_of_an_illegal_code_is_named(tmp_path: Path) -> None:
    from _bands import edit_array

    path = tmp_path / "b.tol"
    shutil.copytree(GOLDEN / "v1.0" / "bands-klt.tol", path)

    def spoil(basis: np.ndarray) -> None:
        basis[:] = 255

    edit_array("layer.1.basis", spoil)(path)
    with pytest.raises(BundleError, match="layer 1: basis: code 255 is outside"):
        DeviceTables(open_bundle(path), CPU)


def test_bytes_on_the_device(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "t.tol"))
    (tier,) = bundle.manifest.tiers
    assert DeviceTables(bundle, CPU).resident_bytes == tier.num_rows * tier.stride
    made = open_bundle(write_nano(tmp_path / "n.tol", MIXED).path)
    (tier,) = made.manifest.tiers
    basis_bytes = 4 * 4 * 24
    want = tier.num_rows * (tier.stride + 4) + basis_bytes
    assert DeviceTables(made, CPU).resident_bytes == want


def test_a_shared_embedding_is_used(tmp_path: Path) -> None:
    made = write_bands(tmp_path / "b.tol")
    bundle = open_bundle(made.path)
    zeros_VD = torch.zeros(bundle.vocab_size, bundle.hidden_size)
    ids = torch.arange(bundle.vocab_size)
    plain = DeviceTables(bundle, CPU).rows(ids)
    without = DeviceTables(bundle, CPU, embedding_VD=zeros_VD).rows(ids)
    assert not torch.equal(plain[:, 0], without[:, 0])
    assert torch.equal(plain[:, 1], without[:, 1])


def test_kernels_where_they_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    bundle = open_bundle(write_bundle(tmp_path / "t.tol"))
    with pytest.raises(UsageError, match="kernels: cannot run here, cpu is no CUDA device"):
        DeviceTables(bundle, CPU, kernels=True)
    monkeypatch.setenv(SWITCH, "off")
    assert why_not(torch.device("cuda")) == "TOLKIT_KERNELS=off"
    monkeypatch.setenv(SWITCH, "auto")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not(torch.device("cuda")) == "the package triton is not installed"


@no_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.stem)
def test_rows_under_a_cuda_graph(path: Path, kernels: bool) -> None:
    """Captured once, replayed with other ids: nothing in it waits for the host."""
    bundle = open_bundle(path)
    tables = DeviceTables(bundle, torch.device("cuda"), kernels=kernels)
    ids = torch.zeros(9, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tables.rows(ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = tables.rows(ids)
    ids.copy_(torch.arange(9) * 3)
    graph.replay()
    torch.cuda.synchronize()
    require_close(rows, bundle.rows(np.arange(9) * 3))
