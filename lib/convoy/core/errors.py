"""The error tree. Every error names what happened, where, and what to do next, and survives pickling."""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Process exit codes, a public contract."""

    OK = 0
    ERROR = 1
    USAGE = 2
    ERROR_BUDGET_EXCEEDED = 3
    STOPPED_RESUMABLE = 4
    REFUSED_BY_GATE = 5
    GIVEN_UP = 6


class ConvoyError(Exception):
    """Base of all errors that Convoy raises on purpose.

    `what` is one sentence about what happened, `where` the key, file or setting it happened at, `next_step`
    the command or change that helps. Further keyword fields are kept in `fields`.
    """

    exit_code: ExitCode = ExitCode.ERROR
    retryable: bool = False

    def __init__(self, what: str, *, where: str = "", next_step: str = "", **fields: Any) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.next_step = next_step
        self.fields = fields

    def __str__(self) -> str:
        text = f"{self.what} [{self.where}]" if self.where else self.what
        return f"{text}\n  next: {self.next_step}" if self.next_step else text

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.where, self.next_step, self.fields)


def _rebuild(
    kind: type[ConvoyError], what: str, where: str, next_step: str, fields: dict[str, Any]
) -> ConvoyError:
    return kind(what, where=where, next_step=next_step, **fields)


class ConfigError(ConvoyError):
    """A config, argument or setting that cannot be used."""

    exit_code = ExitCode.USAGE


class DataError(ConvoyError):
    """Input data that cannot be used."""


class ErrorBudgetExceeded(DataError):
    """More samples were rejected than the error budget allows. The results are kept."""

    exit_code = ExitCode.ERROR_BUDGET_EXCEEDED


class StorageError(ConvoyError):
    """An object store or file system failed."""


class StoreUnavailable(StorageError):
    """The store kept failing after all retries; once it answers the same command goes on."""

    exit_code = ExitCode.STOPPED_RESUMABLE
    retryable = True


class ObjectNotFound(StorageError):
    """The object does not exist."""


class ObjectArchived(StorageError):
    """The object lies in an archive, such as Glacier, and cannot be read before it is restored."""


class ObjectUnreadable(StorageError):
    """The disk does not give the bytes of this file (EIO)."""


class ObjectReplaced(StorageError):
    """Another version took the place of the object while that was read."""


class StorageFull(StorageError):
    """There is no room for what is to be written; with room the same command goes on."""

    exit_code = ExitCode.STOPPED_RESUMABLE


class AccessDenied(StorageError):
    """The credentials do not allow the request."""


class CredentialsRefused(AccessDenied):
    """There are no credentials, or the store does not know them: no object at all can be had with them."""


class CredentialsExpired(CredentialsRefused):
    """Temporary credentials have run out; with fresh ones the same command goes on."""

    exit_code = ExitCode.STOPPED_RESUMABLE


class ReadingRefused(CredentialsRefused):
    """The credentials allow to read no object any more; once they do the same command goes on."""

    exit_code = ExitCode.STOPPED_RESUMABLE


class SourceMissing(StorageError):
    """Not one object is where it was, as where a folder is not mounted; once they are back the same command goes on."""

    exit_code = ExitCode.STOPPED_RESUMABLE


class PreconditionFailed(StorageError):
    """A conditional write was refused: the object exists, or is not the version that was expected."""


class ConditionalWriteUnsupported(StorageError):
    """The server has no such conditional write."""


class ChecksumMismatch(StorageError):
    """Bytes that were read differ from the bytes that were recorded."""


class RunMismatch(ConvoyError):
    """An unfinished run exists for the same target, but with other inputs, config or weights."""

    exit_code = ExitCode.USAGE


class LeaseHeld(ConvoyError):
    """Another driver works on the same run."""


class LeaseLost(ConvoyError):
    """Another driver took the run over, because this one did not renew its lease in time."""


class RunCancelled(ConvoyError):
    """The run was given up, by a person; the same command starts a new one."""

    exit_code = ExitCode.GIVEN_UP


class ClusterError(ConvoyError):
    """Ray or a worker failed."""


class ClusterLost(ClusterError):
    """Ray, or the node that work ran on, is gone; with another cluster the same command goes on."""

    exit_code = ExitCode.STOPPED_RESUMABLE


class NoRoom(ClusterError):
    """The cluster has not, or not soon enough, what the work needs; with room the same command goes on."""

    exit_code = ExitCode.STOPPED_RESUMABLE


class VersionMismatch(ClusterError):
    """Other libraries or other code than what is gone on with: another attempt would meet them again."""


class TrainingError(ConvoyError):
    """Training cannot go on."""


# What concerns one file, whatever becomes of others.
OF_ONE_FILE: tuple[type[ConvoyError], ...] = (
    DataError,
    ObjectNotFound,
    ObjectArchived,
    ObjectUnreadable,
    ObjectReplaced,
    ChecksumMismatch,
)

# What keeps any work from going on in this place, whatever it is: once that is seen to, the same command goes on.
OBSTACLES: tuple[type[ConvoyError], ...] = (
    StoreUnavailable,
    StorageFull,
    AccessDenied,
    SourceMissing,
    LeaseHeld,
    LeaseLost,
    RunCancelled,
    NoRoom,
    VersionMismatch,
)
