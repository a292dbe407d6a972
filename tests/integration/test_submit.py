"""`convoy submit` to a head that asks for a token: one job, its true end, and no secret anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import convoy as convoy_package
from cache_jobs import CacheJob, freeze, made_job
from command_lines import convoy, last_json, settings_arguments
from convoy.cluster.growth import GPUS_VARIABLE
from convoy.pipelines.model_registry import promote_model
from convoy.pipelines.runs_list import list_runs
from convoy.pipelines.runs_state import RunState
from convoy.storage.object_store import WriterMode
from convoy.storage.stores import open_store
from infra_files import ROOT
from made_bundles import made_classifier, write_classifier
from ray_head import BIN, TOKEN, RayHead, running_head
from readme_blocks import fenced_blocks

pytestmark = pytest.mark.integration

# In the environment of head and submitter, as credentials are.
PLANTED = "planted/9fT3qLr0ZsVw7YxPb2Kd+secretkey"


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    environment = {
        "AWS_SECRET_ACCESS_KEY": PLANTED,
        "AWS_ACCESS_KEY_ID": "planted-id-0001",
        GPUS_VARIABLE: "0",
    }
    with running_head(environment) as running:
        yield running


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> CacheJob:
    return made_job(tmp_path_factory.mktemp("submit"), num_images=32)


@pytest.fixture(scope="module", autouse=True)
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The submitter's own copy of the code, which is part of a submission's id."""
    folder = tmp_path_factory.mktemp("code")
    package = Path(convoy_package.__file__).parent
    shutil.copytree(package, folder / "convoy", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield


def submitted(head: RayHead, job: CacheJob, *more: str) -> Any:
    arguments = ["submit", *job.arguments(), "--address", head.address, "--json", *more]
    # Nothing but the address decides where it goes.
    environment = {**head.environment, "RAY_ADDRESS": "http://127.0.0.1:1"}
    return convoy(*arguments, environment=environment)


@pytest.fixture(scope="module")
def command_lines() -> Iterator[set[str]]:
    """The command lines of all processes of the machine that were seen meanwhile."""
    seen: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                except OSError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield seen
    ended.set()
    watcher.join()


@pytest.fixture(scope="module")
def first(head: RayHead, job: CacheJob, command_lines: set[str]) -> Any:
    finished = submitted(head, job)
    assert finished.returncode == 0, finished.stderr
    return finished


def test_a_submitted_job_ends_with_its_log_and_exit_code(first: Any, job: CacheJob) -> None:
    report = last_json(first)
    assert (report["status"], report["exit_code"], report["submitted"]) == ("SUCCEEDED", 0, True)
    assert report["submission_id"].startswith("convoy-cache-")
    assert len(first.stdout.splitlines()) == 1
    inner = json.loads(next(line for line in first.stderr.splitlines() if line.startswith('{"run"')))
    assert (inner["recomputed"], inner["rejects"]) == (32, 1)
    assert job.verify()["ok"] is True


def test_the_same_command_again_changes_nothing_and_says_so(first: Any, head: RayHead, job: CacheJob) -> None:
    files = {path: path.stat().st_mtime_ns for path in Path(job.workspace).rglob("*") if path.is_file()}
    again = submitted(head, job)
    assert again.returncode == 0, again.stderr
    report, before = last_json(again), last_json(first)
    assert (report["submission_id"], report["submitted"]) == (before["submission_id"], False)
    assert (report["started"], report["ended"]) == (before["started"], before["ended"])
    assert "nothing was sent" in report["note"]
    assert {
        path: path.stat().st_mtime_ns for path in Path(job.workspace).rglob("*") if path.is_file()
    } == files


def test_another_attempt_is_another_job_that_finds_nothing_to_do(
    first: Any, head: RayHead, job: CacheJob
) -> None:
    report = last_json(submitted(head, job, "--attempt", "2026-11-26"))
    assert report["submission_id"] != last_json(first)["submission_id"]
    assert (report["exit_code"], report["attempt"]) == (0, "2026-11-26")
    logs = convoy("submit", "logs", report["submission_id"], "-a", head.address, environment=head.environment)
    inner = json.loads(next(line for line in logs.stdout.splitlines() if line.startswith('{"run"')))
    assert inner["recomputed"] == 0


@pytest.mark.parametrize(
    ("setting", "exit_code"),
    [("dataset=nobody-has-frozen-it", 1), ("error_budget={rate: 0, rows: 0}", 3)],
    ids=["no such dataset", "more rejects than the budget"],
)
def test_the_exit_code_of_the_driver_comes_back_and_decides_whether_it_may_run_again(
    first: Any, head: RayHead, job: CacheJob, setting: str, exit_code: int
) -> None:
    finished = submitted(head, job.changed(setting))
    assert (finished.returncode, last_json(finished)["exit_code"]) == (exit_code, exit_code)
    assert last_json(finished)["status"] == "FAILED"
    # More tries are for what may end otherwise; when they are used up, the last one's end is told.
    allowed = [last_json(submitted(head, job.changed(setting), "--tries", "2")) for _ in range(2)]
    sent = [(report["submitted"], report["number_of_try"]) for report in allowed]
    assert sent == ([(True, 2), (False, 2)] if exit_code == 1 else [(False, 1), (False, 1)])
    assert [report["exit_code"] for report in allowed] == [exit_code] * 2


def test_status_list_and_cancel(first: Any, head: RayHead) -> None:
    name = last_json(first)["submission_id"]

    def asked(*words: str) -> Any:
        return last_json(convoy("submit", *words, "-a", head.address, "--json", environment=head.environment))

    assert asked("status", name)["exit_code"] == 0
    assert name in [entry["submission_id"] for entry in asked("list")["jobs"]]
    assert asked("cancel", name)["asked"] is False
    missing = convoy("submit", "status", "convoy-cache-0", "-a", head.address, environment=head.environment)
    assert (missing.returncode, "no such submission" in missing.stderr) == (1, True)


@pytest.mark.parametrize("token", [None, "another-token-than-that-of-the-cluster"])
def test_without_the_token_nothing_is_submitted(head: RayHead, job: CacheJob, token: str | None) -> None:
    arguments = ["submit", *job.arguments(), "--address", head.address, "--attempt", "intruder", "--json"]
    # An empty variable is as good as none.
    environment = {"HOME": str(head.folder / "stranger"), "RAY_AUTH_TOKEN": token or ""}
    environment["RAY_AUTH_MODE"] = "token" if token else "disabled"
    refused = convoy(*arguments, environment=environment)
    assert refused.returncode == 1
    assert "RAY_AUTH_MODE=token" in refused.stderr
    assert "intruder" not in json.dumps(_api(head, "/api/jobs/"))


def test_the_code_and_the_size_that_were_sent_go_before_those_of_the_head(head: RayHead) -> None:
    script = """
import sys
from pathlib import Path
from convoy.cluster.submission import JobService, Submission
import convoy
service = JobService(sys.argv[1])
package = Path(convoy.__file__).parent
entrypoint = "python -c 'import convoy; print(convoy.__file__)'; echo asks for $CONVOY_CLUSTER_GPUS GPUs"
service.submit(Submission(submission_id="where", entrypoint=entrypoint, variables={"CONVOY_CLUSTER_GPUS": "4"},
                          package=package, files={"job.yaml": ""}, metadata={}))
service.wait("where")
print(service.logs("where"))
"""
    printed = subprocess.run(
        [sys.executable, "-c", script, head.address],
        env=dict(head.environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert str(head.folder) in printed
    assert "py_modules_files" in printed
    assert "asks for 4 GPUs" in printed


def test_no_secret_is_in_any_log_record_report_payload_or_process(
    first: Any, head: RayHead, job: CacheJob, command_lines: set[str]
) -> None:
    texts = {str(path): path.read_bytes() for path in _files(head.folder) + _files(Path(job.workspace))}
    assert any("job-driver-" in name for name in texts)
    assert any(name.endswith("run.json") for name in texts)
    texts["submitter"] = (first.stdout + first.stderr).encode()
    for path in ("/api/jobs/", f"/api/jobs/{last_json(first)['submission_id']}/logs", "/nodes?view=summary"):
        texts[path] = json.dumps(_api(head, path)).encode()
    texts["processes"] = "\n".join(command_lines).encode()
    assert b"convoy.cli cache" in texts["processes"]
    held = [name for name, text in texts.items() for secret in (PLANTED, TOKEN) if secret.encode() in text]
    assert held == []


@pytest.fixture(scope="module")
def scoring(job: CacheJob, tmp_path_factory: pytest.TempPathFactory) -> CacheJob:
    """A workspace that has the dataset `photos` and a champion `photos-daily`, as the README's has."""
    copy = job.copied_to(tmp_path_factory.mktemp("scoring"))
    freeze(Path(job.workspace).parent / "images", copy.workspace, name="photos")
    store = open_store(copy.workspace)
    champion = write_classifier(store, "photos-daily", made_classifier(store, 0))
    promote_model(
        copy.workspace, champion.name, digest=champion.digest, reason="the first", writers=WriterMode.MANY
    )
    return copy


def assert_scored(stdout: str, stderr: str, scoring: CacheJob) -> dict[str, Any]:
    """The submission told its end and its driver's words, and the rows are all there."""
    report: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    assert (report["status"], report["exit_code"], report["submitted"]) == ("SUCCEEDED", 0, True)
    assert report["submission_id"].startswith("convoy-score-")
    inner = json.loads(next(line for line in stderr.splitlines() if line.startswith('{"run"')))
    assert (inner["inputs"], inner["recomputed"], inner["rejects"]) == (32, 32, 1)
    assert scoring.verify(inner["run"])["ok"] is True
    return report


def test_the_commands_of_the_readme_lead_from_a_head_to_scored_images(
    head: RayHead, scoring: CacheJob, tmp_path: Path
) -> None:
    (block,) = fenced_blocks(ROOT / "README.md", "sh")["On a cluster"]
    # The head of these tests was started by the same words, on ports of its own.
    rest = [line for line in block.splitlines() if not line.startswith("ray start --head ")]
    assert len(rest) == len(block.splitlines()) - 1
    finished = subprocess.run(
        ["sh", "-ec", "\n".join(rest).replace("http://127.0.0.1:8265", head.address)],
        env={**os.environ, **head.environment, "HOME": str(tmp_path), "CONVOY_WORKSPACE": scoring.workspace},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert_scored(finished.stdout, finished.stderr, scoring)


def test_the_line_of_the_crontab_scores_once_a_day(head: RayHead, scoring: CacheJob, tmp_path: Path) -> None:
    crontab = (ROOT / "infra" / "cron" / "crontab").read_text()
    (line,) = (line for line in crontab.splitlines() if line[:1].isdigit())
    # As cron reads it: five fields, in /etc/cron.d the user, and the command with its escaped signs.
    command = line.split(maxsplit=6)[6].replace(r"\%", "%")
    for folder in ("/etc/convoy", "/var/log/convoy"):
        assert folder in command
        command = command.replace(folder, str(tmp_path))
    # No autoscaler would start them here.
    assert " --gpus 2 " in command
    command = command.replace(" --gpus 2 ", " ")
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    settings = {
        "bundle": "photos-daily@champion",
        "dataset": "photos",
        "name": "nightly",
        "columns": {"outputs": "logits"},
        "workspace": scoring.workspace,
    }
    (tmp_path / "score.yaml").write_text(json.dumps(settings))
    variables = {"RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    # What cron gives a job, and the submitter's own copy of the code.
    environment = {"HOME": str(tmp_path), "PATH": f"{BIN}:/usr/bin:/bin", "SHELL": "/bin/sh"}
    environment["PYTHONPATH"] = os.environ["PYTHONPATH"]

    def night() -> tuple[str, str]:
        ended = subprocess.run(["/bin/sh", "-c", command], env=environment, timeout=300, check=False)
        log = (tmp_path / "score.log").read_text()
        assert ended.returncode == 0, log
        return (tmp_path / "score.json").read_text(), log

    report = assert_scored(*night(), scoring)
    assert report["attempt"] == datetime.now(UTC).date().isoformat()
    again = json.loads(night()[0].splitlines()[-1])
    assert (again["submission_id"], again["submitted"]) == (report["submission_id"], False)


def test_plain_ray_submits_the_scripts_as_the_page_says(head: RayHead, scoring: CacheJob) -> None:
    blocks = fenced_blocks(ROOT / "infra" / "README.md", "")["Schedulers"]
    (command,) = (block for block in blocks if block.startswith("ray job submit"))
    for word, here in {
        "http://127.0.0.1:8265": head.address,
        "--config configs/score.cifar.yaml": "--set bundle=photos-daily@champion --set dataset=photos --set name=plain",
        "s3://convoy-example/workspace": scoring.workspace,
    }.items():
        assert word in command
        command = command.replace(word, here)
    finished = subprocess.run(
        ["sh", "-ec", command],
        env={**os.environ, **head.environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    newest = max(list_runs(open_store(scoring.workspace)).runs, key=lambda run: run.run)
    assert (newest.verb, newest.state) == ("score", RunState.FINISHED)
    assert scoring.verify(newest.run)["ok"] is True


def test_a_secret_in_the_settings_is_refused_before_anything_is_sent(head: RayHead, job: CacheJob) -> None:
    key = "AKIA" + "ABCDEFGHIJKLMNOP"
    refused = submitted(head, job.changed(f"dataset={key}"))
    assert refused.returncode == 2
    assert "dataset: has the form of a secret" in refused.stderr
    assert key not in refused.stderr + refused.stdout
    planted = submitted(head, job, *settings_arguments(f"dataset={PLANTED}"))
    assert (planted.returncode, PLANTED in planted.stderr) == (2, False)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and os.access(path, os.R_OK)]


def _api(head: RayHead, path: str) -> Any:
    request = urllib.request.Request(head.address + path, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())
