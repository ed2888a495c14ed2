"""Tables that lie on a device as they are stored, rows decoded there when asked for.

V vocabulary, n rows asked for, K kept layers, D hidden, S record stride.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tolkit.decode.record_decoder import RecordDecoder, backbone_embedding
from tolkit.errors import BundleError, ResourceError, UsageError
from tolkit.runtime.kernels import why_not
from tolkit_formats.limits import NO_SLOT
from tolkit_formats.reader import Bundle
from tolkit_formats.records import Tier

__all__ = ["DeviceTables"]

_LOADED_ROWS = 1024


class DeviceTables:
    """All records of a bundle on one device, compressed.

    Entropy-coded records are kept as the symbols they hold, a byte each.

    Args:
        bundle: open bundle; every record is read and its CRC-32 compared.
        device: CPU or CUDA.
        dtype: of the rows; they are computed in float32.
        kernels: True for the Triton kernels, False for torch; None for the kernels where they run
            (CUDA, triton installed, TOLKIT_KERNELS not ``off``).
        embedding_VD: the model's embedding on `device`, where it is there anyway; else a bundle
            with predictors brings its own copy.

    Attributes:
        layer_ids: the layers whose rows `rows` gives.
        fused: whether kernels are used.
        decoder: what decodes records where they are not.
        resident_bytes: records, slots and shared arrays on the device.

    Raises:
        BundleError: a damaged record or shared array.
        ResourceError: the device has not enough memory.
        UsageError: kernels asked for where they cannot run.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        kernels: bool | None = None,
        embedding_VD: Tensor | None = None,
    ) -> None:
        obstacle = why_not(device)
        if kernels and obstacle is not None:
            raise UsageError(
                f"kernels: cannot run here, {obstacle}",
                hint="leave the choice to tolkit, or take a CUDA device",
            )
        self.layer_ids = bundle.layer_ids
        self.device = device
        self.fused = obstacle is None if kernels is None else kernels
        self._bundle = bundle
        self._dtype = dtype
        self._tiers = bundle.manifest.tiers
        # Which ids lie in which tier is not known without waiting for the device.
        self._fixed_shapes = device.type != "cpu"
        try:
            self._load(embedding_VD)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{bundle.path}: {bundle.table_bytes:,} bytes of tables do not fit {device}",
                hint="keep them elsewhere: --tables host, or --tables disk",
            ) from error

    def rows(self, ids_n: Tensor, *, check: bool | None = None) -> Tensor:
        """Rows of tokens, in any order, repeats allowed.

        Args:
            ids_n: int64 [n] on the device.
            check: look at the ids first, which waits for a CUDA device; None looks on a CPU only.
                Unchecked, an id that has no row gives NaN.

        Returns:
            `dtype` [n, K, D], planes in the order of `layer_ids`.

        Raises:
            UsageError: an id out of range. BundleError: a token without a record.
        """
        if check or (check is None and self.device.type == "cpu"):
            self.require_rows(ids_n)
        return self._fused.rows(ids_n) if self.fused else self._torch_rows(ids_n)

    def records(self, ids_n: Tensor) -> list[tuple[Tier, Tensor | None, Tensor]]:
        """Stored records of tokens, for decoding a layer at a time (on a CPU, without kernels).

        Returns:
            for each tier touched: it, which of the ids lie in it (None for all), U8 [those, S].

        Raises:
            UsageError: an id out of range. BundleError: a token without a record.
        """
        self.require_rows(ids_n)
        slots_n = self._slots_of(ids_n)
        if len(self._tiers) == 1:
            return [(self._tiers[0], None, self._records[0].index_select(0, slots_n))]
        pieces: list[tuple[Tier, Tensor | None, Tensor]] = []
        for tier, records_NS in zip(self._tiers, self._records, strict=True):
            place_n = slots_n - tier.first_slot
            where = ((place_n >= 0) & (place_n < tier.num_rows)).nonzero()[:, 0]
            if len(where):
                pieces.append((tier, where, records_NS.index_select(0, place_n[where])))
        return pieces

    def require_rows(self, ids_n: Tensor) -> None:
        """UsageError for an id out of range, BundleError for one without a record; waits."""
        wrong_n = (ids_n < 0) | (ids_n >= self._bundle.vocab_size)
        if bool(wrong_n.any()):
            raise UsageError(
                f"token id {int(ids_n[wrong_n][0])}: out of range, the vocabulary has "
                f"{self._bundle.vocab_size}"
            )
        if self._slot_of_token_V is not None:
            missing_n = self._slot_of_token_V.index_select(0, ids_n) < 0
            if bool(missing_n.any()):
                raise BundleError(
                    f"{self._bundle.path}: token id {int(ids_n[missing_n][0])} has no record "
                    "(partial tables)"
                )

    def _load(self, embedding_VD: Tensor | None) -> None:
        bundle = self._bundle
        self._slot_of_token_V = self._slots()
        self._records = [self._tier_records(tier) for tier in self._tiers]
        self.resident_bytes = sum(records.nbytes for records in self._records)
        if self._slot_of_token_V is not None:
            self.resident_bytes += self._slot_of_token_V.nbytes
        if bundle.manifest.predictors and embedding_VD is None:
            embedding_VD = backbone_embedding(bundle, self.device)
            self.resident_bytes += embedding_VD.nbytes if self.device.type != "cpu" else 0
        if self.fused:
            from tolkit.runtime.kernels.launch import FusedLookup

            self._fused = FusedLookup(
                bundle, self._records, self._slot_of_token_V, self._dtype, embedding_VD
            )
            self.resident_bytes += self._fused.size_bytes
        else:
            self.decoder = RecordDecoder(
                bundle, self.device, self._dtype, embedding_VD=embedding_VD
            )
            self.resident_bytes += self.decoder.size_bytes

    def _slots(self) -> Tensor | None:
        slots_V = self._bundle.slot_of_token
        if slots_V is None:
            return None
        signed_V = np.where(slots_V == NO_SLOT, -1, slots_V.astype(np.int64)).astype(np.int32)
        return torch.from_numpy(signed_V).to(self.device)

    def _tier_records(self, tier: Tier) -> Tensor:
        """Records U8 [rows, S], or symbols [rows, C]; read in pieces, so little is held twice."""
        records_NS = torch.empty(
            (tier.num_rows, tier.stride), dtype=torch.uint8, device=self.device
        )
        for first in range(0, tier.num_rows, _LOADED_ROWS):
            stop = min(first + _LOADED_ROWS, tier.num_rows)
            slots = np.arange(first, stop, dtype=np.int64) + tier.first_slot
            records_NS[first:stop] = torch.from_numpy(self._bundle.shards.take(tier, slots))
        return records_NS

    def _torch_rows(self, ids_n: Tensor) -> Tensor:
        slots_n = self._slots_of(ids_n)
        if len(self._tiers) == 1 and not self._fixed_shapes and bool((slots_n >= 0).all()):
            return self.decoder.decode(0, self._records[0].index_select(0, slots_n), ids_n)
        rows_nKD = torch.full(
            (len(ids_n), len(self.layer_ids), self._bundle.hidden_size),
            float("nan"), dtype=self._dtype, device=self.device,
        )  # fmt: skip
        known_n = ids_n.clamp(0, self._bundle.vocab_size - 1)
        for tier, records_NS in zip(self._tiers, self._records, strict=True):
            place_n = slots_n - tier.first_slot
            inside_n = (place_n >= 0) & (place_n < tier.num_rows)
            if not self._fixed_shapes:
                where = inside_n.nonzero()[:, 0]
                records_nS = records_NS.index_select(0, place_n[where])
                rows_nKD[where] = self.decoder.decode(tier.index, records_nS, known_n[where])
            else:
                # Every row is decoded in every tier.
                records_nS = records_NS.index_select(0, place_n.clamp(0, tier.num_rows - 1))
                decoded_nKD = self.decoder.decode(tier.index, records_nS, known_n)
                rows_nKD = torch.where(inside_n[:, None, None], decoded_nKD, rows_nKD)
        return rows_nKD

    def _slots_of(self, ids_n: Tensor) -> Tensor:
        """Int64 slots, -1 where there is none."""
        if self._slot_of_token_V is None:
            return torch.where(ids_n < self._bundle.vocab_size, ids_n, -1)
        wrong_n = (ids_n < 0) | (ids_n >= self._bundle.vocab_size)
        slots_n = self._slot_of_token_V.index_select(0, ids_n.masked_fill(wrong_n, 0)).long()
        return slots_n.masked_fill_(wrong_n, -1)
