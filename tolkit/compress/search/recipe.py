"""How a bundle was compressed, read from the bundle or known before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit import __version__
from tolkit.calibrate import Calibration
from tolkit.compress import CompressSpec, compress_options, weights_kind
from tolkit.measured import Measurement, content_digest, recipe_digest, size_asked
from tolkit.sources import TableSource
from tolkit_formats import open_bundle

__all__ = ["entry_of", "recipe_of"]


def recipe_of(
    source: TableSource,
    spec: CompressSpec,
    counts_V: npt.NDArray[np.uint64] | None,
    calibration: Calibration | None,
) -> str:
    """The recipe of what `compress` would write; see `tolkit.measured.recipe_digest`."""
    return recipe_digest(
        compress_options(spec, weights_kind(source, counts_V), calibration, source),
        sources=source.sources(),
        parent=source.identity,
        counts_V=source.token_counts_V,
        tool=f"tolkit {__version__}",
    )


def entry_of(path: Path, quality: Mapping[str, Any]) -> Measurement:
    """The entry of a bundle on disk and its record, with recipe and size where it has them.

    Raises:
        InputError and its kin: as `open_bundle`.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    recipe = budget_bytes = None
    step = manifest.history[-1] if manifest.history else None
    if step is not None and step.command == "compress":
        values = manifest.vocab_size * manifest.num_layers * manifest.hidden_size
        budget_bytes = size_asked(step.options, values)
        recipe = recipe_digest(
            step.options,
            sources=manifest.sources,
            parent=step.parent,
            counts_V=bundle.token_counts(),
            tool=step.tool,
        )
    return Measurement.of(content_digest(manifest), recipe, budget_bytes, quality)
