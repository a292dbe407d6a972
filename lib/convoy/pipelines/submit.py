"""Submitting a job to a cluster: its settings checked here, its id made of what it is, its end told truly."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from convoy.cluster.growth import size_variables
from convoy.cluster.submission import JobService, Submission, SubmittedJob
from convoy.core.code_revision import package_digest
from convoy.core.config import StrictModel, parse_config, write_settings
from convoy.core.errors import ConfigError
from convoy.core.fingerprints import digest
from convoy.core.secrets import find_secrets

CONFIG_FILE = "job.yaml"
NEW_RUN = "--new-run"
# The code that runs here is the code that is sent.
PACKAGE = Path(__file__).parents[1]
_ID_DIGITS = 16


class Verb(StrEnum):
    """The jobs that can be submitted."""

    CACHE = "cache"
    TRAIN = "train"
    TUNE = "tune"
    EVALUATE = "evaluate"
    SCORE = "score"
    RETRAIN = "retrain"
    ADVISE = "advise"
    INSPECT = "inspect"


class Waiting(StrEnum):
    """What a submission waits for: nothing, or the end of the job while its log is shown."""

    NOT = "not"
    FOLLOW = "follow"


# Where the config of each job lives; imported only for the one that is submitted.
_CONFIGS = {
    Verb.CACHE: ("convoy.pipelines.cache", "CacheConfig"),
    Verb.TRAIN: ("convoy.pipelines.train_config", "TrainConfig"),
    Verb.TUNE: ("convoy.pipelines.tune_config", "TuneConfig"),
    Verb.EVALUATE: ("convoy.pipelines.evaluate", "EvaluateConfig"),
    Verb.SCORE: ("convoy.pipelines.score_config", "ScoreConfig"),
    Verb.RETRAIN: ("convoy.pipelines.retrain_config", "RetrainConfig"),
    Verb.ADVISE: ("convoy.pipelines.advise_config", "AdviseConfig"),
    Verb.INSPECT: ("convoy.pipelines.inspect_config", "InspectConfig"),
}


class JobRequest(StrictModel):
    """A job to submit: its settings as its config file and overrides say them, and which attempt at it this is.

    An attempt that fails is sent again by the same command until it had `tries`: each is a submission of its own.
    `cpus` and `gpus` are what the cluster is to have, in all, before the job plans; None leaves it to the environment
    of its head.
    """

    verb: Verb
    settings: Mapping[str, Any] = Field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    attempt: str = "1"
    tries: int = Field(default=1, ge=1)
    cpus: int | None = Field(default=None, ge=1)
    gpus: int | None = Field(default=None, ge=0)


class JobStatus(BaseModel):
    """A submitted job. `exit_code` is the driver's own, null while it is at work.

    `message` says why it ended without success, as far as the cluster knows: also where there is no log that could.
    """

    submission_id: str
    status: str
    exit_code: int | None
    message: str = ""
    verb: str = ""
    attempt: str = ""
    number_of_try: int = 1
    started: datetime | None = None
    ended: datetime | None = None


class SubmitReport(JobStatus):
    """What became of a submission, and whether this command sent it or found it there."""

    address: str
    submitted: bool
    note: str = ""

    @property
    def process_exit_code(self) -> int:
        """What the submitting command ends with: the driver's exit code; 0 where nobody waited for it."""
        return self.exit_code or 0


class LogReport(BaseModel):
    """What a job has printed so far."""

    submission_id: str
    logs: str


class CancelReport(JobStatus):
    """A job that was asked to stop."""

    asked: bool
    note: str = ""


class JobList(BaseModel):
    """All submissions that the cluster remembers."""

    address: str
    jobs: list[JobStatus]


def run_submit(
    address: str, request: JobRequest, *, waiting: Waiting, write_log: Callable[[str], None]
) -> SubmitReport:
    """Submit a job, unless the cluster has it already, and report its end.

    The submission id is a digest of verb, settings, arguments, machines asked for, code, attempt and try. So the
    same command again finds the job of the first one: it shows its log to the end, or just its end, and changes
    nothing. Where that job failed in a way that another try may not, and has tries left, the next try is sent. Raises
    ConfigError for settings that do not fit or hold what looks like a secret, ClusterError if the cluster refuses.
    """
    submission = plan_submission(request)
    service = JobService(address)
    for number in range(2, request.tries + 1):
        earlier = service.find(submission.submission_id)
        if earlier is None or not earlier.may_be_tried_again:
            break
        submission = plan_submission(request, number_of_try=number, begun_on=earlier.metadata.get("date"))
    submitted = service.submit(submission)
    if waiting is Waiting.FOLLOW:
        service.follow_logs(submission.submission_id, write_log)
        job = service.wait(submission.submission_id)
    else:
        job = service.get(submission.submission_id)
    return SubmitReport(
        **_status(job).model_dump(),
        address=address,
        submitted=submitted,
        note="" if submitted else _repeat_note(job),
    )


def plan_submission(
    request: JobRequest, *, number_of_try: int = 1, begun_on: str | None = None
) -> Submission:
    """The submission of a try at a job, with an id that is a function of what it is. Sends nothing.

    A retraining whose date neither its settings nor its attempt name is told `begun_on`, the date of the try before,
    or else today; that is no part of its id, so that the same command finds its job after midnight too. Raises
    ConfigError for settings that do not fit the job, or that hold what looks like a secret.
    """
    settings = {**request.settings, "workspace": _place(request.settings.get("workspace"))}
    _refuse_secrets({**settings, "arguments": list(request.arguments), "attempt": request.attempt})
    if request.verb is Verb.RETRAIN:
        settings["date"] = settings.get("date") or _date_of(request.attempt)
    module, name = _CONFIGS[request.verb]
    config = parse_config(
        getattr(importlib.import_module(module), name), settings, where=f"submit {request.verb}"
    )
    if request.verb is Verb.RETRAIN:
        settings["date"] = settings["date"] or begun_on or datetime.now(UTC).date().isoformat()
    package = PACKAGE
    variables = size_variables(request.cpus, request.gpus)
    parts: dict[str, Any] = {
        "verb": request.verb.value,
        "config": config.model_dump(mode="json"),
        "arguments": list(request.arguments),
        # Like the workers of a config: whoever asks for other machines does not want the end of the job before.
        "variables": variables,
        "code": code_digest(package),
        "attempt": request.attempt,
    }
    command = ["python", "-m", "convoy.cli", request.verb.value, "--config", CONFIG_FILE, "--json"]
    if NEW_RUN in request.arguments:
        from convoy.storage.runs import SUBMISSION_VARIABLE  # noqa: PLC0415 (as in `_place`)

        # So a later try goes on with what one before has begun, and begins anew where none came so far.
        variables = {**variables, SUBMISSION_VARIABLE: _submission_id(parts, number_of_try=1)}
    return Submission(
        submission_id=_submission_id(parts, number_of_try),
        entrypoint=shlex.join([*command, *request.arguments]),
        package=package,
        variables=variables,
        files={CONFIG_FILE: write_settings(settings)},
        metadata={
            "verb": request.verb.value,
            "attempt": request.attempt,
            "try": str(number_of_try),
            "config": digest(parts["config"]),
            "code": parts["code"],
            **({"date": str(settings["date"])} if "date" in settings else {}),
        },
    )


def _submission_id(parts: Mapping[str, Any], number_of_try: int) -> str:
    return f"convoy-{parts['verb']}-{digest({**parts, 'try': number_of_try})[:_ID_DIGITS]}"


def code_digest(package: Path) -> str:
    """The digest of all files of a package that travel, by name and content; the revision of code that runs.

    Raises ConfigError if the folder is not the whole package.
    """
    if not (package / "cli" / "__main__.py").is_file():
        raise ConfigError(
            "the code to send is not the whole package",
            where=str(package),
            next_step="submit from an installation or a checkout of Convoy",
        )
    return package_digest(package)


def job_status(address: str, submission_id: str) -> JobStatus:
    """How a submitted job stands. ClusterError if the cluster does not know it."""
    return _status(JobService(address).get(submission_id))


def job_logs(
    address: str, submission_id: str, *, waiting: Waiting, write_log: Callable[[str], None]
) -> LogReport:
    """What a job has printed; with FOLLOW, everything up to its end, handed to `write_log` as it comes."""
    service = JobService(address)
    if waiting is Waiting.FOLLOW:
        service.get(submission_id)
        service.follow_logs(submission_id, write_log)
    return LogReport(submission_id=submission_id, logs=service.logs(submission_id))


def cancel_job(address: str, submission_id: str) -> CancelReport:
    """Ask a job to stop. Its run stays, and the same settings under another attempt go on with it."""
    service = JobService(address)
    asked = service.cancel(submission_id)
    job = service.wait(submission_id)
    return CancelReport(
        **_status(job).model_dump(),
        asked=asked,
        note="its run can go on: submit it with another --attempt" if asked else "it had ended before",
    )


def list_jobs(address: str) -> JobList:
    """All submissions that the cluster remembers, the newest first."""
    return JobList(address=address, jobs=[_status(job) for job in JobService(address).jobs()])


def _refuse_secrets(told: Mapping[str, Any]) -> None:
    if found := find_secrets(told):
        raise ConfigError(
            "a submission may hold no secret: Ray keeps settings and shows them on its dashboard",
            where="; ".join(found),
            next_step="give the cluster's nodes a role, or credentials where they are started",
        )


def _date_of(attempt: str) -> str | None:
    """The logical date of a retraining, where its attempt is a scheduler's."""
    try:
        return date.fromisoformat(attempt).isoformat()
    except ValueError:
        return None


def _place(workspace: Any) -> str:
    """The workspace as the driver must be told: a path of this machine means nothing relative to its folder."""
    # Every command imports this module, and `convoy doctor` is asked where packages of the storage may not load.
    from convoy.pipelines.workspace import workspace_uri  # noqa: PLC0415
    from convoy.storage.stores import open_store  # noqa: PLC0415

    uri = workspace_uri(None if workspace is None else str(workspace))
    return uri if "://" in uri else open_store(uri).root_uri


def _status(job: SubmittedJob) -> JobStatus:
    return JobStatus(
        submission_id=job.submission_id,
        status=job.status,
        exit_code=job.exit_code,
        message=job.message,
        verb=job.metadata.get("verb", ""),
        attempt=job.metadata.get("attempt", ""),
        number_of_try=int(job.metadata.get("try", 1)),
        started=_time(job.started_ms),
        ended=_time(job.ended_ms),
    )


def _time(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def _repeat_note(job: SubmittedJob) -> str:
    if not job.ended:
        return "submitted before, and still at work; nothing was sent"
    return (
        f"submitted before, and ended with exit code {job.exit_code}; nothing was sent. To run it again, name another "
        "--attempt, or allow more --tries of this one: what its run has finished is kept"
    )


def address_of(configured: str | None, environment: Mapping[str, str]) -> str:
    """The dashboard's address: what was named, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS if it is one.

    Raises ConfigError if there is none, or if it holds a password.
    """
    named: Sequence[str | None] = (
        configured,
        environment.get("RAY_API_SERVER_ADDRESS"),
        environment.get("RAY_ADDRESS"),
    )
    address = next((candidate for candidate in named if candidate), None)
    if address is None or "@" in address:
        raise ConfigError(
            "no cluster is named" if address is None else "an address must hold no password",
            where="--address",
            next_step="add --address http://HOST:8265 or set RAY_ADDRESS; a token goes into RAY_AUTH_TOKEN",
        )
    return address.rstrip("/")
