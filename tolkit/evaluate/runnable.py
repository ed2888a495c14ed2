"""What can be evaluated, and putting it where and how it should run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from tolkit import ranks
from tolkit.errors import ResourceError, UsageError
from tolkit.evaluate.windows import TextTokenizer
from tolkit.model import Decoder, FfnRows, RowSource

__all__ = [
    "Adjust",
    "Placed",
    "Runnable",
    "device_label",
    "full_float32",
    "pick_device",
    "pick_dtype",
]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}


_RESIDENT_ROWS = 4096

Adjust = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]


class Runnable(Protocol):
    """A model that can score text: a checkpoint, or a bundle with its rows.

    table_bytes, bits_per_value: size of a bundle's tables; None for a checkpoint.
    adjust: what to do to the table rows before they are used (None: nothing): the planes of
        `RowSource.fetch` in, planes of the same length out. Called with rows already on the
        device and in the number format of the pass.
    """

    @property
    def model(self) -> Decoder: ...
    @property
    def rows(self) -> RowSource | None: ...
    @property
    def tokenizer(self) -> TextTokenizer: ...
    @property
    def kind(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def table_bytes(self) -> int | None: ...
    @property
    def bits_per_value(self) -> float | None: ...
    @property
    def adjust(self) -> Adjust | None: ...


class Placed:
    """A runnable on one device in one number format.

    The runnable itself is not changed: its model is copied when it is elsewhere or in another
    format, and used as it is otherwise.

    Args:
        resident: decode all table rows now and keep them on the device, instead of those of each
            batch when it comes.
    """

    def __init__(
        self,
        runnable: Runnable,
        device: torch.device,
        dtype: torch.dtype,
        *,
        resident: bool = False,
    ) -> None:
        model = runnable.model
        if any(p.device != device or p.dtype != dtype for p in model.parameters()):
            model = copy.deepcopy(model).to(device=device, dtype=dtype)
        self.model = model
        self._rows: RowSource | None = None
        if runnable.rows is not None:
            self._rows = _RowsHere(runnable.rows, device, dtype)
            if resident:
                self._rows = _ResidentRows(self._rows, model.config.vocab_size, device)
        if runnable.adjust is not None:
            self._rows = _Adjusted(self._rows or FfnRows(model), runnable.adjust)

    @property
    def head_weight(self) -> Tensor:
        """Output weights [V, D]; a model with tied weights uses its embedding."""
        head = self.model.lm_head
        return self.model.embedding if head is None else head.weight

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Final hidden states [B, T, D]."""
        return self.model.hidden(ids_BT, rows=self._rows)


class _RowsHere:
    """A row source whose planes arrive on one device in one format."""

    def __init__(self, rows: RowSource, device: torch.device, dtype: torch.dtype) -> None:
        self._rows, self._device, self._dtype = rows, device, dtype

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        return [
            None if plane_nD is None else plane_nD.to(device=self._device, dtype=self._dtype)
            for plane_nD in self._rows.fetch(ids_n)
        ]


class _ResidentRows:
    """All rows of a source, decoded once: per layer [V, D] on the device, or None."""

    def __init__(self, rows: RowSource, vocab_size: int, device: torch.device) -> None:
        self._planes: list[Tensor | None] = []
        for start in range(0, vocab_size, _RESIDENT_ROWS):
            stop = min(start + _RESIDENT_ROWS, vocab_size)
            parts = rows.fetch(torch.arange(start, stop, device=device))
            if not self._planes:
                self._planes = [
                    None if part_nD is None else part_nD.new_empty(vocab_size, part_nD.shape[1])
                    for part_nD in parts
                ]
            for plane_VD, part_nD in zip(self._planes, parts, strict=True):
                if plane_VD is not None and part_nD is not None:
                    plane_VD[start:stop] = part_nD

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        return [
            None if plane_VD is None else plane_VD.index_select(0, ids_n)
            for plane_VD in self._planes
        ]


class _Adjusted:
    """A row source with `Runnable.adjust` applied to what it gives."""

    def __init__(self, rows: RowSource, adjust: Adjust) -> None:
        self._rows, self._adjust = rows, adjust

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        return self._adjust(self._rows.fetch(ids_n))


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Under torchrun each process of a machine takes a CUDA device of its own, unless N is named.

    Raises:
        UsageError: not a device name.      ResourceError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device: expected auto, cpu or cuda, got {name!r}") from error
    if device.type == "cuda":
        index = ranks.local_rank() if device.index is None else device.index
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise ResourceError(f"device: {name} is not here", hint="use --device cpu")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UsageError(f"device: expected auto, cpu or cuda, got {name!r}")
    return torch.device("cpu")


def device_label(device: torch.device) -> str:
    """The device as reports name it: ``cpu``, or ``cuda:0 (its product name)``."""
    if device.type != "cuda":
        return device.type
    return f"{device} ({torch.cuda.get_device_name(device)})"


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32, bfloat16 or float16, by name or as torch's; UsageError for anything else."""
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise UsageError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    return found


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in float32 (TF32 off) inside; the caller's setting afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
