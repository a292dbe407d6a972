from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from convoy.cluster import submission
from convoy.cluster.submission import JobService, runtime_environment
from convoy.core.errors import ClusterError, ConfigError, ExitCode, RunCancelled


class Dashboard(http.server.ThreadingHTTPServer):
    """A server that speaks as much of Ray's Jobs API as a client needs to wait: its answers, one a question.

    `tails` are what a job has printed whenever its log is asked for, and whether that ends as it should or breaks off.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answering)
        self.answers: list[dict[str, Any] | None] = []
        self.tails: list[tuple[str, bool]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answering(http.server.BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        if self.path.endswith("/logs/tail"):
            self._tail(*self.server.tails.pop(0))
            return
        version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
        answer = version if self.path == "/api/version" else self.server.answers.pop(0)
        self.send_response(200 if answer else 503)
        self.end_headers()
        self.wfile.write(json.dumps(answer or "away").encode())

    def _tail(self, text: str, is_whole: bool) -> None:
        """One message of a WebSocket (RFC 6455), and its end."""
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        upgrade = "Upgrade: websocket\r\nConnection: Upgrade"
        head = f"HTTP/1.1 101 Switching Protocols\r\n{upgrade}\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
        self.wfile.write(head.encode() + bytes((0x81, len(text))) + text.encode())
        if is_whole:
            self.wfile.write(bytes((0x88, 2)) + (1000).to_bytes(2, "big"))

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setattr(submission, "_POLL_S", 0.01)
    # An address in the environment must not win against the one that is named.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with Dashboard() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def told(status: str, exit_code: int | None = None) -> dict[str, Any]:
    return {
        "type": "SUBMISSION",
        "submission_id": "one",
        "status": status,
        "entrypoint": "python",
        "metadata": {"verb": "cache"},
        "driver_exit_code": exit_code,
    }


@pytest.mark.parametrize(
    ("status", "of_driver", "exit_code"),
    [
        ("SUCCEEDED", 0, ExitCode.OK),
        ("FAILED", 3, ExitCode.ERROR_BUDGET_EXCEEDED),
        ("FAILED", 5, ExitCode.REFUSED_BY_GATE),
        ("FAILED", -9, ExitCode.ERROR),
        ("FAILED", None, ExitCode.ERROR),
        ("STOPPED", None, ExitCode.STOPPED_RESUMABLE),
        ("RUNNING", None, None),
        ("PENDING", None, None),
    ],
)
def test_an_ended_job_has_the_exit_code_of_its_driver_or_one_that_says_the_same(
    dashboard: Dashboard, status: str, of_driver: int | None, exit_code: int | None
) -> None:
    dashboard.answers = [told(status, of_driver)]
    job = JobService(dashboard.address).get("one")
    assert (job.exit_code, job.ended) == (exit_code, exit_code is not None)


@pytest.mark.parametrize(
    ("status", "of_driver", "expected"),
    [
        ("FAILED", ExitCode.ERROR, True),
        ("FAILED", ExitCode.STOPPED_RESUMABLE, True),
        ("FAILED", -9, True),
        ("FAILED", ExitCode.REFUSED_BY_GATE, False),
        ("FAILED", RunCancelled.exit_code, False),
        ("STOPPED", None, False),
    ],
)
def test_no_other_try_is_for_what_would_end_the_same_or_was_stopped_by_a_person(
    dashboard: Dashboard, status: str, of_driver: int | None, expected: bool
) -> None:
    dashboard.answers = [told(status, of_driver)]
    assert JobService(dashboard.address).get("one").may_be_tried_again is expected


@pytest.mark.parametrize(
    ("status", "of_driver", "told_by_ray", "message"),
    [
        ("FAILED", None, "supervisor failed\nto start in 900 s.", "supervisor failed to start in 900 s."),
        ("FAILED", 1, "exit code 1, last available logs (truncated):\nall of it", "exit code 1"),
        ("FAILED", -9, "", "the driver was ended by signal 9 (Killed); often there was no memory left"),
        ("FAILED", -15, "", "the driver was ended by signal 15 (Terminated)"),
        ("FAILED", None, f"pip{'.' * 10_000}no space", f"pip{'.' * 297} … {'.' * 292}no space"),
        ("STOPPED", None, "Job was intentionally stopped.", "Job was intentionally stopped."),
        ("SUCCEEDED", 0, "Job finished successfully.", ""),
        ("RUNNING", None, "Job is currently running.", ""),
    ],
)
def test_why_a_job_ended_without_success_is_told_without_its_log(
    dashboard: Dashboard, status: str, of_driver: int | None, told_by_ray: str, message: str
) -> None:
    dashboard.answers = [{**told(status, of_driver), "message": told_by_ray}]
    assert JobService(dashboard.address).get("one").message == message


def test_waiting_outlasts_a_dashboard_that_is_away_for_a_moment(dashboard: Dashboard) -> None:
    dashboard.answers = [told("RUNNING"), None, None, told("RUNNING"), None, told("SUCCEEDED", 0)]
    assert JobService(dashboard.address).wait("one").exit_code == 0
    assert dashboard.answers == []


def test_waiting_ends_when_the_dashboard_stays_away(dashboard: Dashboard) -> None:
    dashboard.answers = [None] * submission._POLL_FAILURES
    with pytest.raises(ClusterError, match="refused the request"):
        JobService(dashboard.address).wait("one")
    assert dashboard.answers == []


RUNNING, SUCCEEDED = told("RUNNING"), told("SUCCEEDED", 0)
BROKEN, WHOLE = False, True
LOG = "reading 11 images\ndone\n"


@pytest.mark.parametrize(
    ("tails", "answers"),
    [
        # A proxy that breaks it again and again, of a job that prints and of one that does not.
        ([(LOG[: 2 * n], BROKEN) for n in range(8)] + [(LOG, WHOLE)], [RUNNING] * 8 + [SUCCEEDED]),
        ([("", BROKEN)] * 8 + [(LOG, WHOLE)], [RUNNING] * 8 + [SUCCEEDED]),
        # One that ends it in good order, and a dashboard that is away.
        ([(LOG[:5], WHOLE), (LOG, WHOLE)], [RUNNING, SUCCEEDED]),
        ([(LOG[:5], WHOLE), (LOG, WHOLE)], [None, None, RUNNING, SUCCEEDED]),
        # The job ends meanwhile.
        ([(LOG[:5], BROKEN), (LOG, WHOLE)], [SUCCEEDED, SUCCEEDED]),
    ],
)
def test_a_log_is_followed_to_the_end_of_its_job(
    dashboard: Dashboard, tails: list[tuple[str, bool]], answers: list[dict[str, Any] | None]
) -> None:
    dashboard.tails, dashboard.answers = tails[:], answers[:]
    written: list[str] = []
    JobService(dashboard.address).follow_logs("one", written.append)
    assert "".join(written) == LOG
    assert dashboard.tails == dashboard.answers == []


def test_a_log_of_an_ended_job_that_breaks_off_is_not_asked_for_for_ever(dashboard: Dashboard) -> None:
    dashboard.tails = [(LOG[:5], BROKEN)] * (1 + submission._TAIL_ATTEMPTS)
    dashboard.answers = [SUCCEEDED] * (1 + submission._TAIL_ATTEMPTS)
    written: list[str] = []
    JobService(dashboard.address).follow_logs("one", written.append)
    assert "".join(written) == LOG[:5]
    assert dashboard.tails == dashboard.answers == []


def test_an_address_where_nobody_answers_is_told_within_seconds() -> None:
    started_s = time.monotonic()
    with pytest.raises(ClusterError, match="no dashboard of Ray answers"):
        JobService("http://127.0.0.1:1")
    assert time.monotonic() - started_s < 20


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "ray://127.0.0.1:10001", "auto"])
def test_addresses_of_other_kinds_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="address of a dashboard"):
        JobService(address)


def test_the_runtime_environment_has_no_variables_but_those_of_the_submission(tmp_path: Any) -> None:
    environment = runtime_environment(str(tmp_path), tmp_path, {"CONVOY_CLUSTER_GPUS": "4"})
    assert set(environment) == {"working_dir", "py_modules", "excludes", "env_vars"}
    assert environment["env_vars"] == {"CONVOY_CLUSTER_GPUS": "4"}
