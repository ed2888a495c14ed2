"""Compiles every kernel that a set of bundles launches for a CUDA target, without a device.

    python tests/_kernel_compile.py BUNDLE.tol bfloat16 64 ...     one JSON object on stdout

Of each bundle the dtype of its rows and how many are asked for. Launches are written down instead
of made, so the arguments compiled for are the real ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tolkit.runtime.kernels import element, expand, launch
from tolkit_formats import open_bundle

TARGET = GPUTarget("cuda", 90, 32)
_TYPES = {
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip


class Recorder:
    """Stands for a kernel: `kernel[grid](...)` notes the arguments by name."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*args: Any, **named: Any) -> None:
            self.calls.append(dict(zip(self.kernel.arg_names, args, strict=False)) | named)

        return call


@contextmanager
def recorded() -> Iterator[tuple[Recorder, Recorder]]:
    recorders = Recorder(element.element_kernel), Recorder(expand.expand_kernel)
    with (
        mock.patch.object(element, "element_kernel", recorders[0]),
        mock.patch.object(expand, "expand_kernel", recorders[1]),
    ):
        yield recorders


def source_of(kernel: Any, named: Mapping[str, Any]) -> tuple[ASTSource, dict[str, int]]:
    """What triton compiles for one launch, and its options."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            # A launch makes a constant of every 1, too.
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = _TYPES[value.dtype] if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in named.items() if name.startswith("num_")}
    options = {name: value for name, value in options.items() if name not in signature}
    return ASTSource(kernel, signature, constants, attributes), options


def main() -> None:
    seen: dict[str, dict[str, Any]] = {}
    asked = iter(sys.argv[1:])
    for path, dtype, rows in zip(asked, asked, asked, strict=True):
        bundle = open_bundle(path)
        records = [
            torch.zeros(tier.num_rows, tier.stride, dtype=torch.uint8)
            for tier in bundle.manifest.tiers
        ]
        slots_V = torch.zeros(bundle.vocab_size, dtype=torch.int32)
        embedding_VD = torch.zeros(bundle.vocab_size, bundle.hidden_size)
        look_up = launch.FusedLookup(bundle, records, slots_V, getattr(torch, dtype), embedding_VD)
        with recorded() as recorders:
            look_up.rows(torch.zeros(int(rows), dtype=torch.int64))
        for recorder in recorders:
            for named in recorder.calls:
                _compile(path, recorder.kernel, named, seen)
    sys.stdout.write(json.dumps(seen))


def _compile(
    path: str, kernel: Any, named: Mapping[str, Any], seen: dict[str, dict[str, Any]]
) -> None:
    source, options = source_of(kernel, named)
    key = f"{kernel.__name__} {source.signature} {sorted(source.constants.items())}"
    if key in seen:
        return
    made = triton.compile(source, target=TARGET, options=options)
    seen[key] = {
        "path": path,
        "kernel": kernel.__name__,
        "cubin_bytes": len(made.asm["cubin"]),
        "for_sm_90": ".target sm_90" in made.asm["ptx"],
        "shared_bytes": made.metadata.shared,
        "tensor_core": "mma" in made.asm["ptx"],
    }


if __name__ == "__main__":
    main()
