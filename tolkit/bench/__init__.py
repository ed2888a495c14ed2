"""Benchmarks: what decoding and look-ups cost, here and now."""

from tolkit.bench.decode import DecodeReport, DecodeResult, bench_decode
from tolkit.bench.specs import DecodeSpec

__all__ = ["DecodeReport", "DecodeResult", "DecodeSpec", "bench_decode"]
