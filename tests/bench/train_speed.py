"""Training speed of a memory model against a dense one of the same shape, in one run.

Both take the same windows of the standard library's text through the same optimiser step, turn
by turn, so whatever else the machine does hits both. Printed: tokens per second, distinct ids of
a step, the ratio of multiply-adds, and how much of that ratio the clock shows.

    PYTHONPATH=.:cli:formats python tests/bench/train_speed.py --layers 12 --hidden-size 512

V vocabulary, L layers, D hidden, K inner size, T positions, n distinct ids of a step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tolkit.data import Tokenizer, read_documents, tokens_of
from tolkit.model import Decoder, ModelConfig, preset
from tolkit.train.batches import WindowOrder
from tolkit.train.optimizer import make_optimizer
from tolkit.train.precision import choose_device, choose_dtype
from tolkit.train.step import accumulate_gradients


@dataclass
class Runner:
    """One model with its optimiser and its timings."""

    config: ModelConfig
    device: torch.device
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    distinct_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = Decoder(self.config, generator=generator).to(self.device)
        self.optimizer = make_optimizer(self.model, weight_decay=0.1)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4

    def step(self, windows: torch.Tensor, micro_batch: int, dtype: torch.dtype) -> None:
        self._sync()
        wall, cpu = time.perf_counter(), time.process_time()
        loss = accumulate_gradients(
            self.model, windows, micro_batch=micro_batch, z_weight=1e-6, dtype=dtype
        )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._sync()
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)
        self.distinct_ids.append(loss.distinct_ids)

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def multiply_adds(config: ModelConfig, length: int, ffn_rows_per_token: float) -> float:
    """Forward multiply-adds a token: matrix products and causal attention (half the square)."""
    width, layers = config.hidden_size, config.num_hidden_layers
    attention = 4 * width * width + width * length
    context = 3 * width * config.intermediate_size
    memory = 3 * width * config.memory_intermediate_size * ffn_rows_per_token
    return layers * (attention + context + memory) + width * config.vocab_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--memory-size", type=int, default=1368)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--text", nargs="+", default=["stdlib"])
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()

    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device, options.hidden_size)
    if options.tokenizer is not None:
        tokenizer = Tokenizer.load(options.tokenizer)
    else:
        tokenizer = Tokenizer.train(read_documents(options.text), options.vocab_size)
    order = WindowOrder(tokens_of(options.text, tokenizer).ids, options.sequence, 0)
    base = replace(
        preset("tiny", "memory", vocab_size=tokenizer.vocab_size),
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        memory_intermediate_size=options.memory_size,
        max_position_embeddings=options.sequence,
    )
    dense_config = replace(
        base,
        architecture="dense",
        intermediate_size=options.memory_size,
        memory_intermediate_size=0,
    )
    dense, memory = Runner(dense_config, device), Runner(base, device)
    for step in range(options.steps + 1):
        windows = torch.from_numpy(order.batch(step, options.batch)).to(device)
        for runner in (dense, memory):
            runner.step(windows, options.micro_batch, dtype)
    tokens = options.batch * options.sequence
    distinct = statistics.mean(memory.distinct_ids[1:])
    flop_ratio = multiply_adds(dense.config, options.sequence, 0.0) / multiply_adds(
        memory.config, options.sequence, distinct / tokens
    )
    # Turn by turn, so each pair met the same neighbours; the first pair warms up.
    wall_ratio = statistics.median(
        d / m for d, m in zip(dense.wall_s[1:], memory.wall_s[1:], strict=True)
    )
    cpu_ratio = statistics.median(
        d / m for d, m in zip(dense.cpu_s[1:], memory.cpu_s[1:], strict=True)
    )
    result = {
        "shape": {name: getattr(options, name) for name in ("layers", "hidden_size", "memory_size")}
        | {"vocab_size": tokenizer.vocab_size, "sequence": options.sequence},
        "tokens_per_step": tokens,
        "micro_batches": options.batch // options.micro_batch,
        "distinct_ids_per_step": round(distinct, 1),
        "dense_tokens_per_s": round(tokens / statistics.median(dense.wall_s[1:])),
        "memory_tokens_per_s": round(tokens / statistics.median(memory.wall_s[1:])),
        "flop_ratio": round(flop_ratio, 3),
        "speed_ratio": round(wall_ratio, 3),
        "speed_ratio_of_cpu_time": round(cpu_ratio, 3),
        "share_of_flop_ratio": round(wall_ratio / flop_ratio, 3),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
