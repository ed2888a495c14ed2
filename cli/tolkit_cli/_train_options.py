"""Option types of `tol train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tolkit_cli._options import INPUT, MODEL, OUTPUT, RESOURCES, WHAT, option

__all__ = [
    "ArchOption",
    "BatchOption",
    "BetaOption",
    "CacheOption",
    "DistillOption",
    "DistillWeightOption",
    "DtypeOption",
    "EvalEveryOption",
    "FreezeEmbeddingsOption",
    "FreezeTablesOption",
    "HiddenOption",
    "InitOption",
    "LayersOption",
    "LearningRateOption",
    "MicroOption",
    "MinutesOption",
    "PresetOption",
    "SaveEveryOption",
    "SeedOption",
    "SequenceOption",
    "StepsOption",
    "TokenizerOption",
    "TokensOption",
    "TuneTablesOption",
    "UntiedOption",
    "ValidOption",
    "VocabOption",
    "WarmupOption",
]

ValidOption = Annotated[
    list[str] | None,
    option(
        INPUT,
        "--valid",
        metavar="TEXT",
        help="Text to measure on. [default: the end of DATA, held out] Repeatable.",
    ),
]
TokenizerOption = Annotated[
    Path | None,
    option(
        INPUT,
        "--tokenizer",
        metavar="PATH",
        help="A tokenizer.json or its folder. [default: train one on DATA]",
    ),
]
InitOption = Annotated[
    Path | None,
    option(
        INPUT,
        "--init",
        metavar="PATH",
        help="Go on from this checkpoint, or with --freeze-tables or --tune-tables from this "
        "bundle; it fixes model and tokenizer.",
    ),
]
DistillOption = Annotated[
    Path | None,
    option(
        INPUT,
        "--distill",
        metavar="REF",
        help="Learn the next-token probabilities of this checkpoint or bundle: minimise KL(REF || "
        "model).",
    ),
]
CacheOption = Annotated[
    Path | None,
    option(INPUT, "--cache", metavar="DIR", help="Keep encoded text here for other runs."),
]
ArchOption = Annotated[
    Literal["memory", "flex", "dense"] | None,
    option(
        MODEL,
        "--arch",
        metavar="NAME",
        help="memory: all FFNs token-wise; flex: a part; dense: none. [default: memory]",
    ),
]
PresetOption = Annotated[
    Literal["tiny", "250m", "750m", "1b"] | None,
    option(
        MODEL, "--preset", metavar="NAME", help="Shape: tiny, 250m, 750m or 1b. [default: tiny]"
    ),
]
BetaOption = Annotated[
    int | None,
    option(
        MODEL,
        "--beta",
        metavar="1|2|3",
        min=1,
        max=3,
        help="flex: share of the FFN that sees the context. [default: 3]",
    ),
]
VocabOption = Annotated[
    int | None,
    option(MODEL, "--vocab-size", metavar="V", help="Tokens. [default: the preset's; tiny 4096]"),
]
LayersOption = Annotated[
    int | None, option(MODEL, "--layers", metavar="L", help="Instead of the preset's.")
]
HiddenOption = Annotated[
    int | None, option(MODEL, "--hidden-size", metavar="D", help="Instead of the preset's.")
]
UntiedOption = Annotated[bool, option(MODEL, "--untied", help="Give the head weights of its own.")]
FreezeTablesOption = Annotated[
    bool,
    option(
        WHAT,
        "--freeze-tables",
        help="Train around the tables of --init, none of which changes. A bundle gives a bundle.",
    ),
]
FreezeEmbeddingsOption = Annotated[
    bool,
    option(
        WHAT,
        "--freeze-embeddings",
        help="Leave the embedding, and a head tied to it, as it is in --init.",
    ),
]
TuneTablesOption = Annotated[
    bool,
    option(
        WHAT,
        "--tune-tables",
        help="Train what the rows of --init share: means, scales, codebooks, bases, predictors. "
        "Records and backbone stay.",
    ),
]
DistillWeightOption = Annotated[
    float | None,
    option(
        WHAT,
        "--distill-weight",
        metavar="X",
        help="Share of --distill in the loss, the text's next token is the rest. [default: 1]",
    ),
]
StepsOption = Annotated[
    int | None,
    option(
        WHAT,
        "--steps",
        metavar="N",
        help="Length in steps. [default: tiny 500, frozen tables 300, tuned 200]",
    ),
]
TokensOption = Annotated[
    int | None, option(WHAT, "--tokens", metavar="N", help="Length in tokens.")
]
MinutesOption = Annotated[
    float | None,
    option(WHAT, "--minutes", metavar="M", help="Length in minutes, turned into steps by timing."),
]
SequenceOption = Annotated[
    int | None,
    option(
        WHAT,
        "--sequence",
        metavar="T",
        help="Tokens of a window. [default: tiny 128, around tables 256]",
    ),
]
BatchOption = Annotated[
    int | None,
    option(
        WHAT, "--batch", metavar="N", help="Windows of a step. [default: tiny 16, around tables 8]"
    ),
]
LearningRateOption = Annotated[
    float | None,
    option(
        WHAT,
        "--learning-rate",
        "--lr",
        metavar="X",
        help="Peak learning rate. [default: tiny 0.003, frozen tables 0.0003, tuned 0.01]",
    ),
]
WarmupOption = Annotated[
    int | None, option(WHAT, "--warmup-steps", metavar="N", help="Steps up to the peak.")
]
SeedOption = Annotated[
    int, option(WHAT, "--seed", metavar="N", help="Of weights and of the order of the text.")
]
EvalEveryOption = Annotated[
    int | None, option(WHAT, "--eval-every", metavar="N", help="Steps between measurements.")
]
MicroOption = Annotated[
    int | None,
    option(
        RESOURCES,
        "--micro-batch",
        metavar="N",
        help="Windows in memory at once. [default: the batch, or the preset's]",
    ),
]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16"],
    option(
        RESOURCES,
        "--dtype",
        metavar="NAME",
        help="auto (bfloat16 where it is faster), float32 or bfloat16; sums stay float32.",
    ),
]
SaveEveryOption = Annotated[
    int,
    option(
        OUTPUT, "--save-every", metavar="N", help="Steps between saved states; 0 = every 2 minutes."
    ),
]
