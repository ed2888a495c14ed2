"""Rows from the stored bytes of records, in torch: the oracle of the kernels, and the CPU's path.

V vocabulary, n rows asked for, K kept layers, D hidden, S record stride, P planes of equal layout,
B bytes of a plane, R rows of a basis. Everything shared by rows (codebooks, bases, predictors) is
expanded once and lies on the device; decoding reads nothing from the host and waits for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tolkit.decode.element_planes import empty_rows
from tolkit.decode.plane_groups import SharedArrays, plane_rows, tier_decoders
from tolkit.model.files import mapped_tensor
from tolkit_formats.reader import Bundle

__all__ = ["PlaneDecoder", "RecordDecoder", "backbone_embedding", "unit_rows"]

_EMBEDDING = "model.embed_tokens.weight"


class RecordDecoder:
    """Decodes records of one bundle.

    Args:
        bundle: open bundle; its shared arrays are read, checked and expanded here.
        device: where records come from and rows go to.
        dtype: of the rows; they are computed in float32.
        embedding_VD: the model's embedding on `device`, where it is there anyway; else a bundle
            with predictors has it mapped (CPU) or copied (elsewhere) from its backbone.

    Attributes:
        size_bytes: of the expanded bases and predictors, the largest arrays it holds.

    Raises:
        BundleError: a shared array no encoder writes; the message names the layer.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        embedding_VD: Tensor | None = None,
    ) -> None:
        self.layer_ids = bundle.layer_ids
        self.device = device
        self.dtype = dtype
        self._width = bundle.hidden_size
        shared = SharedArrays(bundle, device)
        self._tiers = [tier_decoders(tier, shared, device) for tier in bundle.manifest.tiers]
        self._predictors = {
            place: torch.from_numpy(weights_DD).to(device)
            for place, layer in enumerate(bundle.layer_ids)
            if (weights_DD := shared.predictor(layer)) is not None
        }
        expanded = [*shared.bases, *self._predictors.values()]
        self.size_bytes = sum(tensor.nbytes for tensor in expanded)
        if self._predictors:
            self._embedding_VD = (
                backbone_embedding(bundle, device) if embedding_VD is None else embedding_VD
            )

    def decode(self, tier: int, records_nS: Tensor, ids_n: Tensor) -> Tensor:
        """Rows of records of one tier.

        Args:
            tier: index of the tier.
            records_nS: U8 on the device: stored records, or symbol planes where they are coded.
            ids_n: int64, the records' tokens; read only by a bundle with predictors.

        Returns:
            `dtype` [n, K, D], planes in the order of `layer_ids`.
        """
        records_nS = _aligned(records_nS)
        decoders = self._tiers[tier]
        if len(decoders) == 1 and not self._predictors:
            rows_nKD = decoders[0].rows(records_nS)
        else:
            shape = (len(records_nS), len(self.layer_ids), self._width)
            rows_nKD = empty_rows(shape, self.device)
            for decoder in decoders:
                rows_nKD[:, decoder.index] = decoder.rows(records_nS)
        self._add_predictions(rows_nKD, ids_n)
        return rows_nKD.to(self.dtype)

    def decode_plane(self, tier: int, place: int, plane_nB: Tensor, ids_n: Tensor) -> Tensor:
        """One plane of what `decode` gives, so that few layers' rows need be alive at a time.

        Args:
            place: which of `layer_ids`.
            plane_nB: U8 [n, B] on the device: that plane's bytes of the records.

        Returns:
            `dtype` [n, D].
        """
        (decoder,) = [decoder for decoder in self._tiers[tier] if place in decoder.places]
        rows_nD = decoder.rows.plane(decoder.places.index(place), _aligned(plane_nB))
        if place in self._predictors:
            unit_nD = unit_rows(self._embedding_VD.index_select(0, ids_n))
            rows_nD = rows_nD + unit_nD @ self._predictors[place].T
        return rows_nD.to(self.dtype)

    def _add_predictions(self, rows_nKD: Tensor, ids_n: Tensor) -> None:
        if not self._predictors:
            return
        unit_nD = unit_rows(self._embedding_VD.index_select(0, ids_n))
        for place, weights_DD in self._predictors.items():
            rows_nKD[:, place] += unit_nD @ weights_DD.T


class PlaneDecoder:
    """Decodes one layer's plane on the CPU, without its predictor.

    Args:
        bundle: open bundle; the layer's shared arrays are read, checked and expanded here.
        layer: original index of a kept layer.

    Raises:
        UsageError: a layer without a table. BundleError: a shared array no encoder writes.
    """

    def __init__(self, bundle: Bundle, layer: int) -> None:
        bundle.plane(layer)
        device = torch.device("cpu")
        shared = SharedArrays(bundle, device)
        place = bundle.layer_ids.index(layer)
        self._tiers = [
            plane_rows([tier.planes[place]], shared, device) for tier in bundle.manifest.tiers
        ]

    def rows(self, tier: int, plane_nB: Tensor) -> Tensor:
        """Float32 [n, D] of the plane's bytes U8 [n, B] in records of a tier."""
        return self._tiers[tier].plane(0, _aligned(plane_nB))


def unit_rows(embedded_nD: Tensor) -> Tensor:
    """Rows scaled to a root mean square of 1, a row of zeros left alone: float32 [n, D]."""
    wide_nD = embedded_nD.float()
    mean_n1 = wide_nD.square().mean(dim=1, keepdim=True)
    return wide_nD / torch.where(mean_n1 > 0, mean_n1, 1.0).sqrt()


def _aligned(bytes_nS: Tensor) -> Tensor:
    """Records, or planes cut out of them, that views of four-byte numbers can be taken of."""
    row_bytes, step = bytes_nS.stride()
    if step == 1 and row_bytes % 4 == 0 and bytes_nS.storage_offset() % 4 == 0:
        return bytes_nS
    bytes_nS = bytes_nS.contiguous()
    return bytes_nS.clone() if bytes_nS.storage_offset() % 4 else bytes_nS


def backbone_embedding(bundle: Bundle, device: torch.device) -> Tensor:
    """A bundle's embedding [V, D] as stored: mapped on a CPU, copied elsewhere."""
    bundle.embedded([0])  # compares its digest with the one the tables are for
    return mapped_tensor(bundle.tensor_file("backbone.safetensors"), _EMBEDDING).to(device)
