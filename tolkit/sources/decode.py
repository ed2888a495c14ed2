"""Stored planes to rows, products with a basis in torch.

N rows, B bytes of a plane, C stored components, R rank, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.rotation import rotated
from tolkit_formats.codecs import Bands, Codec, Steps, Svd

__all__ = ["decode_plane"]


def decode_plane(
    codec: Codec, plane_NB: npt.NDArray[np.uint8], shared: Mapping[str, Tensor]
) -> Tensor:
    """Rows float32 [N, D] from stored bytes; products with a basis run in torch.

    numpy's own matrix product would use its own threads beside torch's.

    Args:
        shared: what `tolkit_formats.codecs.prepared` makes of the plane's arrays.
    """
    if isinstance(codec, Bands):
        return _decode_bands(codec, plane_NB, shared)
    if isinstance(codec, Steps):
        return _decode_steps(codec, plane_NB, shared)
    if isinstance(codec, Svd):
        coeffs_NR = torch.from_numpy(codec.inner.decode(plane_NB, {}))
        return coeffs_NR @ shared["basis"]
    return torch.from_numpy(codec.decode(plane_NB, {}))


def _decode_bands(
    codec: Bands, plane_NB: npt.NDArray[np.uint8], shared: Mapping[str, Tensor]
) -> Tensor:
    rows_ND = shared["mean"].repeat(len(plane_NB), 1)
    if len(codec.stored_C):
        arrays = {name: tensor.numpy() for name, tensor in shared.items()}
        values_NC = torch.from_numpy(codec.coefficients(plane_NB, arrays))
        if codec.basis:
            rows_ND += values_NC @ shared["basis"]
        else:
            full_NR = values_NC.new_zeros(rows_ND.shape)
            full_NR[:, torch.from_numpy(codec.stored_C)] = values_NC
            rows_ND += rotated(full_NR)
    return rows_ND.mul_(2.0**codec.exponent)


def _decode_steps(
    codec: Steps, plane_NB: npt.NDArray[np.uint8], shared: Mapping[str, Tensor]
) -> Tensor:
    rows_ND = shared["mean"].repeat(len(plane_NB), 1)
    if codec.count:
        arrays = {name: tensor.numpy() for name, tensor in shared.items()}
        values_NC = torch.from_numpy(codec.coefficients(plane_NB, arrays))
        if codec.basis:
            rows_ND += values_NC @ shared["basis"]
        else:
            full_NR = values_NC.new_zeros(rows_ND.shape)
            full_NR[:, : codec.count] = values_NC * shared["basis"]
            rows_ND += rotated(full_NR)
    return rows_ND.mul_(2.0**codec.exponent)
