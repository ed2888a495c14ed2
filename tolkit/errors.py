"""The error family of tolkit, re-exported from the storey below."""

from tolkit_formats.errors import (
    BundleError,
    CheckpointError,
    DataError,
    GateError,
    InputError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    ResourceError,
    TolError,
    UnsafeInputError,
    UnsupportedVersionError,
    UsageError,
)

__all__ = [
    "BundleError",
    "CheckpointError",
    "DataError",
    "GateError",
    "InputError",
    "MismatchError",
    "NonFiniteError",
    "OutputExistsError",
    "ResourceError",
    "TolError",
    "UnsafeInputError",
    "UnsupportedVersionError",
    "UsageError",
]
