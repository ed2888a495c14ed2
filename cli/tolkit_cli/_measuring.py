"""Loading what commands measure with: the model, the reference, the text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tolkit_cli._output import Output

if TYPE_CHECKING:
    from tolkit.evaluate.judge import Judge
    from tolkit.measured import Measured
    from tolkit.tables import Runnable

__all__ = ["MeasuringOptions", "judge_for", "known_from", "require_kin", "require_unused"]


@dataclass(frozen=True)
class MeasuringOptions:
    """What a command line says about measuring."""

    data: list[str] | None = None
    reference: Path | None = None
    other_reference: bool = False
    measured: Path | None = None
    window: int | None = None
    packed: bool = False
    limit_tokens: int | None = None
    batch_tokens: int | None = None
    device: str = "auto"
    dtype: str = "float32"


def require_unused(options: MeasuringOptions) -> None:
    """UsageError for options of measuring where nothing is measured."""
    from tolkit.errors import UsageError

    for name in ("data", "reference", "other_reference", "measured", "window", "packed"):
        if getattr(options, name):
            raise UsageError(
                f"{name}: nothing is measured",
                hint="give --max-kl, --max-ppl-increase or --drop auto, or leave it out",
            )
    if options.limit_tokens or options.batch_tokens:
        raise UsageError("limit_tokens: nothing is measured", hint="leave it out")


def known_from(options: MeasuringOptions) -> Measured:
    """The measurements of --measured, none without."""
    from tolkit.measured import Measured, load_measured

    return Measured() if options.measured is None else load_measured(options.measured)


def require_kin(model: Runnable, partner: Runnable | None, options: MeasuringOptions) -> None:
    """MismatchError where the reference is of other weights, unless that is allowed."""
    from tolkit.tables import require_partners

    if partner is None or options.other_reference or partner.identity == model.identity:
        return
    if model.kind == "bundle":
        require_partners(model, partner)
    else:
        require_partners(partner, model)


def judge_for(
    out: Output, model_path: Path, options: MeasuringOptions, *, itself: bool = True
) -> tuple[Runnable, Judge]:
    """The model, and what it or bundles made of it are judged by.

    Args:
        itself: without --reference the model as it is; False: nothing.
    """
    from tolkit.data import read_documents
    from tolkit.data.limit import limited
    from tolkit.errors import UsageError
    from tolkit.evaluate import windows_of
    from tolkit.evaluate.judge import Judge
    from tolkit.tables import load_runnable

    if not options.data:
        raise UsageError("--data: quality is measured on text", hint="add --data TEXT")
    out.record("inputs", data=options.data, reference=options.reference)
    with out.timing("load"):
        model = load_runnable(model_path)
        partner = load_runnable(options.reference) if options.reference else None
    require_kin(model, partner, options)
    with out.timing("text"):
        documents = read_documents(options.data)
        if options.limit_tokens is not None:
            documents = limited(documents, model.tokenizer, options.limit_tokens)
        length = options.window or model.model.config.max_position_embeddings
        windows = windows_of(documents, model.tokenizer, length, options.packed)
    reference = partner or (model if itself else None)
    if reference is model:
        kind = "checkpoint's own FFN path" if model.kind == "checkpoint" else "bundle as it is"
        out.text(f"{'compared with':<20}  the {kind}")
    judge = Judge(reference, windows, options.dtype, options.device, options.batch_tokens)
    return model, judge
