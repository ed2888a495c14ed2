"""Makes the golden bundles of a format version. Run once a format version, never again.

    python tests/golden/make.py v1.1            writes tests/golden/v1.1, which must not exist

A golden bundle is frozen bytes: what was written once by a released format is read for ever. The
script is kept as provenance, not to make the same bytes again on another machine; it refuses to
touch a folder that is there. V 40 tokens, L 3 or 4 layers, D 24 values (so every group of 64 is a
short one, and rank 11 ends in half a byte). Bundles of bands have V 72, enough for two tiers; they
joined v1.0 before its release, made into another folder and copied.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models

import tolkit
from tolkit.build import build
from tolkit.bundling import Resources
from tolkit.cold_rows import ColdPlanes
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.compress.spec import BandsWish
from tolkit.model import Decoder, ModelConfig, save_checkpoint
from tolkit.progress import SilentProgress
from tolkit_formats import Bundle, open_bundle, verify
from tolkit_formats.tensorfile import write_tensors

SEED = 20261121
VOCAB_SIZE, HIDDEN_SIZE = 40, 24
TIERED_VOCAB_SIZE = 72
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Golden:
    """One bundle: how it is made, and what for."""

    name: str
    options: dict[str, object]
    note: str


GOLDENS = (
    Golden("raw-f32", {"build": "f32"}, "raw, f32"),
    Golden("raw-f16", {"build": "f16"}, "raw, f16"),
    Golden("raw-bf16", {"build": "bf16"}, "raw, bf16"),
    Golden("int8", {"codec": "int8"}, "int8 with error feedback"),
    Golden("int4", {"codec": "int4"}, "int4, one short group a row"),
    Golden("nf4", {"codec": "nf4"}, "nf4, one short group a row"),
    Golden("fp4", {"codec": "fp4"}, "fp4, one short group a row"),
    Golden("svd-f16", {"rank": "11", "codec": "f16"}, "rank 11, coefficients in f16"),
    Golden("svd-nf4", {"rank": "11", "codec": "nf4"}, "rank 11, coefficients in nf4, odd tail"),
    Golden(
        "mapped-folded-dropped",
        {"counts": True, "codec": "int8", "drop": (1,), "plain": (3,)},
        "4 layers: 1 folded into 2, 3 dropped without folding; slots in the order of counts",
    ),
    Golden(
        "bands-klt",
        {"tiers": True, "bits": 18.0, "transform": "klt", "predict": 3},
        "bands in a stored basis with predictions of 3 bits, two tiers",
    ),
    Golden(
        "bands-hadamard",
        {"tiers": True, "bits": 15.0, "transform": "hadamard", "predict": 0},
        "bands in the rotation, blocks of 8, two tiers",
    ),
)


CODED_GOLDENS = (
    Golden(
        "steps-klt",
        {"tiers": True, "bits": 18.0, "transform": "klt", "predict": 3, "coding": "entropy"},
        "entropy-coded rows: steps in a stored basis with predictions of 3 bits, two tiers",
    ),
    Golden(
        "steps-hadamard",
        {"tiers": True, "bits": 15.0, "transform": "hadamard", "predict": 0, "coding": "entropy"},
        "entropy-coded rows: steps in the rotation, blocks of 8, two tiers",
    ),
)
PARTIAL_GOLDENS = (
    Golden(
        "partial-folded-dropped",
        {"counts": True, "codec": "int8", "keep": "12", "drop": (1,), "plain": (3,)},
        "12 of 40 tokens have a record, FFN weights in bf16 give the others' rows; 4 layers: 1 "
        "folded into 2, 3 dropped without folding",
    ),
)
VERSIONS = {"v1.0": GOLDENS, "v1.1": CODED_GOLDENS, "v1.2": PARTIAL_GOLDENS}


def make(folder: Path, version: str = "v1.0") -> None:
    """Write all golden bundles of a version, their rows and PROVENANCE.toml into a new `folder`.

    Raises:
        FileExistsError: `folder` is there. Golden bundles are never made again.
    """
    folder.mkdir(parents=True)
    lines = [
        f'command = "python tests/golden/make.py {version}"\nseed = {SEED}',
        f'format = "{version[1:]}"',
        f'commit = "{_commit()}"',
        "\n[versions]",
        f'tolkit = "{tolkit.__version__}"\npython = "{platform.python_version()}"',
        f'torch = "{torch.__version__}"\nnumpy = "{np.__version__}"',
        f'safetensors = "{safetensors.__version__}"\ntokenizers = "{tokenizers.__version__}"',
        f'machine = "{platform.machine()}"',
    ]
    for golden in VERSIONS[version]:
        path = folder / f"{golden.name}.tol"
        _write(golden, path)
        verify(path)
        bundle = open_bundle(path)
        rows = _rows(bundle)
        rows_file = folder / f"{golden.name}.rows.safetensors"
        write_tensors(rows_file, {"rows": ("F32", rows)})
        lines += [
            f"\n[bundles.{golden.name}]",
            f'note = "{golden.note}"\noptions = {json.dumps(json.dumps(golden.options))}',
            f'identity = "{bundle.identity}"',
            f'manifest_sha256 = "{_sha256(path / "tol.json")}"',
            f'rows_sha256 = "{_sha256(rows_file)}"',
        ]
    (folder / "PROVENANCE.toml").write_text("\n".join(lines) + "\n")


def _rows(bundle: Bundle) -> np.ndarray:
    """Float32 [V, kept, D], those without a record computed."""
    ids = np.arange(bundle.vocab_size)
    if bundle.manifest.partial is None:
        return bundle.rows(ids)
    cold = ColdPlanes(bundle)
    planes = [cold.plane(layer)(torch.from_numpy(ids)) for layer in bundle.layer_ids]
    rows = torch.stack(planes, dim=1).numpy()
    hot = np.flatnonzero(bundle.has_record(ids))
    rows[hot] = bundle.rows(hot)
    return rows


def _write(golden: Golden, path: Path) -> None:
    common = {"resources": Resources(threads=1), "progress": SilentProgress()}
    options = golden.options
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "ckpt"
        _checkpoint(
            source,
            layers=4 if "plain" in options else 3,
            counts=bool(options.get("counts")),
            tiers=bool(options.get("tiers")),
        )
        if "build" in options:
            build(source, path, dtype=str(options["build"]), **common)
            return
        if "bits" in options:
            wish = BandsWish(str(options["transform"]), int(str(options["predict"])), 2)
            spec = CompressSpec(
                bits_per_value=float(str(options["bits"])),
                bands=wish,
                coding=str(options.get("coding", "fixed")),
            )
            compress(source, path, spec, **common)
            return
        spec = CompressSpec(
            rank=options.get("rank"),
            codec=options.get("codec"),
            drop=options.get("drop", ()),
            keep_rows=options.get("keep"),
        )
        if "plain" not in options:
            compress(source, path, spec, **common)
            return
        compress(source, Path(name) / "first.tol", spec, **common)
        drop_layers(
            Path(name) / "first.tol", path, DropSpec(options["plain"], fold=False), **common
        )


def _checkpoint(path: Path, *, layers: int, counts: bool, tiers: bool) -> None:
    config = ModelConfig(
        architecture="memory",
        vocab_size=TIERED_VOCAB_SIZE if tiers else VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=0,
        memory_intermediate_size=20,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = Decoder(config)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    counts_V = None
    if counts:
        ranks = np.random.default_rng(SEED).permutation(VOCAB_SIZE) + 1
        counts_V = (1000 // ranks).astype(np.uint64)
    if tiers:
        steps = np.repeat([5000, 0], TIERED_VOCAB_SIZE // 2)
        counts_V = np.random.default_rng(SEED).permutation(steps).astype(np.uint64)
    save_checkpoint(model.to(torch.bfloat16), path, _tokenizer_files(), counts_V)


def _tokenizer_files() -> dict[str, bytes]:
    words = ["<bos>", "<eos>", " ", *"abcdefghijklmnopqrstuvwxyz", *"0123456789"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.add_special_tokens(words[:2])
    tokenizer.decoder = decoders.Fuse()
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "bos_token_id": 0, "eos_token_id": 1}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    (wanted,) = sys.argv[1:]
    target = HERE / wanted
    try:
        make(target, wanted)
    except FileExistsError:
        sys.exit(f"{target}: is there; golden bundles are read for ever and never made again")
