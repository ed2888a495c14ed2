"""Running models over windows: every candidate beside the reference, which runs once a window.

R rows and T positions of a batch, N scored positions, D hidden, W windows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tolkit import ranks
from tolkit.errors import ResourceError, UsageError
from tolkit.evaluate.batching import batches, padded
from tolkit.evaluate.metrics import Tally
from tolkit.evaluate.runnable import Placed, Runnable, full_float32, pick_device, pick_dtype
from tolkit.evaluate.scoring import score_positions
from tolkit.evaluate.windows import Window, Windows
from tolkit.progress import Progress, Task

__all__ = ["TABLE_PLACES", "ForwardPass", "Machine"]

TABLE_PLACES = ("auto", "resident", "streamed")
_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}


class Machine:
    """Where and how models run: device, number format, tokens read at once.

    Args:
        device: auto, cpu, cuda or cuda:N.
        dtype: number format of the forward passes. Products in float32 are real float32.
        batch_tokens: tokens read at once; by default 8,192 on a CPU, 65,536 on CUDA. Halved,
            with a warning, whenever memory runs out.
        tables: where a bundle's rows are kept: "streamed" decodes those of each batch on the
            CPU, "resident" all of them once, onto the device; "auto" is resident on CUDA where
            they take at most half of what is free.

    Raises:
        UsageError: an unknown device, dtype or place for tables, or batch_tokens below 1.
        ResourceError: no such device here.
    """

    def __init__(
        self,
        device: str = "auto",
        dtype: str | torch.dtype = "float32",
        batch_tokens: int | None = None,
        tables: str = "auto",
    ) -> None:
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype)
        self.batch_tokens = (
            _BATCH_TOKENS[self.device.type] if batch_tokens is None else batch_tokens
        )
        if self.batch_tokens < 1:
            raise UsageError(f"batch_tokens: expected at least 1, got {batch_tokens}")
        if tables not in TABLE_PLACES:
            raise UsageError(f"tables: expected {', '.join(TABLE_PLACES)}, got {tables!r}")
        self.tables = tables

    @contextmanager
    def running(self, *, gradients: bool = False) -> Iterator[None]:
        """For the passes: real float32, out of memory as ResourceError, gradients if asked for."""
        try:
            with full_float32(), torch.inference_mode(not gradients):
                yield
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise ResourceError(
                f"batch_tokens: out of memory while reading {self.batch_tokens:,} tokens at once",
                hint="use a smaller --window, --dtype bfloat16, or a machine with more memory",
            ) from error

    def place(self, runnable: Runnable, dtype: torch.dtype | None = None) -> Placed:
        """The runnable on this device, in this machine's number format or another."""
        dtype = self.dtype if dtype is None else dtype
        resident = runnable.rows is not None and self._is_resident(runnable, dtype)
        return Placed(runnable, self.device, dtype, resident=resident)

    def _is_resident(self, runnable: Runnable, dtype: torch.dtype) -> bool:
        if self.tables != "auto" or self.device.type != "cuda":
            return self.tables == "resident"
        config = runnable.model.config
        values = config.vocab_size * config.num_hidden_layers * config.hidden_size
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        return 2 * values * dtype.itemsize <= free_bytes

    def now_s(self) -> float:
        """The clock, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class ForwardPass:
    """Models, their tallies and the clock of one pass; the first model may be a reference.

    Args:
        models: placed by `machine`; all read the same windows.
        windows: what `run` indexes into.
        with_reference: compare every later model with the first.

    Attributes:
        tallies: one a model, filled by `run`.
        forward_s, scoring_s: seconds of each model's forward passes, and of the softmaxes.
        elapsed_s: of the whole run.
    """

    def __init__(
        self,
        models: Sequence[Placed],
        windows: Sequence[Window],
        machine: Machine,
        *,
        with_reference: bool,
    ) -> None:
        self.models = models
        self.windows = windows
        self._lengths = (
            windows.lengths_W
            if isinstance(windows, Windows)
            else [len(window.ids) for window in windows]
        )
        self.machine = machine
        self.with_reference = with_reference
        self.tallies = [
            Tally(len(windows), compared=with_reference and model > 0)
            for model in range(len(models))
        ]
        self.forward_s = [0.0] * len(models)
        self.scoring_s = 0.0
        self.elapsed_s = 0.0

    def run(self, indices: Sequence[int], progress: Progress | None, task: Task | None) -> None:
        """Score the windows of these indices; when memory runs out, in smaller batches.

        Under torchrun each process scores a part, and all have all sums afterwards. Once a pass.

        Raises:
            RuntimeError: torch's own, when not even one window fits.
        """
        started_s = self.machine.now_s()
        # Batches are the same however many processes share them, so sums of a window are too.
        waiting = batches(self._lengths, indices, self.machine.batch_tokens)
        waiting = waiting[ranks.rank() :: ranks.world_size()]
        while waiting:
            batch = waiting.pop(0)
            smaller = None
            try:
                self._score(batch)
            except RuntimeError as error:
                smaller = self.machine.batch_tokens // 2
                if not _is_out_of_memory(error) or len(batch) == 1 or smaller < 1:
                    raise
            if smaller is None:
                if task is not None:
                    # Of all processes' work, as far as this one can tell.
                    done = sum(self.windows[i].scored for i in batch)
                    task.advance(done * ranks.world_size())
                continue
            # Outside of the handler: there, the error would hold on to the batch's tensors.
            if progress is not None:
                progress.warn(
                    f"batch_tokens: out of memory with {self.machine.batch_tokens:,} tokens at "
                    f"once, going on with {smaller:,}"
                )
            self.machine.batch_tokens = smaller
            if self.machine.device.type == "cuda":
                torch.cuda.empty_cache()
            left = [*batch, *(i for later in waiting for i in later)]
            waiting = batches(self._lengths, left, smaller)
        for tally in self.tallies:
            ranks.add_up(tally.arrays())
        self.elapsed_s += self.machine.now_s() - started_s

    def _score(self, batch: Sequence[int]) -> None:
        """All models on one batch; the tallies change only when all of them got through."""
        device = self.machine.device
        together = padded([self.windows[i] for i in batch], batch)
        inputs_RT = together.inputs_RT.to(device)
        targets_N, place_N = together.targets_N.to(device), together.place_N.to(device)
        hidden: list[Tensor] = []
        for model, placed in enumerate(self.models):
            started_s = self.machine.now_s()
            hidden_RTD = placed.hidden(inputs_RT)
            hidden.append(hidden_RTD.flatten(0, 1).index_select(0, place_N))
            self.forward_s[model] += self.machine.now_s() - started_s
        started_s = self.machine.now_s()
        heads = [placed.head_weight for placed in self.models]
        scores = score_positions(hidden, heads, targets_N, with_reference=self.with_reference)
        for tally, of_model in zip(self.tallies, scores, strict=True):
            tally.add(of_model, together.window_N)
        self.scoring_s += self.machine.now_s() - started_s


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        said in str(error) for said in ("not enough memory", "can't allocate memory")
    )
