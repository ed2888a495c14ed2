"""The real lm-evaluation-harness as a judge, over rows in memory and without a network.

Its installed task definitions are used as they are; only where the rows come from is replaced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Before the libraries behind the harness are imported: they must not look for a network.
for _switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_switch] = "1"

pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytest.importorskip("accelerate", reason="the harness' models need accelerate")

import datasets  # noqa: E402
from lm_eval.api.metrics import mean_stderr  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from tolkit.evaluate.tasks import Item, TaskResult, evaluate_tasks, load_task  # noqa: E402
from tolkit.progress import SilentProgress  # noqa: E402

DEFINITIONS = {
    "lambada": "lambada/lambada_openai.yaml",
    "siqa": "siqa/siqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
# What the harness calls our metrics.
THEIR_NAMES = {"ppl_word": "word_perplexity", "ppl_byte": "byte_perplexity"}


@dataclass(frozen=True)
class Judged:
    """What the harness found for one task.

    requests: for each item the texts it scored.   scores: for each item its log-likelihoods.
    greedy: whether the first continuation of each item was.   metrics, se: by its own names.
    """

    requests: list[list[tuple[str, ...]]]
    scores: list[list[float]]
    greedy: list[bool]
    metrics: dict[str, float]
    se: dict[str, float]


def task_of(name: str, rows: Sequence[Mapping[str, Any]], **overrides: Any) -> Any:
    """The harness' own task of ours called `name`, on `rows`."""
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / DEFINITIONS[name])
    for key in ("dataset_path", "dataset_name", "training_split", "validation_split"):
        config.pop(key, None)
    data = {"test": datasets.Dataset.from_list(list(rows))}
    config |= {"test_split": "test", "custom_dataset": lambda **_: data, "num_fewshot": 0}
    return ConfigurableTask(config={**config, **overrides})


def judge(
    model: Any, tokenizer: Any, tasks: Mapping[str, Any], **options: Any
) -> dict[str, Judged]:
    """Run the harness on a transformers model; `options` go to its HFLM."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", **{"batch_size": 8, **options})
    found = evaluate(lm, dict(tasks), bootstrap_iters=0)
    assert found is not None
    judged = {}
    for name in tasks:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        rolling = tasks[name].OUTPUT_TYPE == "loglikelihood_rolling"
        responses = [sample["filtered_resps"] for sample in samples]
        judged[name] = Judged(
            requests=[[tuple(args) for args in sample["arguments"]] for sample in samples],
            scores=[[r if rolling else r[0] for r in of_item] for of_item in responses],
            greedy=[False if rolling else of_item[0][1] for of_item in responses],
            metrics={
                key.removesuffix(",none"): value
                for key, value in found["results"][name].items()
                if key.endswith(",none")
            },
            se={
                metric: mean_stderr([sample[metric] for sample in samples])
                for metric in ("acc", "acc_norm")
                if metric in samples[0] and len(samples) > 1
            },
        )
    return judged


def check_equal(ours: TaskResult, items: Sequence[Any], theirs: Judged) -> float:
    """Demand equal texts, likelihoods, choices and metrics; returns the largest difference of
    log-likelihoods. The harness sums in float32: 1e-4 apart, or 3e-7 of sums of hundreds of nats.
    """
    for item, requests in zip(items, theirs.requests, strict=True):
        texts = list(item.pairs) if isinstance(item, Item) else [(item.text,)]
        assert texts == requests
    apart = 0.0
    for outcome, scores, greedy in zip(ours.outcomes, theirs.scores, theirs.greedy, strict=True):
        apart = max(apart, float(np.abs(np.subtract(outcome.log_likelihoods, scores)).max()))
        np.testing.assert_allclose(outcome.log_likelihoods, scores, rtol=3e-7, atol=1e-4)
        if outcome.gold is not None:
            assert outcome.choice == int(np.argmax(scores))
        elif outcome.greedy is not None:
            assert outcome.greedy == greedy
    for name, metric in ours.metrics.items():
        expected = theirs.metrics[THEIR_NAMES.get(name, name)]
        if name in theirs.se:
            assert metric.value == expected
            assert metric.se == pytest.approx(theirs.se[name], rel=1e-12)
        else:
            tolerance = 1e-5 if name == "perplexity" else 1e-6
            assert metric.value == pytest.approx(expected, rel=tolerance), (name, apart)
    return apart


def compare(
    runnable: Any,
    model: Any,
    tokenizer: Any,
    files: Mapping[str, Path],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> dict[str, tuple[TaskResult, Judged, float]]:
    """Ours on `files` against the harness on `rows`, by task."""
    data = [load_task(name, path) for name, path in files.items()]
    prefix_id = options.get("prefix_token_id")
    (results,) = evaluate_tasks(
        [runnable],
        None,
        data,
        device="cpu",
        progress=SilentProgress(),
        window=options.get("max_length"),
        prefix_id=prefix_id,
    )
    tasks = {name: task_of(name, rows[name], **(overrides or {}).get(name, {})) for name in files}
    judged = judge(model, tokenizer, tasks, **options)
    return {
        task.name: (
            result,
            judged[task.name],
            check_equal(result, task.items, judged[task.name]),
        )
        for task, result in zip(data, results, strict=True)
    }
