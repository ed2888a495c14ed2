"""`tol count`: how often each token stands in a text, for weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tolkit_cli._command import command
from tolkit_cli._options import INPUT, DataArgument, ForceOption, OutOption, option
from tolkit_cli._output import Output

__all__ = ["count"]

TokenizerOption = Annotated[
    Path,
    option(
        INPUT,
        "--tokenizer",
        metavar="PATH",
        help="Whose tokens: a bundle, a checkpoint folder or a tokenizer.json.",
    ),
]


@command(
    "count",
    stage="Make",
    examples=[
        "tol count stdlib:valid --tokenizer full.tol -o counts.safetensors",
        "tol count stdlib:valid --tokenizer ckpt -o counts.safetensors --force",
    ],
    next_step="tol compress --weights counts.safetensors.",
)
def count(
    out: Output,
    data: DataArgument,
    tokenizer: TokenizerOption,
    path: OutOption,
    force: ForceOption = False,
) -> None:
    """Count how often each token stands in a text.

    Reads text and writes a file of V counts (8 bytes each). tol train writes one into its
    checkpoint already; count other text where the tables will serve another domain. Millions of
    tokens a minute.
    """
    from tolkit.counts import save_counts
    from tolkit.data import Tokenizer, count_tokens, tokens_of
    from tolkit.errors import OutputExistsError

    if path.exists() and not force:
        raise OutputExistsError(
            f"{path}: already exists", hint="choose another name, or add --force"
        )
    out.record("inputs", data=data, tokenizer=tokenizer)
    words = Tokenizer.load(tokenizer)
    with out.timing("count"):
        stream = tokens_of(data, words)
        counts_V = count_tokens(stream, words.vocab_size)
    save_counts(path, counts_V, words.digest)
    seen = int((counts_V > 0).sum())
    total = int(counts_V.sum())
    out.field("outputs", "counts", path)
    out.field("metrics", "tokens", total, text=f"{total:,}")
    out.field("metrics", "distinct", seen, text=f"{seen:,} of {words.vocab_size:,}")
    out.quiet_value(total)
