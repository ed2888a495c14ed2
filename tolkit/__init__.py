"""tolkit: build, compress, check and evaluate token-wise lookup tables (MemoryLLM)."""

__version__ = "0.1.0"
