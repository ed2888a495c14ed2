"""The one family of errors a user can cause or meet.

Every class names the process exit code it maps to, so the terminal has a single table:
2 usage, 3 quality gate, 4 input, 5 partners that do not match, 6 environment.
A message reads ``<file or option>: <what is wrong>``; the hint says what mends it.
"""

from __future__ import annotations

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


class TolError(Exception):
    """Base of all errors tolkit raises on purpose.

    Args:
        message: one line, ``<file or option>: <what is wrong>``, with got and expected.
        hint: what to do about it, preferably a command; empty when there is nothing to say.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TolError):
    """An option or argument that cannot be honoured."""

    exit_code = 2


class OutputExistsError(UsageError):
    """The destination exists and --force was not given."""


class GateError(TolError):
    """A quality gate failed or is undecided."""

    exit_code = 3


class InputError(TolError):
    """An input is missing, corrupt, unsafe or of an unsupported version."""

    exit_code = 4


class BundleError(InputError):
    """A bundle breaks a rule of formats/SPEC.md."""


class UnsupportedVersionError(BundleError):
    """A bundle needs a newer reader; the message names version or feature."""


class CheckpointError(InputError):
    """A checkpoint folder is missing, truncated or inconsistent."""


class UnsafeInputError(InputError):
    """An input that could run code or escape its folder (pickle, links, absolute names)."""


class DataError(InputError):
    """Text, tokenizer or token counts that cannot be used."""


class NonFiniteError(InputError):
    """NaN or infinity, or a value the target number format cannot hold.

    `row` and `column` locate it in the batch that was given, where there was one, so that the
    caller can name token and layer.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        row: int | None = None,
        column: int | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.row = row
        self.column = column


class MismatchError(TolError):
    """Two inputs that do not belong together (checkpoint, tokenizer, bundle, data)."""

    exit_code = 5


class ResourceError(TolError):
    """The environment falls short: device, extra, memory, disk space, a lock."""

    exit_code = 6
