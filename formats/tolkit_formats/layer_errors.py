"""How far tables are from what they stand for: the one definition diff, reports and manifests use.

Two bundles, or a bundle and what it was made from: the tables taken as right and the stored ones.
Layer by layer, a layer without a plane counting as zeros on either side:

- `relative`: ||stored - table|| / ||table||, the table being the sum of the right ones the plane
  stands for: its own layer's and those folded into it. A folded layer has none; a dropped one
  has lost all of its own.
- `running_sum`: the same of the sums of all layers up to this one, which is what the model sees
  there (a folded table is missing, or early, between its own layer and its receiver).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tolkit_formats._fields import Fields
from tolkit_formats.errors import BundleError
from tolkit_formats.limits import MAX_LAYERS

if TYPE_CHECKING:
    from tolkit_formats.manifest import LayerStatus

__all__ = ["ErrorSums", "LayerErrors", "parse_layer_errors", "rounded", "stood_for"]


@dataclass(frozen=True)
class LayerErrors:
    """What the manifest says of one original layer; None where it is not known.

    Each figure is relative to the tables one step of the history read, whose index stands beside
    it: its parent's, or the source model's FFN outputs where it has none.
    """

    layer: int
    relative: float | None = None
    relative_step: int | None = None
    running_sum: float | None = None
    running_sum_step: int | None = None

    @property
    def known(self) -> bool:
        """Whether there is a figure at all."""
        return self.relative is not None or self.running_sum is not None

    def to_json(self) -> dict[str, Any]:
        """The known fields."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class ErrorSums:
    """Sums of squares over all values of one layer, from which both figures follow.

    Attributes:
        table: of the table the plane stands for.
        lost: of the stored plane minus that table.
        total: of the sum of the right tables up to this layer.
        off: of the sum of the stored planes minus that sum.
    """

    table: float = 0.0
    lost: float = 0.0
    total: float = 0.0
    off: float = 0.0

    def add(self, other: ErrorSums) -> None:
        """Count other rows in."""
        self.table += other.table
        self.lost += other.lost
        self.total += other.total
        self.off += other.off

    @property
    def relative(self) -> float | None:
        """||stored - table|| / ||table||; None where the table is zero or beyond float32."""
        return _ratio(self.lost, self.table)

    @property
    def running_sum(self) -> float | None:
        """The same of the sums up to this layer."""
        return _ratio(self.off, self.total)


def _ratio(part: float, whole: float) -> float | None:
    if not whole > 0 or not math.isfinite(part) or not math.isfinite(whole):
        return None
    return math.sqrt(part / whole)


def rounded(figure: float | None) -> float | None:
    """To six significant digits: more would change with the machine."""
    return None if figure is None else float(f"{figure:.6g}")


def stood_for(layers: Sequence[LayerStatus], layer: int) -> tuple[int, ...]:
    """Original layers whose tables the plane of `layer` holds, ascending; its own if dropped."""
    if layers[layer].into is not None:
        return ()
    return tuple(i for i, status in enumerate(layers) if i == layer or status.into == layer)


def parse_layer_errors(encoding: Fields, num_layers: int, num_steps: int) -> list[LayerErrors]:
    """The optional `errors` of the manifest's `encoding`; empty where it is absent.

    Raises:
        BundleError: a figure without its step, negative, or out of order.
    """
    if not encoding.has("errors"):
        return []
    found: list[LayerErrors] = []
    for entry in encoding.objects("errors", longest=MAX_LAYERS):
        first = found[-1].layer + 1 if found else 0
        layer = entry.integer("layer", min(first, num_layers - 1), num_layers - 1)
        relative = _figure(entry, "relative", num_steps)
        running_sum = _figure(entry, "running_sum", num_steps)
        entry.done()
        errors = LayerErrors(layer, *relative, *running_sum)
        if not errors.known or (found and layer == found[-1].layer):
            raise BundleError(f"{entry.where}: says nothing new of layer {layer}")
        found.append(errors)
    if not found:
        raise BundleError(f"{encoding.where}: errors is empty, expected it to be left out then")
    return found


def _figure(entry: Fields, name: str, num_steps: int) -> tuple[float | None, int | None]:
    if not entry.has(name):
        return None, None
    value = entry.number(name)
    if value < 0:
        raise BundleError(f"{entry.where}: {name} is {value}, expected 0 or more")
    return value, entry.integer(f"{name}_step", 0, num_steps - 1)
