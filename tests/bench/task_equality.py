"""Tasks here and in lm-evaluation-harness, on the same items and weights, as a table.

Text, choices and accuracies must be equal or the run stops; the table shows how far apart the
log-likelihoods are (the harness sums in float32). The task files are not part of the project.

    python tests/bench/task_equality.py CKPT [--shared ../shared] [--items 200] [--pages 10]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "core")]

import test_tasks_lm_eval as cases  # noqa: E402  # lies beside, not in a package
import transformers  # noqa: E402
from _lm_eval import compare  # noqa: E402
from _task_rows import write_rows  # noqa: E402

from tolkit.tables import load_runnable  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--pages", type=int, default=10)
    asked = parser.parse_args()
    cases.SHARED, cases.FEW = asked.shared / "data", asked.items
    runnable = load_runnable(asked.checkpoint)
    kind = runnable.model.config.architecture
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.checkpoint)
    options = {"batch_size": 16}
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        options["prefix_token_id"] = 0  # the harness does not run without one
    rows = {name: cases.shared_rows(name) for name in cases.SPLITS}
    rows["wikitext"] = cases.shared_pages()[: asked.pages]
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        found = compare(
            runnable,
            cases.transformers_model(kind, asked.checkpoint),
            tokenizer,
            write_rows(Path(folder), rows),
            rows,
            {"hellaswag": cases.CLEANED},
            **options,
        )
    print(f"{kind}, both in {time.perf_counter() - started_s:.0f} s, {options}")
    print("| task | n | metric | here | harness | same choices | largest difference, nats |")
    print("|---|---|---|---|---|---|---|")
    for name, (ours, theirs, apart) in found.items():
        same = sum(
            outcome.choice == max(range(len(scores)), key=scores.__getitem__)
            for outcome, scores in zip(ours.outcomes, theirs.scores, strict=True)
            if outcome.choice is not None
        )
        for metric, value in ours.metrics.items():
            their_name = {"ppl_word": "word_perplexity", "ppl_byte": "byte_perplexity"}
            expected = theirs.metrics[their_name.get(metric, metric)]
            choices = f"{same}/{ours.n}" if ours.outcomes[0].choice is not None else ""
            print(
                f"| {name} | {ours.n} | {metric} | {value.value:.9g} | {expected:.9g} | {choices} "
                f"| {apart:.1e} |"
            )


if __name__ == "__main__":
    main()
