"""What an evaluation costs beyond the forward passes it cannot avoid.

Two questions, answered with random weights and ids (speed does not depend on their values):

- pass: is evaluating a candidate beside its reference as cheap as evaluating both alone, and what
  share of that is softmax and divergence? Model of V 8192, L 12, D 256.
- softmax: time of `score_positions` over that of the head's bare matrix products in the same
  tiles, and the memory it adds, for several V and D.

Processor seconds, not wall time, so that a shared machine disturbs less.

    python tests/bench/evaluate_cost.py [--threads 1] [--rounds 5]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tolkit.evaluate import Window, Windows, evaluate
from tolkit.evaluate.scoring import Tile, score_positions
from tolkit.model import Decoder, FfnRows, ModelConfig, RowSource
from tolkit.progress import SilentProgress

VOCABULARY, LENGTH, WINDOWS = 8192, 256, 64
# V, D and positions scored.
SOFTMAX_SHAPES = (
    (8192, 256, 2048),
    (32768, 512, 1024),
    (128256, 960, 512),
    (128256, 2048, 256),
)


class StubTokenizer:
    """Enough of a tokenizer for an evaluation whose windows are already cut."""

    digest, vocab_size, bos_id, eos_id = "0" * 64, VOCABULARY, None, None


@dataclass
class Candidate:
    model: Decoder
    rows: RowSource | None
    tokenizer: object = StubTokenizer
    kind: str = "bundle"
    identity: str = "0" * 64
    table_bytes: int | None = None
    bits_per_value: float | None = None
    adjust: None = None


class TableRows:
    """Rows from a float32 table [L, V, D]."""

    def __init__(self, table_LVD: torch.Tensor) -> None:
        self.table_LVD = table_LVD

    def fetch(self, ids_n: torch.Tensor) -> list[torch.Tensor | None]:
        return [plane_VD[ids_n] for plane_VD in self.table_LVD]


def cpu_s(work: Callable[[], object]) -> float:
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


def zipf_windows() -> Windows:
    """Ids drawn with frequency 1 / rank, as text has them."""
    weights = 1 / np.arange(1, VOCABULARY + 1)
    rng = np.random.default_rng(0)
    ids = rng.choice(VOCABULARY, (WINDOWS, LENGTH + 1), p=weights / weights.sum())
    items = [Window(row.astype(np.int32), LENGTH, 4.0 * LENGTH, LENGTH, 0) for row in ids]
    return Windows.of(items, length=LENGTH, tokenizer_digest=StubTokenizer.digest, packed=True)


def whole_pass(rounds: int) -> None:
    config = ModelConfig(
        architecture="memory",
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=0,
        memory_intermediate_size=688,
        max_position_embeddings=LENGTH,
    )
    model, windows = Decoder(config), zipf_windows()
    with torch.no_grad():
        planes = FfnRows(model).fetch(torch.arange(VOCABULARY))
        table_LVD = torch.stack([plane for plane in planes if plane is not None])
    reference, bundle = Candidate(model, None), Candidate(model, TableRows(table_LVD))
    ids_BT = torch.from_numpy(np.stack([w.ids[:-1] for w in windows]).astype(np.int64))

    def run(candidates: list[Candidate], partner: Candidate | None) -> float:
        options = {"device": "cpu", "progress": SilentProgress()}
        return cpu_s(lambda: evaluate(candidates, partner, windows, **options))

    def forward(rows: RowSource | None) -> float:
        with torch.inference_mode():
            return cpu_s(lambda: [model.hidden(ids_BT[i : i + 32], rows=rows) for i in (0, 32)])

    print("\n| alone: FFN, table | together | ratio | two candidates | ratio | outside forward |")
    print("|---|---|---|---|---|---|")
    for _ in range(rounds):
        by_ffn, by_table = run([reference], None), run([bundle], None)
        both, three = run([bundle], reference), run([bundle, bundle], reference)
        bare = forward(None) + forward(bundle.rows)
        print(
            f"| {by_ffn:.2f} s, {by_table:.2f} s | {both:.2f} s | {both / (by_ffn + by_table):.3f} "
            f"| {three:.2f} s | {three / (by_ffn + 2 * by_table):.3f} | {1 - bare / both:.0%} |"
        )


def head_products(hidden_ND: torch.Tensor, head_VD: torch.Tensor, tile: Tile) -> None:
    """The matrix products of one model's scoring, nothing else."""
    out = torch.empty(tile.positions * tile.vocabulary)
    for part_nD in hidden_ND.split(tile.positions):
        for part_vD in head_VD.split(tile.vocabulary):
            shape = len(part_nD), len(part_vD)
            torch.mm(part_nD, part_vD.t(), out=out[: shape[0] * shape[1]].view(shape))


def softmax(rounds: int) -> None:
    # Logits of a few units, as models give: spread over 90 and more, their exponentials are
    # subnormal numbers, which take twice the time.
    print("| V | D | alone / products | pair / products | memory added |")
    print("|---|---|---|---|---|")
    for v, d, n in SOFTMAX_SHAPES:
        hidden = [torch.randn(n, d) for _ in range(2)]
        head_VD, targets = torch.randn(v, d) / d**0.5, torch.randint(0, v, (n,))
        cases: list[Callable[[], object]] = [
            partial(head_products, hidden[0], head_VD, Tile()),
            partial(score_positions, hidden[:1], [head_VD], targets, with_reference=False),
            partial(score_positions, hidden, [head_VD] * 2, targets, with_reference=True),
        ]
        with torch.inference_mode():
            cases[0]()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            cases[2]()
            added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            # Taken in turn, the best of each, so that other load hits all alike.
            times = [[cpu_s(case) for case in cases] for _ in range(rounds)]
        best = [min(column) for column in zip(*times, strict=True)]
        print(
            f"| {v:,} | {d} | {best[1] / best[0]:.2f} | {best[2] / (2 * best[0]):.2f} "
            f"| {added:.0f} MiB |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    softmax(arguments.rounds)  # first: it reads the process's peak memory
    whole_pass(arguments.rounds)


if __name__ == "__main__":
    main()
