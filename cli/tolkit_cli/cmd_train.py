"""`tol train`: a model from text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tolkit_cli._command import command
from tolkit_cli._options import (
    INPUT,
    MODEL,
    OUTPUT,
    RESOURCES,
    WHAT,
    DataArgument,
    DeviceOption,
    ForceOption,
    OutOption,
    RestartOption,
    option,
)
from tolkit_cli._output import Output
from tolkit_cli._units import count_text

__all__ = ["train"]

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
        metavar="CKPT",
        help="Go on from this checkpoint; it fixes model and tokenizer.",
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
    Literal["tiny", "250m", "750m", "1b"],
    option(MODEL, "--preset", metavar="NAME", help="Shape: tiny, 250m, 750m or 1b."),
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
StepsOption = Annotated[
    int | None,
    option(WHAT, "--steps", metavar="N", help="Length in steps. [default: the preset's]"),
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
    option(WHAT, "--sequence", metavar="T", help="Tokens of a window. [default: tiny 128]"),
]
BatchOption = Annotated[
    int | None,
    option(WHAT, "--batch", metavar="N", help="Windows of a step. [default: tiny 16]"),
]
LearningRateOption = Annotated[
    float | None,
    option(
        WHAT,
        "--learning-rate",
        "--lr",
        metavar="X",
        help="Peak learning rate. [default: tiny 0.003]",
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


@command(
    "train",
    stage="Make",
    examples=[
        "tol train stdlib -o ckpt --minutes 1",
        "tol train 'text/*.txt' -o flex --arch flex --beta 1 --vocab-size 512 --steps 20",
    ],
    next_step="tol build CKPT -o B.tol.",
    resumable=True,
)
def train(
    out: Output,
    data: DataArgument,
    path: OutOption,
    valid: ValidOption = None,
    tokenizer: TokenizerOption = None,
    init: InitOption = None,
    cache_dir: CacheOption = None,
    arch: ArchOption = None,
    preset: PresetOption = "tiny",
    beta: BetaOption = None,
    vocab_size: VocabOption = None,
    layers: LayersOption = None,
    hidden_size: HiddenOption = None,
    untied: UntiedOption = False,
    steps: StepsOption = None,
    tokens: TokensOption = None,
    minutes: MinutesOption = None,
    sequence: SequenceOption = None,
    batch: BatchOption = None,
    learning_rate: LearningRateOption = None,
    warmup_steps: WarmupOption = None,
    seed: SeedOption = 0,
    eval_every: EvalEveryOption = None,
    micro_batch: MicroOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    save_every: SaveEveryOption = 0,
    force: ForceOption = False,
    restart: RestartOption = False,
) -> None:
    """Train a MemoryLLM from text.

    Reads text, trains a tokenizer unless one is given, and writes a checkpoint folder: weights,
    tokenizer and token counts. The text is not changed. The tiny preset takes a few minutes on
    two CPU cores; the others are the paper's sizes and want a GPU.

    Give at most one of --steps, --tokens and --minutes. The same command continues an interrupted
    run exactly where it stopped; train_log.jsonl in the result holds the loss of every step.
    """
    from tolkit.train import TrainSpec
    from tolkit.train import train as run

    spec = TrainSpec(
        out=path,
        text=tuple(data),
        valid_text=tuple(valid or ()),
        arch=arch,
        preset=preset,
        beta=beta,
        layers=layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        tie=not untied,
        tokenizer=tokenizer,
        init=init,
        steps=steps,
        tokens=tokens,
        minutes=minutes,
        sequence=sequence,
        batch=batch,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        dtype=dtype,
        device=device,
        seed=seed,
        eval_every=eval_every,
        save_every=save_every,
        cache_dir=cache_dir,
        force=force,
        restart=restart,
    )
    out.record("inputs", data=data, valid=valid, tokenizer=tokenizer, init=init)
    report = run(spec, out.progress())
    out.field("outputs", "checkpoint", report.out)
    size = f"{report.architecture}, {count_text(report.parameters)} parameters"
    out.field("metrics", "parameters", report.parameters, "model", size)
    done = f"{report.steps:,} steps, {count_text(report.tokens)} tokens"
    out.field("metrics", "steps", report.steps, "trained", done)
    out.record("metrics", tokens=report.tokens, architecture=report.architecture)
    out.record("metrics", vocab_size=report.vocab_size, resumed_step=report.resumed_step)
    loss = f"{report.train_loss:.4f} nats a token"
    out.field("metrics", "train_loss_nats", report.train_loss, "training loss", loss)
    held = report.held_out
    if held is not None:
        text = f"{held.loss:.4f} +/- {held.loss_se:.4f} nats, perplexity {held.perplexity:.2f}"
        out.field("metrics", "held_out_loss_nats", held.loss, "held-out loss", text)
        out.record("metrics", held_out_loss_nats_se=held.loss_se, held_out_tokens=held.tokens)
        out.record("metrics", held_out_perplexity=held.perplexity)
    speed = f"{count_text(report.tokens_per_s)} tokens/s, {report.device}, {report.dtype}"
    out.field("metrics", "tokens_per_s", report.tokens_per_s, "speed", speed)
    out.record("metrics", device=report.device, dtype=report.dtype, elapsed_s=report.elapsed_s)
    out.quiet_value(report.out)
