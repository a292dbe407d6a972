"""What `convoy submit` makes of its words."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from convoy.cli import submit
from convoy.pipelines.submit import JobRequest, SubmitReport


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[JobRequest]:
    """What a cluster is asked for."""
    asked: list[JobRequest] = []

    def run(address: str, request: JobRequest, **_: Any) -> SubmitReport:
        asked.append(request)
        return SubmitReport(
            submission_id="one", status="SUCCEEDED", exit_code=0, address=address, submitted=True
        )

    monkeypatch.setattr(submit, "run_submit", run)
    return asked


@pytest.mark.parametrize(
    ("words", "wanted"),
    [([], (None, None)), (["--gpus", "4"], (None, 4)), (["--cpus", "64", "--gpus", "0"], (64, 0))],
)
def test_machines_are_asked_for_by_their_number(
    requests: list[JobRequest], words: list[str], wanted: tuple[int | None, int | None]
) -> None:
    submit.submit_app(["score", "--address", "http://head:8265", *words], standalone_mode=False)
    (request,) = requests
    assert (request.cpus, request.gpus) == wanted


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["retrain"], None),
        (["retrain", "--attempt", "night-17"], "night-17"),
        (["score"], "1"),
    ],
)
def test_a_retraining_is_one_of_its_day_unless_an_attempt_is_named(
    requests: list[JobRequest], words: list[str], wanted: str | None
) -> None:
    before = datetime.now(UTC).date()
    submit.submit_app([*words, "--address", "http://head:8265"], standalone_mode=False)
    (request,) = requests
    # Midnight may come in between.
    days = {before.isoformat(), datetime.now(UTC).date().isoformat()}
    assert request.attempt in (days if wanted is None else {wanted})
