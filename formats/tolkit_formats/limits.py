"""Hard limits a reader applies before it allocates anything (SPEC section 2)."""

from __future__ import annotations

__all__ = [
    "BLOCK_ROWS",
    "CHECKSUM_BLOCK_BYTES",
    "MAX_HIDDEN_SIZE",
    "MAX_INTEGER",
    "MAX_JSON_DEPTH",
    "MAX_LAYERS",
    "MAX_MANIFEST_BYTES",
    "MAX_SHARDS",
    "MAX_SHARD_BYTES",
    "MAX_SMALL_FILE_BYTES",
    "MAX_STRIDE_BYTES",
    "MAX_TENSOR_HEADER_BYTES",
    "MAX_VOCAB_SIZE",
    "NO_SLOT",
]

MAX_MANIFEST_BYTES = 4 << 20
MAX_JSON_DEPTH = 16
MAX_INTEGER = (1 << 53) - 1
MAX_SHARDS = 65_536
MAX_LAYERS = 1_024
MAX_VOCAB_SIZE = 1 << 24
MAX_HIDDEN_SIZE = 1 << 16
MAX_TENSOR_HEADER_BYTES = 1 << 20
MAX_SHARD_BYTES = 1 << 30
MAX_STRIDE_BYTES = MAX_LAYERS * MAX_HIDDEN_SIZE * 4 + 16
MAX_SMALL_FILE_BYTES = 256 << 20  # tokenizer.json, README.md
CHECKSUM_BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 1_024  # unit of work, sharding and resume
NO_SLOT = 0xFFFFFFFF  # in tables/slots: this token has no record
