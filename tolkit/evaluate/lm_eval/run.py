"""Any task of lm-evaluation-harness on a checkpoint or a bundle.

The harness and its torch back end come with the extra `tolkit[lm-eval]`. Its task files may name
Python functions, which run: give an `include_path` only to files you trust.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tolkit.errors import CheckpointError, DataError, ResourceError, TolError, UsageError
from tolkit.evaluate.lm_eval._quiet import quietly
from tolkit.evaluate.lm_eval.result import HarnessResult, PrefixToken, parse_results, plain_json
from tolkit.evaluate.runnable import device_label, full_float32, pick_device, pick_dtype
from tolkit.model import checkpoint_tensors
from tolkit.progress import Progress, TqdmProgress
from tolkit.sources import is_bundle

__all__ = ["HarnessResult", "run_lm_eval"]

_NEEDED = ("transformers", "lm_eval", "accelerate")
_RESAMPLES = 1000  # for metrics whose error is bootstrapped
_FILLERS = ("pad_token", "unk_token", "eos_token")  # what HFLM pads with, in this order


def run_lm_eval(
    path: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | float | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    batch_size: int = 8,
    num_fewshot: int | None = None,
    prefix_token_id: int | None = None,
    progress: Progress | None = None,
) -> HarnessResult:
    """Run tasks of lm-evaluation-harness, whose prompts, scoring and data sets apply unchanged.

    A text without a context needs a token before it: bos, else eos, else the line feed (told as
    a warning and in the result). A model whose tokenizer has no eos generates until a task's own
    stop string or its limit of tokens.

    Args:
        path: checkpoint folder (dense, memory or flex) or bundle.
        tasks: names of tasks or groups; each is run by itself.
        include_path: folder with task files of your own.
        limit: documents of each task, or below 1 a share of them; None: all.
        device: auto, cpu or cuda[:N].
        dtype: number format the model runs in.
        num_fewshot: examples before each question; None: as the task says. A task fixed to 0
            stays there.
        prefix_token_id: the token before a text without a context, instead of the above.
        progress: one unit a task.

    Raises:
        UsageError: unknown task (close names are told), impossible option, no prefix token.
        ResourceError: extra not installed, no such device, a data set that cannot be reached.
        DataError: a task that the harness cannot run. InputError and its kin: see `load`.
    """
    _require_extra()
    names = list(dict.fromkeys(tasks))
    _check_options(names, limit, batch_size)
    manager = _task_manager(names, include_path)
    place, number_format = pick_device(device), pick_dtype(dtype)
    progress = progress or TqdmProgress()
    model, tokenizer = _load(Path(path), place, number_format)
    prefix = _prefix_token(tokenizer, model.config.vocab_size, prefix_token_id)
    if prefix.source == "line feed":
        progress.warn(
            "the tokenizer has neither bos nor eos: texts without a context are scored after a "
            f"line feed (token {prefix.id})"
        )
    found: dict[str, Any] = {}
    config: Mapping[str, Any] = {}
    with progress.task("lm-eval", len(names), "task") as bar:
        for name in names:
            bar.note(name)
            with quietly(place), full_float32():
                harness = _harness(model, tokenizer, prefix, batch_size)
                results = _run(harness, name, manager, limit, num_fewshot)
            found.update(parse_results(results))
            config = plain_json(results["config"])
            bar.advance(1)
    return HarnessResult(
        tasks=found,
        prefix_token=prefix,
        kind="bundle" if is_bundle(Path(path)) else "checkpoint",
        device=device_label(place),
        dtype=str(number_format).removeprefix("torch."),
        versions={name: version(name) for name in ("lm_eval", "torch", "transformers")},
        config={
            **config,
            "batch_size": batch_size,
            "device": str(place),
            "num_fewshot": num_fewshot,
        },
    )


def _require_extra() -> None:
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ResourceError(
                f"tolkit[lm-eval] is not installed ({name} is missing)",
                hint="pip install 'tolkit[lm-eval]'",
            ) from error


def _check_options(names: list[str], limit: int | float | None, batch_size: int) -> None:
    if not names:
        raise UsageError("tasks: none given, expected names of lm-eval tasks")
    if limit is not None and not (limit > 0 and (limit < 1 or limit == int(limit))):
        raise UsageError(f"limit: expected a count or a share below 1, got {limit}")
    if batch_size < 1:
        raise UsageError(f"batch_size: expected at least 1, got {batch_size}")


def _task_manager(names: list[str], include_path: str | Path | None) -> Any:
    """The harness's index of tasks; UsageError when one of `names` is not in it."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UsageError(f"{include_path}: no such folder, expected one with task files")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own  # indexing the 14,000 that come with the harness takes seconds
    where = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=where)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise UsageError(
                f"task {name!r}: lm-eval does not know it"
                + (f", close names are {', '.join(close)}" if close else ""),
                hint="list all with: lm-eval ls tasks",
            )
    return manager


def _load(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer as transformers objects; a dense checkpoint is checked before Llama."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tolkit.hf  # noqa: F401  # registers memory and flex models

    if not is_bundle(path):
        checkpoint_tensors(path)
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{path}: no tokenizer.json, text cannot be scored",
            hint="put the tokenizer.json the model was trained with into the folder",
        )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.to(device).eval(), tokenizer


def _prefix_token(tokenizer: Any, vocab_size: int, given: int | None) -> PrefixToken:
    candidates = (
        ("given", given),
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("line feed", _only_token(tokenizer, "\n")),
    )
    source, token_id = next((c for c in candidates if c[1] is not None), ("", None))
    if token_id is None:
        raise UsageError(
            "tokenizer: has neither bos nor eos nor a token for the line feed, expected one to "
            "stand before a text",
            hint="name one with prefix_token_id",
        )
    if not 0 <= token_id < vocab_size:
        raise UsageError(f"prefix token: expected an id below {vocab_size}, got {token_id}")
    return PrefixToken(token_id, tokenizer.decode([token_id]), source)


def _only_token(tokenizer: Any, text: str) -> int | None:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


def _harness(model: Any, tokenizer: Any, prefix: PrefixToken, batch_size: int) -> Any:
    """The model as lm-eval's own HFLM, kept from the network and from ids outside the table."""
    from lm_eval.models.huggingface import HFLM

    class TolkitLM(HFLM):  # type: ignore[misc]  # lm_eval has no types here
        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
            """None for None: the harness asks so for the text of an eos that is not there."""
            return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

        def get_model_info(self) -> dict[str, Any]:
            """What is known here; HFLM would ask the Hub for a model of this name."""
            return {
                "model_num_parameters": self.model.num_parameters(),
                "model_dtype": str(self.model.dtype),
            }

    if all(getattr(tokenizer, name) is None for name in _FILLERS):
        tokenizer.pad_token_id = prefix.id  # HFLM would add one, beyond the last table row
    return TolkitLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        prefix_token_id=prefix.id,
    )


def _run(
    harness: Any, name: str, manager: Any, limit: int | float | None, num_fewshot: int | None
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate

    try:
        results: Mapping[str, Any] = simple_evaluate(
            harness,
            tasks=[name],
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=_RESAMPLES,
        )
        return results
    except (TolError, MemoryError, torch.OutOfMemoryError):
        raise
    except (OSError, ImportError) as error:
        raise ResourceError(
            f"task {name}: not to be had here: {_first_line(error)}",
            hint="fetch its data set where there is a network, or give local task files",
        ) from error
    except Exception as error:  # a task file can fail in any way; the cause is shown by --debug
        raise DataError(f"task {name}: lm-eval cannot run it: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
