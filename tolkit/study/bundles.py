"""Variants that are bundles: compressed straight from the model, evaluated, removed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, compress
from tolkit.study.context import Context
from tolkit.study.study import Opened, Variant
from tolkit.tables import load_runnable
from tolkit_formats import files

__all__ = ["BUNDLES", "MODES", "compressed"]

BUNDLES = "bundles"
MODES = ("feedback", "plain")
"""With error feedback and token counts, this toolchain's default; or plain, as in the paper."""


def compressed(
    context: Context, key: str, facts: Mapping[str, Any], mode: str, **options: Any
) -> Variant:
    """The model's tables compressed: one point with its true size.

    Args:
        mode: one of MODES.
        options: of CompressSpec.
    """
    plain = mode == "plain"
    wish = CompressSpec(**options, feedback=not plain, weights="none" if plain else "auto")

    def open_(stack: ExitStack) -> Opened:
        spec = context.spec
        folder = spec.out / BUNDLES if spec.keep else context.work
        files.make_dir(folder)
        path = folder / f"{key.replace(' %', '').replace(' ', '-')}.tol"
        resources = Resources(spec.threads, force=True)
        report = compress(spec.model, path, wish, resources=resources, progress=context.progress)
        if not spec.keep:
            stack.callback(files.remove_tree, path)
        sizes = {
            "bytes": report.table_bytes,
            "bits_per_value": report.bits_per_value,
            "nominal_bits": report.nominal_bits_per_value,
        }
        return Opened(load_runnable(path), sizes)

    return Variant(key, {**facts, "mode": mode}, open_)
