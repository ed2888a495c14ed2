"""Token-wise lookup table bundles on disk: read, write, verify. numpy only; see SPEC.md.

>>> from tolkit_formats import open_bundle
>>> bundle = open_bundle("B.tol")
>>> bundle.rows([17, 4]).shape      # [tokens, kept layers, hidden size], float32
"""

from tolkit_formats.errors import TolError
from tolkit_formats.manifest import FORMAT_VERSION, Manifest
from tolkit_formats.reader import Bundle, open_bundle
from tolkit_formats.verify import VerifyReport, verify
from tolkit_formats.writer import BundleWriter

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "BundleWriter",
    "Manifest",
    "TolError",
    "VerifyReport",
    "open_bundle",
    "verify",
]
