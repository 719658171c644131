"""Exceptions: one for each kind of the library's errors."""

from __future__ import annotations


class Error(Exception):
    """A failure of a call. ``rank`` reports it, ``peer`` is the rank that it is about; None where they are not known."""

    kind: str = "error"
    rank: int | None = None
    peer: int | None = None


class InvalidError(Error, ValueError):
    """An argument, an operation or a tensor is invalid. Nothing was sent."""

    kind = "invalid"


class UnsupportedError(Error, NotImplementedError):
    """The backend cannot do it. Nothing was sent."""

    kind = "unsupported"


class UnavailableError(Error, RuntimeError):
    """Driver, device or kernels are missing or unusable."""

    kind = "unavailable"


class OutOfMemoryError(Error, MemoryError):
    """Memory has no room."""

    kind = "out_of_memory"


class BootstrapError(Error, ConnectionError):
    """The ranks could not form a group."""

    kind = "bootstrap"


class SystemFailure(Error, OSError):
    """The operating system or the driver refused something."""

    kind = "system"


class TimedOutError(Error, TimeoutError):
    """A rank did not come within the deadline."""

    kind = "timed_out"


class LostError(Error, ConnectionError):
    """A rank was lost, or gave up."""

    kind = "lost"


class AbortedError(Error, RuntimeError):
    """The group was aborted."""

    kind = "aborted"


class MismatchError(Error, RuntimeError):
    """Ranks made different calls."""

    kind = "mismatch"


KINDS: dict[str, type[Error]] = {
    error.kind: error
    for error in (
        InvalidError,
        UnsupportedError,
        UnavailableError,
        OutOfMemoryError,
        BootstrapError,
        SystemFailure,
        TimedOutError,
        LostError,
        AbortedError,
        MismatchError,
    )
}


def make(kind: str, text: str, rank: int | None, peer: int | None) -> Error:
    """Makes the exception of a kind."""
    error = KINDS.get(kind, SystemFailure)(text)
    error.rank, error.peer = rank, peer
    return error
