"""Memory of `tol eval` against the length of the text: it should not grow.

Each length runs in a process of its own on generated documents; anonymous memory (RssAnon) is
read every 20 ms. The model is small, so that what the text costs stands out.

    python tests/bench/evaluate_memory.py [--tokens 250000,1000000,4000000]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from _memory import PeakMemory

sys.path.insert(0, str(Path(__file__).parents[1]))


def measured(tokens: int, results: multiprocessing.Queue) -> None:
    import torch
    from _eval_fakes import pico_pair, text_of

    from tolkit.data import Document
    from tolkit.evaluate import evaluate, windows_of
    from tolkit.progress import SilentProgress

    torch.set_num_threads(1)
    reference, candidate = pico_pair()
    piece = text_of(5_000)  # a character is a token

    def documents() -> Iterator[Document]:
        for number in range(tokens // len(piece)):
            yield Document(f"text.jsonl:{number}", piece)

    def run(over: Iterator[Document]) -> float:
        windows = windows_of(over, reference.tokenizer, 64)
        evaluate([candidate], reference, windows, device="cpu", progress=SilentProgress())
        return windows.n_tokens

    run(iter([Document("warm", piece)]))
    started_s = time.perf_counter()
    with PeakMemory(0.02) as memory:
        counted = run(documents())
        elapsed_s = time.perf_counter() - started_s
    results.put((counted, elapsed_s, memory.added_mib))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="250000,1000000,4000000")
    lengths = [int(text) for text in parser.parse_args().tokens.split(",")]
    context = multiprocessing.get_context("spawn")
    print("| tokens | seconds | peak above the warmed-up process, MiB |\n|---|---|---|")
    for tokens in lengths:
        results = context.Queue()
        process = context.Process(target=measured, args=(tokens, results))
        process.start()
        counted, elapsed_s, mib = results.get()
        process.join()
        print(f"| {counted:,} | {elapsed_s:.1f} | {mib:.1f} |", flush=True)


if __name__ == "__main__":
    main()
