"""Errors that a caller can act on. Each names what was given, what is allowed, what to do."""


class SteersweepError(Exception):
    """Root of the project's errors: shown as one line, without a traceback."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class SpecError(SteersweepError):
    """A space, a parameter or a data file is wrong: mend what was asked for."""


class ModelError(SteersweepError):
    """The model cannot be found, loaded or steered: choose another model or revision."""


class DoesNotFit(SteersweepError):
    """More is asked for than the machines have: memory, or disk."""


class OutOfMemory(DoesNotFit):
    """A single row does not fit on this replica.

    Attributes:
        limit: Bytes that the device could give, where known.
    """

    def __init__(self, message: str, limit: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit
