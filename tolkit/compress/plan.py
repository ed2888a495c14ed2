"""From a source and a wish to a plan: every plane's codec and members, bytes known beforehand.

For codec `bands` the plan is made in two steps: layers and budget here, widths of coefficients
once the transforms are fitted (`fit_bands`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tolkit.compress.fold import drop, members_of
from tolkit.compress.spec import BandsWish, CompressSpec, DropSpec, named_codec, parse_ranks
from tolkit.compress.tiers import TierRange
from tolkit.errors import UsageError
from tolkit.sources import TableSource, lineage
from tolkit_formats.codecs import Bands, Codec, Raw, Steps, Svd, codec_from_json
from tolkit_formats.entropy import Coding
from tolkit_formats.manifest import LayerStatus
from tolkit_formats.predictor import Predictor
from tolkit_formats.reader import shared_name
from tolkit_formats.records import Tier, lay_out
from tolkit_formats.sizes import coded_shard_bytes, table_bytes
from tolkit_formats.tensorfile import ITEM_BYTES

__all__ = [
    "EncodePlan",
    "PlanePlan",
    "is_lossy",
    "nominal_bits",
    "plan_build",
    "plan_compress",
    "plan_drop",
    "shared_bytes",
]


@dataclass(frozen=True)
class PlanePlan:
    """One plane to write.

    Attributes:
        layer: original index.
        codecs: how it will be stored in each tier; none yet for `bands` before it is fitted.
        members: source planes whose sum it encodes, ascending.
        copy: the stored bytes are taken over as they are; codec and members are the source's.
    """

    layer: int
    codecs: tuple[Codec, ...]
    members: tuple[int, ...]
    copy: bool = False

    @property
    def codec(self) -> Codec:
        """In the first tier."""
        return self.codecs[0]


@dataclass(frozen=True)
class EncodePlan:
    """A whole bundle to write, decided before anything is computed.

    Attributes:
        planes: in encode order (layer order).
        statuses: of all L layers.
        feedback: whether a plane pays back what earlier planes lost.
        feedback_recorded: what the manifest says of the result (copied planes included).
        tiers: the record layouts; none yet for `bands` before it is fitted.
        table_bytes: bytes under tables/; for `bands` before it is fitted the budget.
        warnings: what the user should know before it runs.
        bands: how `bands` shall look, None for other codecs.
        predictors: by layer.
        entropy: code `bands` as `steps`, through the entropy coder; `table_bytes` of the plan is
            then an estimate.
        coding: the coder of all records, None where they have a fixed length.
        layer_bytes: estimated bytes of a token by layer, where records are coded.
    """

    planes: tuple[PlanePlan, ...]
    statuses: tuple[LayerStatus, ...]
    feedback: bool
    feedback_recorded: bool
    tiers: tuple[Tier, ...]
    table_bytes: int
    warnings: tuple[str, ...] = ()
    bands: BandsWish | None = None
    predictors: Mapping[int, Predictor] = field(default_factory=dict)
    entropy: bool = False
    coding: Coding | None = None
    layer_bytes: Mapping[int, float] = field(default_factory=dict)

    @property
    def folded(self) -> frozenset[int]:
        """Source layers whose table goes into another one's plane."""
        return frozenset(m for p in self.planes for m in p.members if m != p.layer)

    def is_whole(self, layer: int, before: Sequence[LayerStatus]) -> bool:
        """Whether the planes up to `layer` stand for just the tables up to it, of a source whose
        layers are `before`."""
        have = {i for i in range(layer + 1) if before[i].status == "kept"}
        return have == {m for p in self.planes if p.layer <= layer for m in p.members}

    def to_json(self) -> list[dict[str, object]]:
        """The planes, for fingerprints."""
        return [
            {
                "layer": p.layer,
                "codecs": [codec.to_json() for codec in p.codecs],
                "members": list(p.members),
                "copy": p.copy,
            }
            for p in self.planes
        ]


def is_lossy(codec: Codec) -> bool:
    """Whether the codec is more than a number format."""
    return not isinstance(codec, Raw)


def plan_build(source: TableSource, dtype: str) -> EncodePlan:
    """All layers, raw, exactly what the FFNs give."""
    codec = named_codec(dtype, source.hidden_size)
    planes = tuple(PlanePlan(i, (codec,), (i,)) for i in range(source.num_layers))
    return _plan(source, planes, source.statuses, feedback=False, recorded=False, warnings=[])


def plan_compress(source: TableSource, spec: CompressSpec) -> EncodePlan:
    """Drop first, then give every kept layer its rank and codec.

    Raises:
        UsageError: layers or ranks out of range; feedback or folding where rows are not added to
            the residual stream.
    """
    statuses = source.statuses
    warnings = _lossy_warnings(source)
    if spec.drop:
        statuses = drop(statuses, spec.drop, fold=spec.fold, option="--drop", into=spec.into)
    members = members_of(source.statuses, statuses)
    _require_residual(source, feedback=spec.feedback, fold=spec.fold and bool(spec.drop))
    if spec.codec == "bands":
        return _plan_bands(source, spec, members, statuses, warnings)
    ranks = (
        {} if spec.rank is None else parse_ranks(spec.rank, source.num_layers, source.hidden_size)
    )
    planes = []
    for layer, summed in members.items():
        codec = _codec(spec.codec or "f16", ranks.get(layer), source.hidden_size)
        planes.append(PlanePlan(layer, (codec,), summed))
    warnings += _break_even_warnings(source, {p.layer: ranks.get(p.layer) for p in planes})
    return _plan(
        source,
        tuple(planes),
        statuses,
        feedback=spec.feedback,
        recorded=spec.feedback and any(is_lossy(p.codec) for p in planes),
        warnings=warnings,
    )


def plan_drop(source: TableSource, spec: DropSpec) -> EncodePlan:
    """Leave layers out of a bundle; planes nothing changes for are copied as they are.

    A plane that receives a dropped one is encoded again with its own codec, and so are those
    after it for as long as there is a loss to pay back. A plain drop copies everything.
    """
    if source.identity is None:
        raise UsageError(
            f"{source.path}: is a checkpoint, drop-layers takes a bundle",
            hint=f"run: tol build {source.path} -o B.tol, or tol compress with --drop",
        )
    if not spec.layers:
        raise UsageError("--layers: names no layer")
    statuses = drop(source.statuses, spec.layers, fold=spec.fold, option="--layers", into=spec.into)
    _require_residual(source, feedback=False, fold=spec.fold)
    members = members_of(source.statuses, statuses)
    planes = []
    carrying = False  # whether an encoded plane before this one left a loss to pay back
    for layer, summed in members.items():
        codecs = source.plane_codecs(layer)
        encode = carrying or len(summed) > 1
        if encode and isinstance(codecs[0], (Bands, Steps)):
            raise UsageError(
                f"{source.path}: layer {layer} is stored as {codecs[0].name}, fitted to the table "
                "it had, and cannot take in another one",
                hint="compress the checkpoint again with: tol compress CKPT --drop LAYERS "
                "(or add --plain, which loses more)",
            )
        planes.append(PlanePlan(layer, codecs, summed, copy=not encode))
        carrying = encode and is_lossy(codecs[0])
    warnings = []
    encoded = [p for p in planes if not p.copy]
    if any(is_lossy(p.codec) for p in encoded):
        warnings.append(
            f"{source.path}: {len(encoded)} layers are encoded a second time "
            f"({lineage(source.history)}); drop layers first, then compress, loses less"
        )
    if not spec.fold and any(is_lossy(p.codec) for p in planes):
        warnings.append(
            f"{source.path}: a plain drop from compressed tables leaves their running sum "
            "without what the dropped layers paid back"
        )
    return _plan(
        source,
        tuple(planes),
        statuses,
        feedback=spec.fold,
        recorded=spec.fold,
        warnings=warnings,
        ranges=source.tier_ranges,
    )


def _codec(name: str, rank: int | None, hidden_size: int) -> Codec:
    if rank is None:
        return named_codec(name, hidden_size)
    inner = named_codec(name, rank).to_json()
    return codec_from_json({"name": "svd", "rank": rank, "inner": inner}, hidden_size)


def _plan(
    source: TableSource,
    planes: tuple[PlanePlan, ...],
    statuses: tuple[LayerStatus, ...],
    *,
    feedback: bool,
    recorded: bool,
    warnings: list[str],
    ranges: Sequence[TierRange] = (),
) -> EncodePlan:
    ranges = ranges or ((0, source.num_rows),)
    coding = source.coding if any(isinstance(p.codecs[0], Steps) for p in planes) else None
    tiers = tuple(
        lay_out(
            [(p.layer, p.codecs[index]) for p in planes],
            stop - first,
            index=index,
            first_slot=first,
            coded=coding is not None,
        )
        for index, (first, stop) in enumerate(ranges)
    )
    predictors = {
        p.layer: source.predictors[p.layer]
        for p in planes
        if p.copy and p.layer in source.predictors
    }
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for plane in planes:
        parts: list[Codec | Predictor] = [*plane.codecs, *_if_any(predictors.get(plane.layer))]
        for part in parts:
            for name, shape in part.shared_shapes().items():
                shapes[shared_name(plane.layer, name)] = shape
    # A plain drop from coded records: how long they get is known when they are written.
    guess = {
        name: n for tier in tiers for name, n in coded_shard_bytes(tier, tier.stride / 4).items()
    }
    size = table_bytes(tiers, shapes, mapped_vocab_size=_mapped(source), shard_bytes=guess)
    return EncodePlan(
        planes,
        statuses,
        feedback,
        recorded,
        tiers,
        size,
        tuple(warnings),
        predictors=predictors,
        coding=coding,
    )


def _plan_bands(
    source: TableSource,
    spec: CompressSpec,
    members: Mapping[int, tuple[int, ...]],
    statuses: tuple[LayerStatus, ...],
    warnings: list[str],
) -> EncodePlan:
    assert spec.bands is not None
    values = source.vocab_size * source.num_layers * source.hidden_size
    budget = spec.budget_bytes
    if budget is None:
        assert spec.bits_per_value is not None
        budget = int(spec.bits_per_value * values / 8)
    planes = tuple(PlanePlan(layer, (), summed) for layer, summed in members.items())
    return EncodePlan(
        planes,
        statuses,
        spec.feedback,
        spec.feedback,
        (),
        budget,
        tuple(warnings),
        bands=spec.bands,
        entropy=spec.coding == "entropy",
    )


def _if_any(predictor: Predictor | None) -> tuple[Predictor, ...]:
    return () if predictor is None else (predictor,)


def _mapped(source: TableSource) -> int | None:
    return None if source.slot_of_token_V is None else source.vocab_size


def shared_bytes(codec: Codec) -> int:
    """Bytes of the arrays all rows of a plane share."""
    return sum(
        math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in codec.shared_shapes().values()
    )


def nominal_bits(codec: Codec) -> float:
    """Bits of codes per value of a row, without scales, bases and padding."""
    if isinstance(codec, Svd):
        return nominal_bits(codec.inner) * codec.rank / codec.width
    if isinstance(codec, Raw):
        return 8 * codec.segments()[1] // codec.width
    if isinstance(codec, Steps):
        raise AssertionError("how many bits symbols take is the coder's business")
    if isinstance(codec, Bands):
        return float(codec.widths_R.sum()) / codec.width
    return 8 if codec.name == "int8" else 4


def _lossy_warnings(source: TableSource) -> list[str]:
    kept = [i for i, status in enumerate(source.statuses) if status.status == "kept"]
    lossy = sorted(
        {codec.name for layer in kept for codec in source.plane_codecs(layer) if is_lossy(codec)}
    )
    if not lossy:
        return []
    return [
        f"{source.path}: its tables are already {', '.join(lossy)} ({lineage(source.history)}); "
        "losses add up, compress the checkpoint or the raw tables instead"
    ]


def _break_even_warnings(source: TableSource, ranks: Mapping[int, int | None]) -> list[str]:
    V, D = source.vocab_size, source.hidden_size
    break_even = V * D / (V + D)
    above = [layer for layer, rank in ranks.items() if rank is not None and rank > break_even]
    if not above:
        return []
    rank = max(r for r in ranks.values() if r is not None)
    return [
        f"--rank: {rank} in {len(above)} layers is above the break-even V*D/(V+D) = "
        f"{break_even:.0f}: coefficients and basis together are larger than the plane"
    ]


def _require_residual(source: TableSource, *, feedback: bool, fold: bool) -> None:
    if source.combine == "residual_add" or not (feedback or fold):
        return
    what = "error feedback" if feedback else "folding"
    raise UsageError(
        f"{source.path}: rows are combined by {source.combine!r}, {what} needs rows that are added "
        "to the residual stream",
        hint="add --no-feedback" if feedback else "add --plain",
    )
