"""Measurements kept in a file, so that no later search has to repeat them.

    {"schema": "tolkit.measure/1", "bundles": [..], "layers": [..]}

A bundle's entry is its evaluation record (`tolkit.quality/1`, bound to the bundle's identity,
the text and the windows), and beside it what says that another bundle is the same but for its
name: `content`, a digest of all it holds except history and card, and `recipe`, a digest of what
it was made from and how, sizes apart. An entry of `layers` holds what each layer of one model
costs without its table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit.errors import BundleError, DataError, UnsupportedVersionError
from tolkit.quality_log import QualityRecord, Setting, parse_record
from tolkit_formats import digests, files, strict_json
from tolkit_formats.manifest import Manifest, Sources

__all__ = [
    "MEASURE_SCHEMA",
    "LayerCosts",
    "Measured",
    "Measurement",
    "content_digest",
    "load_measured",
    "recipe_digest",
    "save_measured",
    "size_asked",
]

MEASURE_SCHEMA = "tolkit.measure/1"
_LIMIT_BYTES = 1 << 28
_SIZES = ("bits_per_value", "budget_bytes")
_REASONS = ("auto", "max_kl", "max_ppl_increase", "reference", "search", "text", "window")


@dataclass(frozen=True)
class Measurement:
    """One bundle, measured.

    Attributes:
        content: `content_digest` of it.
        recipe: `recipe_digest` of it, where it was compressed to a size.
        budget_bytes: that size.
        quality: the record as JSON, and read.
    """

    content: str
    recipe: str | None
    budget_bytes: int | None
    quality: Mapping[str, Any]
    record: QualityRecord

    @classmethod
    def of(
        cls,
        content: str,
        recipe: str | None,
        budget_bytes: int | None,
        quality: Mapping[str, Any],
        where: str = "measurement",
    ) -> Measurement:
        """From a record of `tolkit.evaluate.quality_record`.

        Raises:
            DataError, UnsupportedVersionError: that is no such record.
        """
        line = json.dumps(quality, allow_nan=False).encode()
        record = parse_record(line, where)
        assert record is not None
        return cls(content, recipe, budget_bytes, quality, record)

    def fits(self, setting: Setting, dtype: str) -> bool:
        """Whether an evaluation under this setting would find the same."""
        return (
            not self.record.problems
            and self.record.dtype == dtype
            and not setting.differences(self.record.setting)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "content": self.content,
            "recipe": self.recipe,
            "budget_bytes": self.budget_bytes,
            "quality": dict(self.quality),
        }


@dataclass(frozen=True)
class LayerCosts:
    """What leaving out sets of layers of one model costs (see `tolkit.compress.search.choose`).

    Attributes:
        model: its identity.
        setting: text, windows and reference.
        fold: whether tables were folded.
        costs: plain JSON, one object a set.
    """

    model: str
    setting: Setting
    fold: bool
    costs: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "setting": vars(self.setting),
            "fold": self.fold,
            "costs": [dict(cost) for cost in self.costs],
        }


@dataclass(frozen=True)
class Measured:
    """All of a file."""

    bundles: tuple[Measurement, ...] = ()
    layers: tuple[LayerCosts, ...] = ()


def content_digest(manifest: Manifest) -> str:
    """Digest of all that decides a bundle's rows and logits: equal ones score equally.

    Everything in the manifest but history, and README.md, which tells it.
    """
    fields = manifest.to_json()
    del fields["history"]
    fields["files"] = {k: v for k, v in fields["files"].items() if k != "README.md"}
    return digests.json_digest(fields)


def recipe_digest(
    options: Mapping[str, Any],
    *,
    sources: Sources,
    parent: str | None,
    counts_V: npt.NDArray[np.uint64] | None,
    tool: str,
) -> str:
    """Digest of how a bundle is compressed and from what: two of one recipe differ in size alone.

    Args:
        options: of the compression, as its history has them.
        sources: of the weights.     parent: identity of the bundle it is made from.
        counts_V: token counts, as the bundle keeps them.
        tool: name and version.
    """
    kept = {k: v for k, v in options.items() if k not in _SIZES + _REASONS}
    counts = None if counts_V is None else digests.array_digest("U64", counts_V.shape, [counts_V])
    weights = [
        sources.embedding,
        sources.tokenizer,
        sources.config,
        *([layer.norm, layer.ffn] for layer in sources.layers),
    ]
    return digests.json_digest(
        {"options": kept, "sources": weights, "parent": parent, "counts": counts, "tool": tool}
    )


def size_asked(options: Mapping[str, Any], values: int) -> int | None:
    """Bytes a compression was asked for in its history; None where it was asked for no size.

    Args:
        values: V x L x D.
    """
    if options.get("budget_bytes") is not None:
        return int(options["budget_bytes"])
    bits = options.get("bits_per_value")
    return None if bits is None else int(bits * values / 8)


def save_measured(path: Path, measured: Measured) -> None:
    """Write a file of measurements, all or nothing."""
    value = {
        "schema": MEASURE_SCHEMA,
        "bundles": [entry.to_json() for entry in measured.bundles],
        "layers": [entry.to_json() for entry in measured.layers],
    }
    text = json.dumps(value, allow_nan=False, indent=1, sort_keys=True)
    files.write_atomic(path, text.encode() + b"\n")


def load_measured(path: Path) -> Measured:
    """Read such a file.

    Raises:
        InputError: missing or too large.     DataError: not a file of measurements.
        UnsupportedVersionError: of another version.
    """
    data = files.read_bytes(path, limit_bytes=_LIMIT_BYTES)
    try:
        value = strict_json.parse(data, str(path))
    except BundleError as error:
        raise DataError(f"{path}: {error.message}", hint="write it with: tol measure") from error
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != MEASURE_SCHEMA:
        if isinstance(schema, str) and schema.startswith("tolkit.measure/"):
            raise UnsupportedVersionError(
                f"{path}: schema is {schema[:40]}, this tolkit reads {MEASURE_SCHEMA}",
                hint="measure again",
            )
        raise DataError(f"{path}: is no file of measurements", hint="write it with: tol measure")
    try:
        bundles = [
            Measurement.of(
                str(entry["content"]),
                None if entry["recipe"] is None else str(entry["recipe"]),
                None if entry["budget_bytes"] is None else int(entry["budget_bytes"]),
                entry["quality"],
                f"{path}: bundle {number}",
            )
            for number, entry in enumerate(value["bundles"])
        ]
        layers = [
            LayerCosts(
                str(entry["model"]),
                Setting(**entry["setting"]),
                bool(entry["fold"]),
                tuple(dict(cost) for cost in entry["costs"]),
            )
            for entry in value["layers"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: an entry is incomplete: {error}", hint="measure again") from error
    return Measured(tuple(bundles), tuple(layers))
