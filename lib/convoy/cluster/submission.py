"""Ray's Jobs API: a submission is sent once, however often asked for, and the driver's own exit code comes back."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convoy.core.errors import ClusterError, ConfigError, ExitCode

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_POLL_S = 1.0
_POLL_FAILURES = 30
# A tail that breaks (a proxy's time limit, a restarted dashboard) is taken up again where it broke: as long as the job
# is at work, and then so often in a row without anything new.
_TAIL_ATTEMPTS = 5
_SUCCEEDED, _STOPPED, _FAILED = "SUCCEEDED", "STOPPED", "FAILED"
_TERMINAL = frozenset({_SUCCEEDED, _STOPPED, _FAILED})
# Another try of the same would end the same, or do what a person stopped.
_FOR_A_PERSON = frozenset(
    {ExitCode.USAGE, ExitCode.ERROR_BUDGET_EXCEEDED, ExitCode.REFUSED_BY_GATE, ExitCode.GIVEN_UP}
)
# Where Ray begins to repeat the log, and how much of a message is shown: so much of its beginning, and of its end.
_LOG_BEGINS = ", last available logs"
_SHOWN_CHARACTERS = 300
_TALKATIVE_LOGGERS = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
# Ray prefers these variables to the address that it is given.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What is sent: a command with its variables, its package, files beside it by name, and what is known about it.

    Nothing here may be a secret: Ray keeps all of it and shows it on its dashboard. Credentials of drivers and
    workers come from where the cluster's nodes were started.
    """

    submission_id: str
    entrypoint: str
    package: Path
    files: Mapping[str, str]
    metadata: Mapping[str, str]
    variables: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedJob:
    """A job as the cluster knows it; `exit_code` is None while it is at work.

    `message` says why it ended without success, as far as the cluster knows; empty otherwise.
    """

    submission_id: str
    status: str
    exit_code: int | None
    message: str
    metadata: Mapping[str, str]
    started_ms: int | None
    ended_ms: int | None

    @property
    def ended(self) -> bool:
        """Whether the job will change no more."""
        return self.status in _TERMINAL

    @property
    def may_be_tried_again(self) -> bool:
        """Whether it failed in a way that another try may not. What was stopped was stopped by a person."""
        return self.status == _FAILED and self.exit_code not in _FOR_A_PERSON


class JobService:
    """The Jobs API of one cluster. Raises ClusterError where the cluster cannot be reached or refuses."""

    def __init__(self, address: str) -> None:
        """Connect to an address like http://127.0.0.1:8265, with the token of the environment if there is one.

        Raises ClusterError if nobody answers there or the token is missing or wrong.
        """
        self.address = address
        _prepare_environment(address)
        with _reported(address):
            self._client = _connect(address)

    def find(self, submission_id: str) -> SubmittedJob | None:
        """The job of that submission id, or None if the cluster has none."""
        with _reported(self.address):
            try:
                return _job(self._client.get_job_info(submission_id))
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    def get(self, submission_id: str) -> SubmittedJob:
        """The job of that submission id; ClusterError if the cluster has none."""
        job = self.find(submission_id)
        if job is None:
            raise ClusterError(
                "the cluster knows no such submission",
                where=f"{submission_id} at {self.address}",
                next_step="convoy submit list",
            )
        return job

    def submit(self, submission: Submission) -> bool:
        """Send a submission. False if the cluster has it already: then nothing is sent and nothing changes."""
        if self.find(submission.submission_id) is not None:
            return False
        with _reported(self.address), tempfile.TemporaryDirectory() as folder:
            for name, text in submission.files.items():
                Path(folder, name).write_text(text, encoding="utf-8")
            try:
                self._send(submission, folder)
            except RuntimeError:
                # Ray answers a second submission of the same id, sent at the same moment, with an error of its own.
                if self.find(submission.submission_id) is None:
                    raise
                return False
        return True

    def _send(self, submission: Submission, folder: str) -> None:
        self._client.submit_job(
            entrypoint=submission.entrypoint,
            submission_id=submission.submission_id,
            runtime_env=runtime_environment(folder, submission.package, submission.variables),
            metadata=dict(submission.metadata),
        )

    def follow_logs(self, submission_id: str, write: Callable[[str], None]) -> None:
        """Hand on what the job prints until it ends; what of it cannot be had any more by then is left out."""
        tail, attempts = _Tail(write), 0
        while attempts < _TAIL_ATTEMPTS:
            written, is_whole = tail.written, True
            try:
                asyncio.run(tail.follow(self._client, submission_id))
            except Exception:  # any fault of the connection: a lost log must not fail a job that goes on
                is_whole = False
            if self._ask(submission_id).ended:
                if is_whole:
                    return
                attempts = 0 if tail.written > written else attempts + 1
            time.sleep(_POLL_S)

    def wait(self, submission_id: str) -> SubmittedJob:
        """The job when it has ended, however long that takes; a dashboard that is away for a moment is waited for."""
        while not (job := self._ask(submission_id)).ended:
            time.sleep(_POLL_S)
        return job

    def _ask(self, submission_id: str) -> SubmittedJob:
        """The job as it stands, as soon as the dashboard answers."""
        for _ in range(_POLL_FAILURES - 1):
            try:
                return self.get(submission_id)
            except ClusterError:
                time.sleep(_POLL_S)
        return self.get(submission_id)

    def logs(self, submission_id: str) -> str:
        """What the job has printed so far."""
        self.get(submission_id)
        with _reported(self.address):
            return str(self._client.get_job_logs(submission_id))

    def cancel(self, submission_id: str) -> bool:
        """Ask a job to stop: SIGTERM to its driver, which leaves a run that can go on. False if it had ended."""
        if self.get(submission_id).ended:
            return False
        with _reported(self.address):
            return bool(self._client.stop_job(submission_id))

    def jobs(self) -> list[SubmittedJob]:
        """All submitted jobs that the cluster remembers, the newest first."""
        with _reported(self.address):
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started_ms or 0, reverse=True)


def runtime_environment(folder: str, package: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """The runtime environment of a submission: a folder of files, and a package that goes before an installed one.

    It has no variable of this process: Ray keeps and shows them.
    """
    return {
        "working_dir": folder,
        "py_modules": [str(package)],
        "excludes": ["**/__pycache__/"],
        "env_vars": dict(variables),
    }


class _Tail:
    """Writes a log that may have to be asked for again from its beginning, every character once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self.written = 0

    async def follow(self, client: JobSubmissionClient, submission_id: str) -> None:
        seen = 0
        async for text in client.tail_job_logs(submission_id):
            new = text[max(0, self.written - seen) :]
            seen += len(text)
            if new:
                self._write(new)
                self.written += len(new)


def _prepare_environment(address: str) -> None:
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            "a submission goes to the address of a dashboard, like http://127.0.0.1:8265",
            where=address,
            next_step="name it by --address or RAY_ADDRESS",
        )
    # Ray takes a token only where the mode says so, and looks at that when it is imported.
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def _connect(address: str) -> JobSubmissionClient:
    # Imported here, because a command that is refused must not wait for Ray.
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415

    for name in _TALKATIVE_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _no_other_address():
        return JobSubmissionClient(address)


@contextmanager
def _no_other_address() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _reported(address: str) -> Iterator[None]:
    """Faults of Ray's client as errors that say what to do."""
    from ray.exceptions import AuthenticationError  # noqa: PLC0415

    try:
        yield
    except AuthenticationError:
        raise ClusterError(
            "the cluster asks for a token, and was given none or another one",
            where=address,
            next_step="export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as the cluster has it",
        ) from None
    except OSError:  # the errors of requests are of that kind
        raise ClusterError(
            "no dashboard of Ray answers there",
            where=address,
            next_step="check --address, the tunnel or port-forward to the head node, and that ray[default] runs there",
        ) from None
    except (RuntimeError, ValueError) as error:
        raise ClusterError(
            f"the cluster refused the request: {str(error).strip().splitlines()[-1]}",
            where=address,
            next_step="see the dashboard's log on the head node",
        ) from None


def _job(details: JobDetails) -> SubmittedJob:
    status = str(details.status.value)
    return SubmittedJob(
        submission_id=details.submission_id,
        status=status,
        exit_code=_exit_code(status, details.driver_exit_code),
        message=_reason(status, details.driver_exit_code, details.message or ""),
        metadata=dict(details.metadata or {}),
        started_ms=details.start_time,
        ended_ms=details.end_time,
    )


def _reason(status: str, of_driver: int | None, told: str) -> str:
    """Why a job ended without success, in one line and without its log, of which Ray's message has a copy."""
    if status not in _TERMINAL - {_SUCCEEDED}:
        return ""
    if of_driver is not None and of_driver < 0:
        memory = "; often there was no memory left" if of_driver == -signal.SIGKILL else ""
        return f"the driver was ended by signal {-of_driver} ({signal.strsignal(-of_driver)}){memory}"
    line = " ".join(told.partition(_LOG_BEGINS)[0].split())
    if len(line) <= 2 * _SHOWN_CHARACTERS:
        return line
    return f"{line[:_SHOWN_CHARACTERS]} … {line[-_SHOWN_CHARACTERS:]}"


def _exit_code(status: str, of_driver: int | None) -> int | None:
    """The driver's exit code; where there is none, the one that says the same."""
    if status not in _TERMINAL:
        return None
    if status == _STOPPED:
        return int(ExitCode.STOPPED_RESUMABLE)
    if of_driver is not None and 0 <= of_driver <= 255:
        return of_driver
    # Killed by a signal, or never started.
    return int(ExitCode.OK if status == _SUCCEEDED else ExitCode.ERROR)
