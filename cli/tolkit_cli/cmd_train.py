"""`tol train`: a model from text, or a bundle's backbone around its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tolkit_cli._command import command
from tolkit_cli._options import (
    DataArgument,
    DeviceOption,
    DryRunOption,
    ForceOption,
    OutOption,
    RestartOption,
)
from tolkit_cli._output import Output
from tolkit_cli._train_options import (
    ArchOption,
    BatchOption,
    BetaOption,
    CacheOption,
    DistillOption,
    DistillWeightOption,
    DtypeOption,
    EvalEveryOption,
    FreezeEmbeddingsOption,
    FreezeTablesOption,
    HiddenOption,
    InitOption,
    LayersOption,
    LearningRateOption,
    MicroOption,
    MinutesOption,
    PresetOption,
    SaveEveryOption,
    SeedOption,
    SequenceOption,
    StepsOption,
    TokenizerOption,
    TokensOption,
    TuneTablesOption,
    UntiedOption,
    ValidOption,
    VocabOption,
    WarmupOption,
)
from tolkit_cli._units import bytes_text, count_text

if TYPE_CHECKING:
    from tolkit.train import HeldOut, TrainPlan, TrainReport

__all__ = ["train"]


@command(
    "train",
    stage="Make",
    examples=[
        "tol train stdlib -o ckpt --minutes 1",
        "tol train 'text/*.txt' -o flex --arch flex --beta 1 --vocab-size 512 --steps 20",
        "tol train stdlib -o healed.tol --init small.tol --freeze-tables --distill ckpt --steps 50",
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
    distill: DistillOption = None,
    cache_dir: CacheOption = None,
    arch: ArchOption = None,
    preset: PresetOption = None,
    beta: BetaOption = None,
    vocab_size: VocabOption = None,
    layers: LayersOption = None,
    hidden_size: HiddenOption = None,
    untied: UntiedOption = False,
    freeze_tables: FreezeTablesOption = False,
    freeze_embeddings: FreezeEmbeddingsOption = False,
    tune_tables: TuneTablesOption = False,
    distill_weight: DistillWeightOption = None,
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
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    restart: RestartOption = False,
) -> None:
    """Train a MemoryLLM from text, or mend what compression lost.

    Reads text, trains a tokenizer unless one is given, and writes a checkpoint folder: weights,
    tokenizer and token counts. The text is not changed. The tiny preset takes a few minutes on
    two CPU cores; the others are the paper's sizes and want a GPU.

    --init B.tol --freeze-tables heals a compressed bundle: it reads the bundle, trains all but the
    tables for minutes so that the model makes up for what they lost, and writes a new bundle with
    the very same tables (hard links where it can) and a new backbone. With --distill CKPT, the
    checkpoint B.tol came from, it learns that model's answers, which brings it closer than text.

    --init B.tol --tune-tables --distill CKPT leaves the model alone: for a bundle of bands or
    steps it trains the numbers that all rows share, at no byte more, and writes a bundle with the
    same records and the same backbone. Where tables are nearly right, it gains more than healing.

    --init CKPT --freeze-tables keeps embedding, memory norms and FFNs, and writes a checkpoint.

    Give at most one of --steps, --tokens and --minutes. The same command continues an interrupted
    run exactly where it stopped; train_log.jsonl in a checkpoint holds the loss of every step.
    """
    from tolkit.train import TrainSpec, plan_run
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
        freeze_tables=freeze_tables,
        freeze_embeddings=freeze_embeddings,
        tune_tables=tune_tables,
        distill=distill,
        distill_weight=distill_weight,
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
    out.record("inputs", distill=distill)
    if dry_run:
        _show_plan(out, plan_run(spec))
        return
    _show_report(out, run(spec, out.progress()))


def _show_plan(out: Output, plan: TrainPlan) -> None:
    out.record("outputs", dry_run=True, kind=plan.kind)
    size = bytes_text(plan.size_bytes)
    out.field("outputs", "bytes", plan.size_bytes, f"{plan.kind} size", f"{size} predicted")
    _show_model(out, plan)
    budget = f"{plan.steps:,} steps" if plan.steps is not None else f"{plan.minutes:g} minutes"
    text = f"{budget} of {plan.batch} windows of {plan.sequence} tokens"
    out.field("metrics", "steps", plan.steps, "length", text)
    if plan.steps is None:
        out.field("metrics", "minutes", plan.minutes, "length", text)
    out.record("metrics", batch=plan.batch, sequence=plan.sequence)
    out.field("metrics", "learning_rate", plan.learning_rate, "learning rate")
    out.field("metrics", "distill_weight", plan.distill_weight, "share of distill")
    out.field("metrics", "work_folder", plan.unfinished, "continues")
    out.quiet_value(plan.size_bytes)


def _show_model(out: Output, run: TrainPlan | TrainReport) -> None:
    parameters, trained = run.parameters, run.trained_parameters
    size = f"{run.architecture}, {count_text(parameters)} parameters"
    if run.tuned:
        size += f", none trained, but {count_text(trained)} numbers of its tables"
    elif trained != parameters:
        size += f", {count_text(trained)} of them trained"
    out.field("metrics", "parameters", parameters, "model", size)
    out.record("metrics", architecture=run.architecture, trained_parameters=trained)


def _show_report(out: Output, report: TrainReport) -> None:
    out.field("outputs", "bundle" if report.identity else "checkpoint", report.out)
    out.record("outputs", identity=report.identity)
    _show_model(out, report)
    done = f"{report.steps:,} steps, {count_text(report.tokens)} tokens"
    out.field("metrics", "steps", report.steps, "trained", done)
    out.record("metrics", tokens=report.tokens, vocab_size=report.vocab_size)
    out.record("metrics", resumed_step=report.resumed_step)
    rate = report.learning_rate
    out.field("metrics", "learning_rate", rate, "learning rate", f"{rate:g} at its peak")
    loss = f"{report.train_loss:.4f} nats a token"
    out.field("metrics", "train_loss_nats", report.train_loss, "training loss", loss)
    if report.before is not None:
        _show_held_out(out, report.before, "before_", "held-out loss before")
    if report.held_out is not None:
        _show_held_out(out, report.held_out, "", "held-out loss")
    speed = f"{count_text(report.tokens_per_s)} tokens/s, {report.device}, {report.dtype}"
    out.field("metrics", "tokens_per_s", report.tokens_per_s, "speed", speed)
    out.record("metrics", device=report.device, dtype=report.dtype, elapsed_s=report.elapsed_s)
    out.quiet_value(report.out)


def _show_held_out(out: Output, held: HeldOut, prefix: str, title: str) -> None:
    text = f"{held.loss:.4f} +/- {held.loss_se:.4f} nats, perplexity {held.perplexity:.2f}"
    if held.kl is not None:
        text += f", KL {held.kl:.5f}"
    out.field("metrics", f"{prefix}held_out_loss_nats", held.loss, title, text)
    facts = {
        "loss_nats_se": held.loss_se,
        "tokens": held.tokens,
        "perplexity": held.perplexity,
        "kl_nats": held.kl,
    }
    named = {f"{prefix}held_out_{name}": value for name, value in facts.items()}
    out.record("metrics", **{name: value for name, value in named.items() if value is not None})
