"""The local Fisher metric of a model with tables: how much an error of each layer's row matters.

For table L, G_L = E[g g^T], where g is the gradient, at one position, of the log-likelihood of
labels the model itself draws, with respect to what the one reader of that table's error reads
(`probes`). To second order an error e of the running sum after table L costs e^T G_L e / 2 nats a
token, as long as the next table pays it back. In directions that matter little this holds for
small errors only (a norm in between bends what is large), so whoever spends bits by it adds a part
of the mean diagonal first.

L layers, N scored positions, D hidden, W windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit import ranks
from tolkit.calibrate.probes import reader_gradients
from tolkit.calibrate.select import spread_windows
from tolkit.errors import CheckpointError, NonFiniteError, UsageError
from tolkit.evaluate.batching import batches
from tolkit.evaluate.forward import Machine
from tolkit.evaluate.partners import check_partners
from tolkit.evaluate.runnable import Placed
from tolkit.evaluate.windows import TextDocument, Windows, windows_of
from tolkit.progress import Progress, TqdmProgress
from tolkit.tables import Runnable
from tolkit_formats.manifest import Sources

__all__ = ["CalibrationSpec", "Measured", "calibrate"]

_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_BLOCK_ROWS = 1024
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class CalibrationSpec:
    """What to measure on.

    Attributes:
        tokens: scored positions at most; windows spread evenly over the text are taken.
        seed: of the labels.
        window: tokens read at once; None is the model's most (or `tokens`, where that is less).
        dtype: float32 or bfloat16, the number format of the passes.
        device: auto, cpu, cuda or cuda:N.
    """

    tokens: int = 50_000
    seed: int = 0
    window: int | None = None
    dtype: str = "float32"
    device: str = "auto"


@dataclass(frozen=True, eq=False)
class Measured:
    """Metrics of all layers and what they were measured on.

    grams: per layer N G, symmetric float64 [D, D] on the CPU.
    tokens: N, scored positions.
    sources: of the model.      text_digest: SHA-256 over the whole text, used or not.
    """

    grams: Sequence[Tensor]
    tokens: int
    n_windows: int
    window: int
    text_digest: str
    seed: int
    dtype: str
    sources: Sources

    def metric_DD(self, layer: int) -> Tensor:
        """G of one layer, symmetric float64 [D, D]."""
        return self.grams[layer] / self.tokens

    def mean_diagonal(self, layer: int) -> float:
        """Trace of G over D."""
        return float(self.grams[layer].diagonal().mean()) / self.tokens

    def effective_rank(self, layer: int) -> float:
        """(trace G)^2 / trace G^2: D where all directions matter alike, 1 where one does.

        0 where none does.
        """
        square = float(self.grams[layer].square().sum())
        return float(self.grams[layer].trace()) ** 2 / square if square else 0.0


def calibrate(
    model: Runnable,
    documents: Iterable[TextDocument],
    spec: CalibrationSpec = CalibrationSpec(),  # frozen
    progress: Progress | None = None,
) -> Measured:
    """Measure the local Fisher metric of every layer.

    Documents are cut into windows as `tol eval` cuts them. A window's log-likelihood is summed
    over its scored positions and each of these gives one gradient, so positions that are context
    only do not enter.

    Memory: L x D x D float64 for the sums (805 MB at L 24, D 2048), and what autograd keeps of
    2,048 tokens (16,384 on CUDA) or one window, probes and gradients included: some 8 L x D
    values a token.
    Time: one forward and one backward pass without weight gradients, all layers at once.

    On one device the result is the same bits for the same text, spec and number of intra-op
    threads; more threads split products elsewhere, which moves the last bits of float32 and, once
    in millions of positions, a label.

    Args:
        model: a checkpoint or bundle with tables; not changed.
        documents: the text; it is read and cut whole, windows are taken from all of it.
        spec: how much, on what.
        progress: where to report; tqdm by default.

    Raises:
        CheckpointError: a dense model.      UsageError: a spec that cannot be met.
        DataError: nothing to score.         MismatchError: text and model do not belong together.
        NonFiniteError: gradients of NaN or infinity.      ResourceError: no such device, memory.
    """
    sources = _require_tables(model)
    _require_sense(spec)
    machine = Machine(spec.device, spec.dtype)
    machine.batch_tokens = _BATCH_TOKENS[machine.device.type]
    longest = spec.window or model.model.config.max_position_embeddings
    windows = windows_of(documents, model.tokenizer, min(longest, spec.tokens))
    check_partners([model], None, windows, [str(model.path)])
    chosen = spread_windows(windows.scored_W, spec.tokens)
    config = model.model.config
    with machine.running(gradients=True):
        shape = (config.hidden_size, config.hidden_size)
        grams = [
            torch.zeros(shape, dtype=torch.float64, device=machine.device)
            for _ in range(config.num_hidden_layers)
        ]
        placed = machine.place(model)
        _accumulate(placed, windows, chosen, spec.seed, grams, machine, progress, str(model.path))
    return Measured(
        grams=[(gram_DD + gram_DD.T).div_(2).cpu() for gram_DD in grams],
        tokens=int(windows.scored_W[chosen].sum()),
        n_windows=len(chosen),
        window=windows.length,
        text_digest=windows.text_digest,
        seed=spec.seed,
        dtype=spec.dtype,
        sources=sources,
    )


def _accumulate(
    placed: Placed,
    windows: Windows,
    chosen: npt.NDArray[np.int64],
    seed: int,
    grams: Sequence[Tensor],
    machine: Machine,
    progress: Progress | None,
    label: str,
) -> None:
    """Add every chosen window's gradients to the grams (mutated)."""
    scored_C = windows.scored_W[chosen]
    # Drawn for the whole text at once: a label does not depend on what shares its batch.
    uniforms = np.random.default_rng(seed).random(int(scored_C.sum()))
    ends = np.cumsum(scored_C, dtype=np.int64)
    uniforms_of = dict(zip(chosen.tolist(), np.split(uniforms, ends[:-1]), strict=True))
    progress = progress or TqdmProgress()
    with progress.task("calibrate", len(uniforms), "token") as task:
        for batch in batches(windows.lengths_W, chosen.tolist(), machine.batch_tokens):
            ids_BT, place_N = _stacked(windows, batch)
            uniforms_N = np.concatenate([uniforms_of[window] for window in batch])
            gradients = reader_gradients(
                placed,
                ids_BT.to(machine.device),
                place_N.to(machine.device),
                torch.from_numpy(uniforms_N).to(machine.device),
            )
            for layer, gradient_ND in enumerate(gradients):
                if not bool(torch.isfinite(gradient_ND).all()):
                    raise NonFiniteError(
                        f"{label}: NaN or infinite gradient behind table {layer}, first in "
                        f"{windows.name_of(min(batch))}",
                        hint="try --dtype float32, and tol eval to see whether the model runs",
                    )
                _add_products(grams[layer], gradient_ND.float())
            task.advance(len(uniforms_N))


def _add_products(gram_DD: Tensor, gradient_ND: Tensor) -> None:
    """Float32 products of some rows at a time, summed in float64 (mutated)."""
    for start in range(0, len(gradient_ND), _BLOCK_ROWS):
        block_nD = gradient_ND[start : start + _BLOCK_ROWS]
        gram_DD += block_nD.T @ block_nD


def _stacked(windows: Windows, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inputs int64 [B, T] and scored places int64 [N]; a row each, even for windows alike.

    Shorter rows are filled on the right with their last input, which no scored position sees.
    """
    items = [windows[window] for window in batch]
    longest = max(len(item.ids) for item in items) - 1
    ids_BT = np.empty((len(items), longest), np.int64)
    places = []
    for row, item in enumerate(items):
        count = len(item.ids) - 1
        ids_BT[row, :count] = item.ids[:-1]
        ids_BT[row, count:] = item.ids[-2]
        end = row * longest + count
        places.append(np.arange(end - item.scored, end))
    return torch.from_numpy(ids_BT), torch.from_numpy(np.concatenate(places))


def _require_tables(model: Runnable) -> Sources:
    if model.sources is None:
        raise CheckpointError(
            f"{model.path}: is a dense checkpoint, so it has no tables whose errors could matter",
            hint="train one with: tol train DATA -o CKPT --arch memory",
        )
    return model.sources


def _require_sense(spec: CalibrationSpec) -> None:
    for name, value, least in (("tokens", spec.tokens, 1), ("seed", spec.seed, 0)):
        if value < least:
            raise UsageError(f"{name}: expected at least {least}, got {value}")
    if spec.window is not None and spec.window < 1:
        raise UsageError(f"window: expected at least 1 token, got {spec.window}")
    if spec.dtype not in _DTYPES:
        raise UsageError(
            f"dtype: gradients need float32's range, expected {' or '.join(_DTYPES)}, "
            f"got {spec.dtype}"
        )
    if ranks.world_size() > 1:
        raise UsageError("calibrate: runs in one process", hint="run it without torchrun")
