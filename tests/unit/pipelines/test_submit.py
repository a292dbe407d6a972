from __future__ import annotations

import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

import convoy
from convoy.cluster.growth import CPUS_VARIABLE, GPUS_VARIABLE, ClusterSize, wanted_size
from convoy.cluster.submission import Submission, SubmittedJob
from convoy.core.errors import ConfigError
from convoy.pipelines import submit
from convoy.pipelines.submit import (
    JobRequest,
    Verb,
    Waiting,
    address_of,
    code_digest,
    plan_submission,
    run_submit,
)
from convoy.storage.runs import SUBMISSION_VARIABLE

SETTINGS = {
    "workspace": "s3://bucket/workspace",
    "dataset": "photos",
    "backbone": {"arch": "lenet5", "weights": "random"},
}
CACHE = JobRequest(verb=Verb.CACHE, settings=SETTINGS)


def test_the_same_job_has_the_same_id_and_any_change_another_one() -> None:
    name = plan_submission(CACHE).submission_id
    assert name == plan_submission(CACHE).submission_id
    changes = [
        {"settings": {**SETTINGS, "dataset": "others"}},
        {"settings": {**SETTINGS, "workspace": "s3://bucket/elsewhere"}},
        {"attempt": "2"},
        {"arguments": ("--new-run",)},
        {"gpus": 4},
    ]
    others = {plan_submission(CACHE.model_copy(update=change)).submission_id for change in changes}
    others.add(plan_submission(CACHE, number_of_try=2).submission_id)
    assert len(others | {name}) == len(changes) + 2


def test_how_many_tries_there_may_be_does_not_make_another_job() -> None:
    allowed = CACHE.model_copy(update={"tries": 3})
    assert plan_submission(allowed).submission_id == plan_submission(CACHE).submission_id


def test_a_default_that_is_spelled_out_is_the_same_job() -> None:
    told = CACHE.model_copy(update={"settings": {**SETTINGS, "writers": "many"}})
    assert plan_submission(told).submission_id == plan_submission(CACHE).submission_id


def test_a_shell_and_cron_with_other_temporary_folders_send_the_same_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "name": "digits", "strategy": "from_scratch", "local_cache": {"max_gb": 8}}
    train = JobRequest(verb=Verb.TRAIN, settings=settings)
    name = plan_submission(train).submission_id
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert plan_submission(train).submission_id == name


def test_the_code_is_part_of_the_id(tmp_path: Path) -> None:
    package = Path(shutil.copytree(Path(convoy.__file__).parent, tmp_path / "convoy"))
    before = code_digest(package)
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "made.pyc").write_bytes(b"not code that travels")
    assert code_digest(package) == before == code_digest(Path(convoy.__file__).parent)
    (package / "core" / "errors.py").write_text("# changed\n")
    assert code_digest(package) != before


def test_half_a_package_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    with pytest.raises(ConfigError, match="not the whole package"):
        code_digest(tmp_path)


def test_what_travels_is_the_package_and_the_settings_and_no_variables() -> None:
    submission = plan_submission(CACHE)
    assert submission.package == Path(convoy.__file__).parent
    assert list(submission.files) == ["job.yaml"]
    assert yaml.safe_load(submission.files["job.yaml"]) == SETTINGS
    assert submission.entrypoint == "python -m convoy.cli cache --config job.yaml --json"
    assert submission.variables == {}


def test_the_driver_asks_for_the_machines_that_were_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPUS_VARIABLE, "15")
    monkeypatch.setenv(GPUS_VARIABLE, "0")
    for gpus, wanted in ((None, ClusterSize(15, 0)), (4, ClusterSize(1, 4))):
        submission = plan_submission(CACHE.model_copy(update={"gpus": gpus}))
        # The driver's environment is the head's, and what travels goes before that.
        for name, value in submission.variables.items():
            monkeypatch.setenv(name, value)
        assert wanted_size() == wanted


RETRAIN = JobRequest(
    verb=Verb.RETRAIN,
    settings={
        "workspace": "s3://bucket/workspace",
        "name": "pets",
        "dataset": "photos",
        "backbone": SETTINGS["backbone"],
    },
)


@pytest.mark.parametrize("attempt", ["2026-11-26", "1"])
def test_a_retraining_is_told_its_date_so_that_later_tries_do_not_take_their_own(attempt: str) -> None:
    request = RETRAIN.model_copy(update={"attempt": attempt})
    before = today()
    told = str(yaml.safe_load(plan_submission(request).files["job.yaml"])["date"])
    # Midnight may come in between.
    assert told in ({before, today()} if attempt == "1" else {attempt})
    named = request.model_copy(update={"settings": {**RETRAIN.settings, "date": "2026-01-05"}})
    assert str(yaml.safe_load(plan_submission(named).files["job.yaml"])["date"]) == "2026-01-05"


def today() -> str:
    return datetime.now(UTC).date().isoformat()


class Cluster:
    """The Jobs API, of a cluster where every job has failed once it was sent."""

    def __init__(self) -> None:
        self.sent: dict[str, Submission] = {}
        self.message = ""

    def find(self, submission_id: str) -> SubmittedJob | None:
        return self.get(submission_id) if submission_id in self.sent else None

    def get(self, submission_id: str) -> SubmittedJob:
        return SubmittedJob(
            submission_id=submission_id,
            status="FAILED",
            exit_code=1,
            message=self.message,
            metadata=self.sent[submission_id].metadata,
            started_ms=None,
            ended_ms=None,
        )

    def submit(self, submission: Submission) -> bool:
        is_new = submission.submission_id not in self.sent
        self.sent.setdefault(submission.submission_id, submission)
        return is_new


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(submit, "JobService", lambda address: made)
    return made


def test_tries_of_a_retraining_keep_their_date_over_midnight(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = RETRAIN.model_copy(update={"attempt": "nightly-17", "tries": 3})
    reports = []
    for day in (26, 27, 28, 29):
        night = datetime(2026, 11, day, tzinfo=UTC)
        monkeypatch.setattr(submit, "datetime", Mock(wraps=datetime, now=lambda zone, night=night: night))
        reports.append(run_submit("http://head:8265", request, waiting=Waiting.NOT, write_log=print))
    assert [(one.submitted, one.number_of_try) for one in reports] == [
        (True, 1),
        (True, 2),
        (True, 3),
        (False, 3),
    ]
    told = [yaml.safe_load(one.files["job.yaml"])["date"] for one in cluster.sent.values()]
    assert told == ["2026-11-26"] * 3


def test_the_report_of_a_job_that_never_began_says_why(cluster: Cluster) -> None:
    cluster.message = "Job supervisor actor failed to start within 900 s"
    report = run_submit("http://head:8265", CACHE, waiting=Waiting.NOT, write_log=print)
    assert (report.status, report.exit_code, report.message) == ("FAILED", 1, cluster.message)


def test_all_tries_of_an_attempt_ask_for_the_same_new_run() -> None:
    request = CACHE.model_copy(update={"arguments": ("--new-run",)})
    first, second = plan_submission(request), plan_submission(request, number_of_try=2)
    assert first.entrypoint == second.entrypoint
    assert first.entrypoint.endswith(" --new-run")
    assert first.variables == second.variables == {SUBMISSION_VARIABLE: first.submission_id}
    another = plan_submission(request.model_copy(update={"attempt": "2"}))
    assert another.variables != first.variables


def test_a_workspace_that_is_a_path_is_told_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = {key: value for key, value in SETTINGS.items() if key != "workspace"}
    for path, whole in (("somewhere", "somewhere"), ("~/convoy", "home/convoy")):
        monkeypatch.setenv("CONVOY_WORKSPACE", path)
        submission = plan_submission(JobRequest(verb=Verb.CACHE, settings=settings))
        assert yaml.safe_load(submission.files["job.yaml"])["workspace"] == str(tmp_path / whole)


def test_a_setting_that_does_not_fit_is_refused_here_and_not_on_the_cluster() -> None:
    with pytest.raises(ConfigError, match="did you mean 'dataset'"):
        plan_submission(JobRequest(verb=Verb.CACHE, settings={**SETTINGS, "dataste": "photos"}))


@pytest.mark.parametrize("verb", Verb)
def test_every_job_checks_its_own_settings_before_it_is_sent(verb: Verb) -> None:
    with pytest.raises(ConfigError, match="did you mean 'workspace'"):
        plan_submission(JobRequest(verb=verb, settings={"worksapce": "s3://bucket/convoy"}))


def test_a_secret_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "c0ffee-c0ffee-c0ffee")
    for request in (
        JobRequest(verb=Verb.CACHE, settings={**SETTINGS, "dataset": "c0ffee-c0ffee-c0ffee"}),
        JobRequest(verb=Verb.CACHE, settings=SETTINGS, attempt="c0ffee-c0ffee-c0ffee"),
    ):
        with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN") as refused:
            plan_submission(request)
        assert "c0ffee" not in str(refused.value)
    monkeypatch.setenv("CONVOY_WORKSPACE", "s3://bucket/c0ffee-c0ffee-c0ffee")
    with pytest.raises(ConfigError, match="workspace"):
        plan_submission(JobRequest(verb=Verb.CACHE, settings={"dataset": "digits"}))


def test_the_address_is_named_or_found_in_the_environment() -> None:
    environment = {"RAY_ADDRESS": "http://head:8265/", "RAY_API_SERVER_ADDRESS": ""}
    assert address_of(None, environment) == "http://head:8265"
    assert address_of("http://127.0.0.1:8265", environment) == "http://127.0.0.1:8265"
    with pytest.raises(ConfigError, match="no cluster is named"):
        address_of(None, {})
    with pytest.raises(ConfigError, match="no password"):
        address_of("http://me:word@head:8265", {})
