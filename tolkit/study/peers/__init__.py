"""Other libraries' formats to compare with: one file a library, one line a format.

A peer's library is imported when the peer is used; those that are not installed are left out.
"""

from __future__ import annotations

from tolkit.study.peers.base import Peer, Stored, installed_version
from tolkit.study.peers.bitsandbytes import BlockwiseInt8, FourBitPeer
from tolkit.study.peers.gguf import READ_ONLY, GgufPeer
from tolkit.study.peers.hqq import HqqPeer
from tolkit.study.peers.torchao import TorchaoPeer

__all__ = ["FFN_PEER", "GGUF_READ_ONLY", "PEERS", "Peer", "Stored", "installed_version"]

FFN_PEER: Peer = FourBitPeer("bnb-nf4-dq", "nf4", double=True)
"""What the FFN weights are stored in where rows are recomputed from them."""

GGUF_READ_ONLY = READ_ONLY

PEERS: tuple[Peer, ...] = (
    BlockwiseInt8("bnb-int8"),
    FourBitPeer("bnb-nf4", "nf4"),
    FFN_PEER,
    FourBitPeer("bnb-fp4", "fp4"),
    FourBitPeer("bnb-fp4-dq", "fp4", double=True),
    GgufPeer("gguf-q8_0", "Q8_0"),
    GgufPeer("gguf-q5_1", "Q5_1"),
    GgufPeer("gguf-q5_0", "Q5_0"),
    GgufPeer("gguf-q4_1", "Q4_1"),
    GgufPeer("gguf-q4_0", "Q4_0"),
    GgufPeer("gguf-mxfp4", "MXFP4"),
    HqqPeer("hqq-8", 8),
    HqqPeer("hqq-4", 4),
    HqqPeer("hqq-3", 3),
    HqqPeer("hqq-2", 2),
    TorchaoPeer("torchao-int8", 8, None),
    TorchaoPeer("torchao-int4", 4, 32),
    TorchaoPeer("torchao-int4-zp", 4, 32, symmetric=False),
    TorchaoPeer("torchao-int2-zp", 2, 32, symmetric=False),
)
