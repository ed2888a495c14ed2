"""`tol generate`: continue prompts, with a bundle's rows read as they are needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tolkit_cli._command import command
from tolkit_cli._eval_report import require_writable
from tolkit_cli._generate_options import (
    BatchOption,
    ContextOption,
    DtypeOption,
    ForceOption,
    IgnoreEosOption,
    MaxNewTokensOption,
    MaxTableMemoryOption,
    MinPOption,
    ModelArgument,
    PenaltyOption,
    PromptOption,
    PromptsOption,
    ResultsOption,
    SeedOption,
    StopOption,
    TablesOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from tolkit_cli._generate_report import ReaderGoneError, Shown, note_statistics, write_results
from tolkit_cli._options import DeviceOption
from tolkit_cli._output import Output

if TYPE_CHECKING:
    from tolkit.runtime import GenerateSpec, Generation, Session

__all__ = ["generate"]


@command(
    "generate",
    stage="Run",
    examples=[
        'tol generate small.tol -p "It was" --max-new-tokens 40',
        'tol generate small.tol -p "It was" -p "She had" --top-p 0.9 -o texts.jsonl',
    ],
    next_step="tol eval, to measure what compression changed.",
)
def generate(
    out: Output,
    model: ModelArgument,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    results: ResultsOption = None,
    force: ForceOption = False,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    ignore_eos: IgnoreEosOption = False,
    context: ContextOption = None,
    batch: BatchOption = 8,
    tables: TablesOption = None,
    max_table_memory: MaxTableMemoryOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Continue prompts with a bundle or a checkpoint.

    Reads the backbone into memory and, for a bundle, the rows of the tokens it meets, from where
    --tables says; a checkpoint computes its rows. Takes the likeliest tokens unless a way of
    sampling is asked for. Writes nothing but -o FILE.

    The new text of a single prompt comes to stdout as it is made; several are printed in their
    order, batch by batch. Speed, reads and memory follow on stderr (with --json: in the object).
    """
    from tolkit.compress.spec import parse_size
    from tolkit.runtime import GenerateSpec, load_session

    spec = GenerateSpec(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        batch=batch,
        context=context,
    )
    most_bytes = parse_size(max_table_memory, "max_table_memory") if max_table_memory else None
    require_writable({"--out": results}, force)
    texts = _texts(prompt, prompts)
    out.record("inputs", model=model, prompts=len(texts), tables=tables, spec=vars(spec))
    with out.timing("load"):
        session = load_session(
            model, tables=tables, device=device, dtype=dtype, max_table_bytes=most_bytes
        )
    with session:
        with out.timing("generate"):
            found = _continued(out, session, texts, spec, shown=results is None)
        if results is not None:
            write_results(out, found, results)
        else:
            out.record("outputs", generations=[result.to_json() for result in found])
        note_statistics(out, session.statistics)


def _continued(
    out: Output, session: Session, texts: list[str], spec: GenerateSpec, *, shown: bool
) -> list[Generation]:
    """All results; where they are shown, as they come, until nobody reads them."""
    if not shown:
        return session.generate(texts, spec)
    display = Shown(out, len(texts))
    found = []
    try:
        for result in session.generations(texts, spec, on_text=display.piece):
            display.result(result)
            found.append(result)
    except ReaderGoneError:
        pass
    return found


def _texts(prompt: list[str] | None, prompts: Path | None) -> list[str]:
    """The prompts of -p, then those of the file."""
    from tolkit.errors import UsageError
    from tolkit.runtime.prompts import parse_prompts, read_prompts

    texts = list(prompt or [])
    if prompts == Path("-"):
        texts += parse_prompts(sys.stdin.buffer.read(), "standard input", records=False)
    elif prompts is not None:
        texts += read_prompts(prompts)
    if not texts:
        raise UsageError("prompt: there is none", hint="give -p TEXT or --prompts FILE")
    return texts
