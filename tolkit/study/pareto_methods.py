"""What a frontier is made of: this toolchain's own ways to store tables, and peers that are there.

V vocabulary, L layers, D hidden, K FFN inner size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tolkit.errors import ResourceError, UsageError
from tolkit.study.bundles import MODES
from tolkit.study.peers import FFN_PEER, PEERS, Peer, installed_version
from tolkit.study.spec import words

__all__ = [
    "FFN",
    "OWN",
    "Own",
    "bits_at_1b",
    "chosen_names",
    "ffn_bits_at_1b",
    "missing_libraries",
    "usable_peers",
]

FFN = "ffn-nf4"
"""The token FFNs' weights in nf4, rows recomputed: no table at all."""

_V_1B, _D_1B, _K_1B = 128_256, 2048, 5464
_SAMPLE_ROWS = 64
_BUDGETS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Own:
    """One way of this toolchain.

    options: of CompressSpec.     modes: of `tolkit.study.bundles.MODES`.
    """

    name: str
    options: Mapping[str, Any]
    modes: Sequence[str] = MODES


def _rank(percent: int) -> Own:
    return Own(f"svd-{percent}", {"rank": f"{percent}%", "codec": "f16"})


def _budgets() -> tuple[Own, ...]:
    """Tables filled to falling sizes, with fixed widths and entropy-coded."""
    return tuple(
        Own(f"{name}-{bits:g}", {"bits_per_value": bits, "coding": coding}, ("feedback",))
        for name, coding in (("bands", "fixed"), ("coded", "entropy"))
        for bits in reversed(_BUDGETS)
    )


OWN: tuple[Own, ...] = (
    *_budgets(),
    Own("int8", {"codec": "int8"}),
    Own("nf4", {"codec": "nf4"}),
    Own("int4", {"codec": "int4"}),
    Own("svd-50-nf4", {"rank": "50%", "codec": "nf4"}),
    *(_rank(percent) for percent in (75, 50, 25, 10)),
)


def usable_peers(width: int) -> list[Peer]:
    """Peers whose library is installed and that can store rows of this width."""
    return [
        peer
        for peer in PEERS
        if installed_version(peer.package) is not None and peer.misfit(width) is None
    ]


def missing_libraries() -> list[str]:
    """Libraries of peers that are not installed."""
    names = dict.fromkeys(peer.package for peer in PEERS)
    return [name for name in names if installed_version(name) is None]


def chosen_names(values: str | None, width: int) -> frozenset[str] | None:
    """The methods that ``--values`` names, itself or by library; None for all there are.

    Raises:
        UsageError: no such method, or one that cannot store rows of this width.
        ResourceError: its library is not installed.
    """
    if values is None:
        return None
    groups = {"ours": [own.name for own in OWN]}
    for peer in PEERS:
        groups.setdefault(peer.package, []).append(peer.name)
    singles = {name for names in groups.values() for name in names} | {FFN}
    usable = {own.name for own in OWN} | {peer.name for peer in usable_peers(width)} | {FFN}
    found: set[str] = set()
    for word in words(values):
        if word not in groups and word not in singles:
            known = [*groups, FFN, *(own.name for own in OWN), *(peer.name for peer in PEERS)]
            raise UsageError(f"values: {word!r} is no method, expected {', '.join(known)}")
        names = {name for name in groups.get(word, [word]) if name in usable}
        if not names:
            raise _unusable(word, width)
        found |= names
    return frozenset(found)


def _unusable(word: str, width: int) -> UsageError | ResourceError:
    peer = next(peer for peer in PEERS if word in (peer.name, peer.package))
    if installed_version(peer.package) is None:
        return ResourceError(
            f"values: {word!r} needs {peer.package}, which is not installed",
            hint="install it with: pip install 'tolkit[peers]'",
        )
    return UsageError(f"values: {word!r} does not fit, {peer.misfit(width)}")


def bits_at_1b(peer: Peer) -> float:
    """Bits a value at V 128,256 and D 2048: counted on a few rows, shared bytes over all."""
    sample_VD = torch.randn(
        (_SAMPLE_ROWS, _D_1B), generator=torch.Generator().manual_seed(0)
    ).contiguous()
    stored = peer.round_trip(sample_VD)
    rows_bits = 8 * stored.row_bytes / sample_VD.numel()
    return rows_bits + 8 * stored.shared_bytes / (_V_1B * _D_1B)


def ffn_bits_at_1b() -> float:
    """The same for FFN weights: 3 K D of them stand for V D values of a table."""
    return bits_at_1b(FFN_PEER) * 3 * _K_1B / _V_1B + 32 / _V_1B
