"""Benchmarks: what decoding, look-ups and row caches cost, here and now."""

from tolkit.bench.decode import DecodeReport, DecodeResult, bench_decode
from tolkit.bench.lookup import LookupReport, LookupResult, bench_lookup
from tolkit.bench.replay import ReplayReport, ReplayResult, bench_replay
from tolkit.bench.specs import DecodeSpec, LookupSpec, ReplaySpec

__all__ = [
    "DecodeReport",
    "DecodeResult",
    "DecodeSpec",
    "LookupReport",
    "LookupResult",
    "LookupSpec",
    "ReplayReport",
    "ReplayResult",
    "ReplaySpec",
    "bench_decode",
    "bench_lookup",
    "bench_replay",
]
