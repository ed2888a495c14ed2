"""tol.json: what a bundle holds, as dataclasses, and its canonical bytes. See manifest_rules.

The file is the canonical JSON (strict_json.canonical) of its fields plus `identity`, the SHA-256
of the canonical JSON without that field; so one changed bit anywhere in it is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tolkit_formats import digests, strict_json
from tolkit_formats.entropy import FEATURE, Coding
from tolkit_formats.layer_errors import LayerErrors
from tolkit_formats.partial import FEATURE as PARTIAL_FEATURE
from tolkit_formats.partial import FFN_FILE, Partial
from tolkit_formats.partial import VERSION as PARTIAL_VERSION
from tolkit_formats.predictor import Predictor
from tolkit_formats.records import Tier

__all__ = [
    "BASE_VERSION",
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "KNOWN_FEATURES",
    "ROOT_FILES",
    "Encoding",
    "FileEntry",
    "HistoryEntry",
    "LayerDigests",
    "LayerStatus",
    "Manifest",
    "Sources",
    "needs_of",
]

FORMAT_NAME = "tolkit-bundle"
FORMAT_VERSION = (1, 2)
"""The newest this package reads; what is written says the lowest version that has all it needs."""
BASE_VERSION = (1, 0)
KNOWN_FEATURES: frozenset[str] = frozenset({FEATURE, PARTIAL_FEATURE})
ROOT_FILES = frozenset(
    {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "token_counts.safetensors",
        "backbone.safetensors",
        FFN_FILE,
        "README.md",
    }
)
COMBINE_RULES = ("residual_add", "other")


@dataclass(frozen=True)
class LayerStatus:
    """kept: has a plane. folded: its table was added to layer `into`. dropped: left out."""

    status: str
    into: int | None = None


@dataclass(frozen=True)
class Encoding:
    """How planes were encoded: layer order, and whether each pays back what earlier ones lost.

    `errors`: how far they are from the tables they stand for, by layer; empty where unknown.
    """

    feedback: bool
    order: tuple[int, ...]
    errors: tuple[LayerErrors, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The field `encoding` of tol.json."""
        fields: dict[str, Any] = {"feedback": self.feedback, "order": list(self.order)}
        if self.errors:
            fields["errors"] = [errors.to_json() for errors in self.errors]
        return fields


@dataclass(frozen=True)
class LayerDigests:
    """SHA-256 of one layer's memory norm and of its FFN weights."""

    norm: str
    ffn: str


@dataclass(frozen=True)
class Sources:
    """Digests of what the tables were computed from; `tokenizer` is None where there was none."""

    embedding: str
    tokenizer: str | None
    config: str
    layers: tuple[LayerDigests, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 of one file of the bundle."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class HistoryEntry:
    """One command of the lineage with its resolved options; `parent` is a bundle identity."""

    command: str
    options: Mapping[str, Any]
    parent: str | None
    tool: str


@dataclass(frozen=True)
class Manifest:
    """A bundle's description. `to_json` and `parse_manifest` are inverse to each other.

    `coding` is the coder of all records, None where they have a fixed length; `partial` says which
    tokens have one, None where all have.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    layers: tuple[LayerStatus, ...]
    tiers: tuple[Tier, ...]
    encoding: Encoding
    sources: Sources
    files: Mapping[str, FileEntry]
    history: tuple[HistoryEntry, ...]
    mapped_slots: bool = False
    predictors: Mapping[int, Predictor] = field(default_factory=dict)
    combine: str = "residual_add"
    lookup_scale: float = 1
    out_of_range: str = "error"
    required_features: tuple[str, ...] = ()
    version: tuple[int, int] = BASE_VERSION
    coding: Coding | None = None
    partial: Partial | None = None
    identity: str = field(default="", compare=False)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Original indices of the layers that have a plane."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.status == "kept")

    @property
    def num_rows(self) -> int:
        """Records in all tiers."""
        return sum(tier.num_rows for tier in self.tiers)

    @property
    def table_bytes(self) -> int:
        """Bytes of all files under tables/: what `bytes` and a budget mean."""
        return sum(e.size_bytes for name, e in self.files.items() if name.startswith("tables/"))

    @property
    def bundle_bytes(self) -> int:
        """Bytes of all files of the identity, backbone included."""
        return sum(entry.size_bytes for entry in self.files.values())

    @property
    def bits_per_value(self) -> float:
        """8 x table_bytes / (V x L x D) with the original V and L."""
        return 8 * self.table_bytes / (self.vocab_size * self.num_layers * self.hidden_size)

    def to_json(self) -> dict[str, Any]:
        """The fields of tol.json without `identity`."""
        fields: dict[str, Any] = {
            "format": FORMAT_NAME,
            "version": f"{self.version[0]}.{self.version[1]}",
            "required_features": sorted(self.required_features),
            "vocab_size": self.vocab_size,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "combine": self.combine,
            "lookup_scale": self.lookup_scale,
            "out_of_range": self.out_of_range,
            "layers": [
                {"status": s.status} if s.into is None else {"status": s.status, "into": s.into}
                for s in self.layers
            ],
            "slots": "mapped" if self.mapped_slots else "identity",
            "tiers": [
                {
                    "first_slot": tier.first_slot,
                    "num_rows": tier.num_rows,
                    "stride": tier.stride,
                    "rows_per_shard": tier.rows_per_shard,
                    "planes": [
                        {
                            "layer": plane.layer,
                            "codec": plane.codec.to_json(),
                            "offset": plane.offset,
                            "length": plane.length,
                        }
                        for plane in tier.planes
                    ],
                }
                for tier in self.tiers
            ],
            "encoding": self.encoding.to_json(),
            "sources": {
                "embedding": self.sources.embedding,
                "tokenizer": self.sources.tokenizer,
                "config": self.sources.config,
                "layers": [{"norm": d.norm, "ffn": d.ffn} for d in self.sources.layers],
            },
            "files": {
                name: {"bytes": entry.size_bytes, "sha256": entry.sha256}
                for name, entry in self.files.items()
            },
            "history": [
                {
                    "command": step.command,
                    "options": dict(step.options),
                    "parent": step.parent,
                    "tool": step.tool,
                }
                for step in self.history
            ],
        }
        if self.predictors:
            fields["predictors"] = [
                {"layer": layer, **predictor.to_json()}
                for layer, predictor in sorted(self.predictors.items())
            ]
        if self.coding is not None:
            fields["coding"] = self.coding.to_json()
        if self.partial is not None:
            fields["partial"] = self.partial.to_json()
        return fields

    def to_bytes(self) -> tuple[bytes, str]:
        """Content of tol.json and the identity in it."""
        fields = self.to_json()
        identity = digests.json_digest(fields)
        return strict_json.canonical({**fields, "identity": identity}), identity


def needs_of(manifest: Manifest) -> tuple[tuple[int, int], tuple[str, ...]]:
    """The lowest format version that has everything in it, and the features a reader must know."""
    version, features = BASE_VERSION, []
    if manifest.coding is not None:
        version, features = (1, 1), [FEATURE]
    if manifest.partial is not None:
        version, features = PARTIAL_VERSION, [*features, PARTIAL_FEATURE]
    return version, tuple(features)
