"""What a database's errors mean for us: the one place where they are translated.

Messages never hold SQL, values or passwords; the database's own error is chained for the log of
whoever raises, except where it could name a password.
"""

from __future__ import annotations

from enum import Enum

import sqlalchemy.exc as sa_errors

from cloudlm.core.errors import CloudlmError, InternalError, StorageFailed, Unavailable


class Fault(Enum):
    """What kind of trouble an error is."""

    BUSY = "another process is writing; try again"
    DISK_FULL = "the disk is full: free some space"
    READ_ONLY = "it cannot be written: check the owner and the permissions of file and folder"
    UNREADABLE = "it cannot be opened: check that the folder exists and may be written"
    DAMAGED = "it is damaged or not a database of cloudlm: restore a copy or move it away"
    DISK_FAILED = "the disk reported an error"
    REFUSED = "the server refused the user, the password or the database's name"
    UNREACHABLE = "the server cannot be reached"
    TIMED_OUT = "it did not answer in time"
    UNKNOWN = "it reported an unexpected error"


_SQLITE = {
    "SQLITE_BUSY": Fault.BUSY,
    "SQLITE_LOCKED": Fault.BUSY,
    "SQLITE_PROTOCOL": Fault.BUSY,
    "SQLITE_FULL": Fault.DISK_FULL,
    "SQLITE_READONLY": Fault.READ_ONLY,
    "SQLITE_PERM": Fault.READ_ONLY,
    "SQLITE_CANTOPEN": Fault.UNREADABLE,
    "SQLITE_AUTH": Fault.UNREADABLE,
    "SQLITE_CORRUPT": Fault.DAMAGED,
    "SQLITE_NOTADB": Fault.DAMAGED,
    "SQLITE_IOERR": Fault.DISK_FAILED,
}
# PostgreSQL: SQLSTATE, longest prefix first.
_POSTGRESQL = {
    "53100": Fault.DISK_FULL,
    "25006": Fault.READ_ONLY,
    "42501": Fault.READ_ONLY,
    "40001": Fault.BUSY,
    "40P01": Fault.BUSY,
    "55P03": Fault.BUSY,
    "57014": Fault.TIMED_OUT,
    "3D000": Fault.REFUSED,
    "28": Fault.REFUSED,
    "53": Fault.UNREACHABLE,
    "57P": Fault.UNREACHABLE,
    "08": Fault.UNREACHABLE,
    "58": Fault.DISK_FAILED,
    "XX": Fault.DAMAGED,
}
_STORAGE = (
    Fault.DISK_FULL,
    Fault.READ_ONLY,
    Fault.UNREADABLE,
    Fault.DAMAGED,
    Fault.DISK_FAILED,
)


def fault_of(error: BaseException) -> Fault:
    """Sort an error of SQLAlchemy or a database driver."""
    if isinstance(error, TimeoutError | sa_errors.TimeoutError):
        return Fault.TIMED_OUT
    origin: BaseException = error
    if isinstance(error, sa_errors.DBAPIError) and error.orig is not None:
        origin = error.orig
    name = getattr(origin, "sqlite_errorname", None)
    if isinstance(name, str):
        return _SQLITE.get("_".join(name.split("_")[:2]), Fault.UNKNOWN)
    sqlstate = getattr(origin, "sqlstate", None)
    if isinstance(sqlstate, str):
        for length in (5, 3, 2):
            if sqlstate[:length] in _POSTGRESQL:
                return _POSTGRESQL[sqlstate[:length]]
        return Fault.UNKNOWN
    if isinstance(error, sa_errors.OperationalError | sa_errors.InterfaceError | OSError):
        return _connecting(origin)
    return Fault.UNKNOWN


def translated(error: BaseException, place: str) -> CloudlmError:
    """The verdict for ``error``; ``place`` names the database without its password."""
    fault = fault_of(error)
    message = f"the state database {place} failed: {fault.value}"
    if fault in _STORAGE:
        return StorageFailed(message)
    if fault is Fault.UNKNOWN:
        kind = type(getattr(error, "orig", None) or error).__name__
        return InternalError(f"{message} ({kind})")
    return Unavailable(message, retry_after_s=1.0)


def cause_to_show(error: BaseException) -> BaseException | None:
    """What may be chained to the verdict: never SQLAlchemy's error, whose text is the statement,
    and nothing of a failed log-in."""
    origin = getattr(error, "orig", None)
    if fault_of(error) in (Fault.REFUSED, Fault.UNREACHABLE):
        return None
    return origin if isinstance(origin, BaseException) else None


def _connecting(origin: BaseException) -> Fault:
    """A failure before the server could send an SQLSTATE; its words are all there is."""
    words = str(origin).lower()
    if "authentication" in words or "password" in words or "does not exist" in words:
        return Fault.REFUSED
    return Fault.UNREACHABLE
