"""Rules of tol.json on what all rows of a layer share (SPEC sections 4 and 6)."""

from __future__ import annotations

from collections.abc import Sequence

from tolkit_formats._fields import Fields
from tolkit_formats.codecs import Bands
from tolkit_formats.errors import BundleError
from tolkit_formats.limits import MAX_LAYERS
from tolkit_formats.predictor import Predictor
from tolkit_formats.records import Tier

__all__ = ["read_predictors", "require_agreement"]


def require_agreement(tiers: Sequence[Tier], where: str) -> None:
    """BundleError unless all tiers mean the same by the arrays that a layer's rows share."""
    met: dict[tuple[int, str], object] = {}
    for tier in tiers:
        for layer, codec in ((plane.layer, plane.codec) for plane in tier.planes):
            facts: dict[str, object] = {**codec.shared_shapes()}
            if isinstance(codec, Bands):
                if codec.tier != tier.index:
                    raise BundleError(
                        f"{where}: tiers[{tier.index}]: layer {layer}: codec bands, tier is "
                        f"{codec.tier}, expected {tier.index}"
                    )
                facts["bands"] = (codec.codebooks, codec.basis, codec.exponent)
            for name, fact in facts.items():
                if met.setdefault((layer, name), fact) != fact:
                    raise BundleError(
                        f"{where}: tiers[{tier.index}]: layer {layer}: {name} is not what an "
                        "earlier tier says it is"
                    )


def read_predictors(root: Fields, hidden_size: int, kept: tuple[int, ...]) -> dict[int, Predictor]:
    """The optional field `predictors`, written only when it is not empty; BundleError names it."""
    if not root.has("predictors"):
        return {}
    predictors = {}
    for entry in root.objects("predictors", longest=MAX_LAYERS):
        layer = entry.integer("layer", 0, MAX_LAYERS - 1)
        params = {name: entry.get(name) for name in entry.value if name != "layer"}
        try:
            predictors[layer] = Predictor.from_json(params, hidden_size)
        except BundleError as error:
            raise BundleError(f"{entry.where}: {error.message}") from error
    order = list(predictors)
    if not order or order != sorted(order) or not set(order) <= set(kept):
        raise BundleError(f"{root.where}: predictors must name kept layers in order, each once")
    if len(order) != len(root.value["predictors"]):
        raise BundleError(f"{root.where}: predictors names a layer twice")
    return predictors
