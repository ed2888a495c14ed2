"""Everything that waits for a CUDA device, in one call: tests, look-ups, decoding, evaluation.

Look-ups: gpu_tables.py. Decoding: `tol bench decode` at the 1B shape, contexts 256 and 2048
(Table 6 of the paper), tables on the device, in host memory and on disk.

Evaluation against the bare forward pass (hidden states and the head's product, nothing kept) of
the same model on the same batches: a reference alone, and beside a candidate whose table rows are
on the device. Random weights and ids (speed does not depend on their values). Before that, the
metrics of a small pair are compared with the CPU's.

    python tests/bench/gpu.py [--preset 250m] [--seconds 20]
    python tests/bench/gpu.py --device cpu --preset tiny     does the script itself work?
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import gpu_tables
from _eval_fakes import documents_of, pico_pair

from tolkit.bench import DecodeSpec, bench_decode
from tolkit.evaluate import Window, Windows, evaluate, windows_of
from tolkit.evaluate.batching import padded
from tolkit.evaluate.forward import Machine
from tolkit.evaluate.runnable import Placed, device_label
from tolkit.model import Decoder, FfnRows, RowSource, preset
from tolkit.progress import SilentProgress

ROUNDS = 5


class StubTokenizer:
    """Enough of a tokenizer for an evaluation whose windows are already cut."""

    digest, bos_id, eos_id = "0" * 64, None, None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


@dataclass
class Candidate:
    model: Decoder
    rows: RowSource | None
    tokenizer: Any
    kind: str = "bundle"
    identity: str = "0" * 64
    table_bytes: int | None = None
    bits_per_value: float | None = None
    adjust: None = None


def run_marked_tests() -> None:
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print("tests marked gpu:", done.stdout.strip().splitlines()[-1])


def check_against_cpu(device: str) -> None:
    reference, candidate = pico_pair()
    windows = windows_of(documents_of(400, 70, 33), reference.tokenizer, 32)
    here, cpu = (
        evaluate([candidate], reference, windows, device=name, progress=SilentProgress())[0]
        for name in (device, "cpu")
    )
    worst = max(
        abs(here.metrics[name].value / metric.value - 1) for name, metric in cpu.metrics.items()
    )
    print(f"metrics on {device} against cpu, float32: largest relative difference {worst:.1e}")
    assert worst < 1e-3


def zipf_windows(vocabulary: int, length: int, count: int) -> Windows:
    """Ids drawn with frequency 1 / rank, as text has them."""
    weights = 1 / np.arange(1, vocabulary + 1)
    rng = np.random.default_rng(0)
    ids = rng.choice(vocabulary, (count, length + 1), p=weights / weights.sum()).astype(np.int32)
    items = [Window(row, length, 4.0 * length, length, 0) for row in ids]
    return Windows.of(items, length=length, tokenizer_digest=StubTokenizer.digest)


def bare_forward_s(machine: Machine, placed: Placed, windows: Windows, batch: int) -> float:
    """Seconds of hidden states and head products of all windows, `batch` windows at a time."""
    started_s = machine.now_s()
    for first in range(0, len(windows), batch):
        indices = list(range(first, min(first + batch, len(windows))))
        together = padded([windows[i] for i in indices], indices)
        hidden_RTD = placed.hidden(together.inputs_RT.to(machine.device))
        for rows_nD in hidden_RTD.flatten(0, 1).split(4096):  # all logits at once would not fit
            torch.mm(rows_nD, placed.head_weight.t())
    return machine.now_s() - started_s


def compare_speed(device: str, name: str, dtype: str, seconds: float) -> None:
    model = Decoder(preset(name, "memory"))
    config = model.config
    length = config.max_position_embeddings
    machine = Machine(device, dtype)
    model.to(device=machine.device, dtype=machine.dtype)
    tokenizer = StubTokenizer(config.vocab_size)
    reference = Candidate(model, None, tokenizer, kind="checkpoint")
    candidate = Candidate(model, FfnRows(model), tokenizer)
    batch = max(1, machine.batch_tokens // length)
    with machine.running():
        placed = machine.place(reference)
        probe = zipf_windows(config.vocab_size, length, 2 * batch)
        bare_forward_s(machine, placed, probe, batch)
        probe_s = bare_forward_s(machine, placed, probe, batch)
        count = batch * max(2, int(seconds / ROUNDS / max(probe_s / 2, 1e-3) / 4))
        windows = zipf_windows(config.vocab_size, length, count)
        ratios: dict[str, list[float]] = {"reference alone": [], "with a candidate": []}
        speeds: dict[str, list[float]] = {"bare": [], **{label: [] for label in ratios}}
        for _ in range(ROUNDS):
            bare_s = bare_forward_s(machine, placed, windows, batch)
            speeds["bare"].append(windows.n_tokens / bare_s)
            for label, models in (
                ("reference alone", ([reference], None)),
                ("with a candidate", ([candidate], reference)),
            ):
                (result,) = evaluate(
                    *models, windows, device=device, dtype=dtype, tables="resident",
                    progress=SilentProgress(),
                )  # fmt: skip
                passes = 1 if models[1] is None else 2
                pass_s = result.timings_s["pass"]
                speeds[label].append(windows.n_tokens / pass_s)
                ratios[label].append(passes * bare_s / pass_s)
    print(f"\n{name}, {dtype}, {windows.n_tokens:,} tokens in windows of {length}, {ROUNDS} rounds")
    print("| | tokens/s, median | share of the bare passes, median |\n|---|---|---|")
    for label, of_label in speeds.items():
        share = f"{statistics.median(ratios[label]):.0%}" if label in ratios else ""
        print(f"| {label} | {statistics.median(of_label):,.0f} | {share} |")


def compare_decoding(device: torch.device) -> None:
    """Table 6; on a CPU the smallest shape, to see that it runs."""
    small = device.type == "cpu"
    shape: dict[str, Any] = {"preset": "tiny", "rounds": 1, "tokens": 4} if small else {
        "preset": "1b", "rounds": 5, "tokens": 32,
    }  # fmt: skip
    print("\n| context | model | tables | ms/token | of dense | bound | weights, GB | device, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for context in (64,) if small else (256, 2048):
        spec = DecodeSpec(
            tables=("device", "host", "disk"), device=device.type, context=context, **shape
        )
        for result in bench_decode(spec, SilentProgress()).results:
            on_device = f"{(result.device_bytes or 0) / 1e9:.2f}"
            print(
                f"| {context} | {result.name} | {result.tables or ''} | "
                f"{result.ms_per_token:.2f} | {result.ratio:.3f} | {result.bound:.3f} | "
                f"{result.weights_bytes / 1e9:.2f} | {on_device} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="250m")
    parser.add_argument("--seconds", type=float, default=20)
    asked = parser.parse_args()
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured (see --device cpu --preset tiny)")
        return
    device = Machine(asked.device).device
    print(f"{device_label(device)}, torch {torch.__version__}")
    if device.type == "cuda":
        run_marked_tests()
    check_against_cpu(asked.device)
    gpu_tables.main(device)
    compare_decoding(device)
    for dtype in ("bfloat16", "float32"):
        compare_speed(asked.device, asked.preset, dtype, asked.seconds)


if __name__ == "__main__":
    main()
