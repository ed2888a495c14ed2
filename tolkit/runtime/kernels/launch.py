"""Rows of a bundle whose records lie on the device, by kernels; imports triton.

n rows asked for, V vocabulary, K kept layers, S record stride, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tolkit.decode.record_decoder import unit_rows
from tolkit.runtime.kernels import element, expand
from tolkit.runtime.kernels.plan import ElementPlan, ExpandPlan, Plans
from tolkit.runtime.kernels.tuning import Blocks, Tuning
from tolkit_formats.reader import Bundle

__all__ = ["FusedLookup"]

_ELEMENT_KINDS = {
    "raw": element.RAW.value,
    "int8": element.INT8.value,
    "fourbit": element.FOURBIT.value,
}
_EXPAND_KINDS = {
    "bands": expand.BANDS.value,
    "steps": expand.STEPS.value,
    "elements": expand.ELEMENTS.value,
}
_MANY_ROWS = 64


class FusedLookup:
    """Gathers, dequantises and expands: one launch for all planes of a codec in a tier.

    Args:
        bundle: open bundle; shared arrays are read here.
        records: U8 [rows, S] of every tier on the device, in order.
        slot_of_token_V: int32 on the device, negative for a token without record; None where slot
            is id.
        dtype: of the rows; computed in float32 (TF32 products for half-precision rows).
        embedding_VD: on the device; only read for a bundle with predictors.
    """

    def __init__(
        self,
        bundle: Bundle,
        records: Sequence[Tensor],
        slot_of_token_V: Tensor | None,
        dtype: torch.dtype,
        embedding_VD: Tensor | None,
    ) -> None:
        self.device = records[0].device
        self._tiers = bundle.manifest.tiers
        self._records = records
        self._vocab_size, self._width = bundle.vocab_size, bundle.hidden_size
        self._layers = len(bundle.layer_ids)
        self._slot_of_token_V = slot_of_token_V
        self._dtype = dtype
        self._embedding_VD = embedding_VD
        self._plans = Plans(bundle, self.device)
        self.size_bytes = self._plans.size_bytes
        name = "interpreter"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        self._tuning = Tuning(name)

    def rows(self, ids_n: Tensor) -> Tensor:
        """`dtype` [n, K, D]; NaN where an id is out of range or has no record.

        Nothing is copied to the host and nothing waits, once block sizes are known for the shape.
        """
        out_nKD = torch.empty(
            (len(ids_n), self._layers, self._width), dtype=self._dtype, device=self.device
        )
        if not len(ids_n):
            return out_nKD
        with self._current_device():
            self._write(out_nKD, ids_n.contiguous())
        return out_nKD

    def _write(self, out_nKD: Tensor, ids_n: Tensor) -> None:
        unit_nD = self._unit_rows(ids_n)
        for tier, plans in enumerate(self._plans.tiers):
            for plan in plans:
                if isinstance(plan, ExpandPlan):
                    self._expand(tier, plan, out_nKD, ids_n, unit_nD)
                else:
                    self._look_up(tier, plan, out_nKD, ids_n)
        self._add_predictions(out_nKD, unit_nD)

    def _current_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, not on that of its arguments."""
        if self.device.type != "cuda":
            return nullcontext()
        return torch.cuda.device(self.device)

    def _unit_rows(self, ids_n: Tensor) -> Tensor | None:
        if self._plans.predictions is None:
            return None
        assert self._embedding_VD is not None
        known_n = ids_n.clamp(0, self._vocab_size - 1)
        return unit_rows(self._embedding_VD.index_select(0, known_n))

    def _look_up(self, tier: int, plan: ElementPlan, out_nKD: Tensor, ids_n: Tensor) -> None:
        def launch(blocks: Blocks) -> None:
            chunks = -(-self._width // blocks["BLOCK"])
            element.element_kernel[(len(ids_n), len(plan.place_P), chunks)](
                out_nKD,
                ids_n,
                self._map(ids_n),
                self._records[tier],
                self._records[tier].view(plan.elements.numbers),
                plan.table,
                plan.offset_P,
                plan.place_P,
                **self._tier_sizes(tier),
                codes_at=plan.codes_at,
                GROUP=plan.elements.group,
                KIND=_ELEMENT_KINDS[plan.elements.kind],
                **self._constants(tier),
                **blocks,
            )

        shape = f"element {plan.elements} {self._shape(ids_n, plan.place_P)}"
        launch(self._blocks(shape, element_blocks(self._width), launch))

    def _expand(
        self,
        tier: int,
        plan: ExpandPlan,
        out_nKD: Tensor,
        ids_n: Tensor,
        unit_nD: Tensor | None,
    ) -> None:
        records = self._records[tier]
        inner = plan.elements
        predictions = self._plans.predictions
        float32 = self._dtype == torch.float32

        def launch(blocks: Blocks) -> None:
            grid = (
                -(-len(ids_n) // blocks["BLOCK_N"]),
                len(plan.place_P),
                -(-self._width // blocks["BLOCK_D"]),
            )
            expand.expand_kernel[grid](
                out_nKD,
                ids_n,
                self._map(ids_n),
                records,
                records if inner is None else records.view(inner.numbers),
                plan.table,
                plan.basis,
                plan.mean_PD,
                plan.factor_P,
                plan.offset_P,
                plan.place_P,
                plan.start_P,
                plan.count_P,
                plan.extra_P,
                plan.place_C,
                plan.field_C,
                plan.scale_C,
                plan.row_C,
                plan.mean_PD if unit_nD is None else unit_nD,
                plan.basis if predictions is None else predictions.weights_PDD,
                plan.mean_PD if predictions is None else predictions.scales_PD,
                plan.predictor_P,
                num_ids=len(ids_n),
                **self._tier_sizes(tier),
                GROUP=1 if inner is None else inner.group,
                INNER=0 if inner is None else _ELEMENT_KINDS[inner.kind],
                KIND=_EXPAND_KINDS[plan.kind],
                PREDICT=predictions is not None,
                PRECISION="tf32x3" if float32 else "tf32",
                **self._constants(tier),
                **blocks,
            )

        shape = f"expand {plan.kind} {inner} {len(plan.row_C)} {self._shape(ids_n, plan.place_P)}"
        launch(self._blocks(shape, expand_blocks(len(ids_n)), launch))

    def _add_predictions(self, out_nKD: Tensor, unit_nD: Tensor | None) -> None:
        predictions = self._plans.predictions
        for place, which in self._plans.added:
            assert predictions is not None and unit_nD is not None
            predicted_nD = unit_nD @ predictions.weights_PDD[which].float()
            predicted_nD *= predictions.scales_PD[which]
            out_nKD[:, place] = (out_nKD[:, place].float() + predicted_nD).to(self._dtype)

    def _map(self, ids_n: Tensor) -> Tensor:
        """The map of slots; any tensor where the kernels read none."""
        return ids_n if self._slot_of_token_V is None else self._slot_of_token_V

    def _tier_sizes(self, tier: int) -> Mapping[str, int]:
        about = self._tiers[tier]
        return {
            "vocab_size": self._vocab_size,
            "first_slot": about.first_slot,
            "num_rows": about.num_rows,
            "all_rows": sum(each.num_rows for each in self._tiers),
            "stride": about.stride,
            "num_layers": self._layers,
        }

    def _constants(self, tier: int) -> Mapping[str, Any]:
        return {
            "WIDTH": self._width,
            "MAPPED": self._slot_of_token_V is not None,
            "FILL": tier == 0,
        }

    def _shape(self, ids_n: Tensor, place_P: Tensor) -> str:
        rows = 1 << (len(ids_n) - 1).bit_length()  # sizes near each other share a choice
        return f"rows {rows}, planes {len(place_P)}, width {self._width}, {self._dtype}"

    def _blocks(
        self, shape: str, candidates: Sequence[Blocks], launch: Callable[[Blocks], None]
    ) -> Blocks:
        if self.device.type != "cuda":
            return candidates[0]
        return self._tuning.choose(shape, candidates, launch)


def element_blocks(width: int) -> list[Blocks]:
    """Block sizes worth a try for rows of `width` values."""
    most = max(64, 1 << (width - 1).bit_length())
    sizes = [(1024, 4), (512, 4), (2048, 8), (256, 2), (4096, 8)]
    fitting = [(block, warps) for block, warps in sizes if block <= most] or [(most, 2)]
    return [{"BLOCK": block, "num_warps": warps} for block, warps in fitting]


def expand_blocks(rows: int) -> list[Blocks]:
    """Block sizes worth a try for so many rows; products need 16 of each at least."""
    tall = [(64, 128, 32, 4), (128, 128, 32, 8), (64, 64, 32, 4), (128, 64, 32, 4)]
    flat = [(16, 64, 64, 4), (16, 128, 64, 4), (16, 64, 128, 4), (16, 128, 32, 4)]
    names = ("BLOCK_N", "BLOCK_D", "BLOCK_C", "num_warps")
    sizes = tall if rows >= _MANY_ROWS else flat
    return [dict(zip(names, each, strict=True)) for each in sizes]
