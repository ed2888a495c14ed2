"""Rows handed out layer by layer, expanded when asked for, so that one layer's are alive.

n ids asked for, K kept layers, L layers, D hidden, S record stride, B bytes of a plane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tolkit.decode.record_decoder import RecordDecoder
from tolkit.model.rows import LazyPlanes
from tolkit_formats.reader import Bundle
from tolkit_formats.records import Tier

__all__ = ["TierRecords", "decoded_planes", "spread_planes"]

_AT_ONCE_BYTES = 4 << 20
_PART_BYTES = 2 << 20


@dataclass(frozen=True)
class TierRecords:
    """Records of the ids that lie in one tier.

    Attributes:
        where: int64 index of these ids among all, None for all.
        plane: which kept layer, which of those ids -> its bytes U8 [.., B] on the decoder's
            device.
        records: U8 [those, S] on the device, or None where they are not held.
    """

    tier: int
    where: Tensor | None
    plane: Callable[[int, slice], Tensor]
    records: Tensor | None = None

    @classmethod
    def held(cls, tier: Tier, where: Tensor | None, records_nS: Tensor) -> TierRecords:
        """Records that are on the device as a whole."""

        def plane(place: int, part: slice) -> Tensor:
            start = tier.planes[place].offset
            return records_nS[part, start : start + tier.planes[place].length]

        return cls(tier.index, where, plane, records_nS)


def decoded_planes(
    decoder: RecordDecoder,
    pieces: Sequence[TierRecords],
    ids_n: Tensor,
    bundle: Bundle,
) -> Sequence[Tensor | None]:
    """Rows [n, D] of each of the bundle's L layers, None for those without a table.

    Small batches are decoded at once, all layers of a codec together; of large ones a layer when
    it is asked for.

    Args:
        ids_n: int64 on the decoder's device.
    """
    kept, hidden_size = len(decoder.layer_ids), bundle.hidden_size
    row_bytes = 4 * kept * hidden_size
    held = all(piece.records is not None for piece in pieces)
    if held and len(ids_n) * row_bytes <= _AT_ONCE_BYTES:
        rows_nKD = _all_layers(decoder, pieces, ids_n, (len(ids_n), kept, hidden_size))
        return spread_planes(rows_nKD, decoder.layer_ids, bundle.num_layers)
    places = {layer: place for place, layer in enumerate(decoder.layer_ids)}

    def plane(layer: int) -> Tensor | None:
        if layer not in places:
            return None
        return _one_layer(decoder, pieces, ids_n, places[layer], hidden_size)

    return LazyPlanes(bundle.num_layers, plane)


def spread_planes(
    rows_nKD: Tensor, layer_ids: Sequence[int], num_layers: int
) -> list[Tensor | None]:
    """Rows of kept layers as a list over all layers, views of `rows_nKD`."""
    planes: list[Tensor | None] = [None] * num_layers
    for place, layer in enumerate(layer_ids):
        planes[layer] = rows_nKD[:, place]
    return planes


def _all_layers(
    decoder: RecordDecoder,
    pieces: Sequence[TierRecords],
    ids_n: Tensor,
    shape: tuple[int, int, int],
) -> Tensor:
    if len(pieces) == 1 and pieces[0].where is None and pieces[0].records is not None:
        return decoder.decode(pieces[0].tier, pieces[0].records, ids_n)
    rows_nKD = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)
    for piece in pieces:
        assert piece.records is not None and piece.where is not None
        here = ids_n[piece.where]
        rows_nKD[piece.where] = decoder.decode(piece.tier, piece.records, here)
    return rows_nKD


def _one_layer(
    decoder: RecordDecoder,
    pieces: Sequence[TierRecords],
    ids_n: Tensor,
    place: int,
    hidden_size: int,
) -> Tensor:
    """Rows of one layer, decoded some at a time: what is computed on the way stays small."""
    step = max(1, _PART_BYTES // (4 * hidden_size))
    if len(pieces) == 1 and pieces[0].where is None and len(ids_n) <= step:
        plane_nB = pieces[0].plane(place, slice(None))
        return decoder.decode_plane(pieces[0].tier, place, plane_nB, ids_n)
    rows_nD = torch.empty((len(ids_n), hidden_size), dtype=decoder.dtype, device=decoder.device)
    for piece in pieces:
        count = len(ids_n) if piece.where is None else len(piece.where)
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            where = part if piece.where is None else piece.where[part]
            rows_nD[where] = decoder.decode_plane(
                piece.tier, place, piece.plane(place, part), ids_n[where]
            )
    return rows_nD
