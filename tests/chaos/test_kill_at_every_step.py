"""SIGKILL at every named step of the commit; then the same command, and nothing is lost, doubled or redone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from cache_jobs import CacheJob, made_job
from chaos_jobs import FaultTable, audit_run
from convoy.core.crash_points import CrashPoint
from crash_point_sets import (
    FIT_CRASH_POINTS,
    RETRAIN_CRASH_POINTS,
    SEARCH_CRASH_POINTS,
    TRAINING_CRASH_POINTS,
)
from made_bundles import made_committee_job

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

# The driver dies at its own steps; a worker that dies at one of these is replaced within the same command.
WORKER_STEPS = {CrashPoint.PART_WRITTEN, CrashPoint.REJECTS_WRITTEN, CrashPoint.RECORD_WRITTEN}
# Kill in the middle, after some slices are done, where a step comes once a slice or a set.
ARRIVAL = {
    CrashPoint.PART_WRITTEN: 4,
    CrashPoint.RECORD_WRITTEN: 2,
    CrashPoint.SLICE_COLLECTED: 3,
    CrashPoint.SET_COMMITTED: 1,
}


@pytest.fixture(scope="module")
def fresh_job(tmp_path_factory: pytest.TempPathFactory) -> CacheJob:
    """A job that has not begun."""
    return made_job(tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def clean_digest(
    fresh_job: CacheJob, tmp_path_factory: pytest.TempPathFactory, ray_cluster: dict[str, str]
) -> str:
    """The rows of the job where nothing kills it."""
    return digest_of_clean_run(fresh_job, tmp_path_factory.mktemp("clean"))


def digest_of_clean_run(fresh: CacheJob, folder: Path) -> str:
    job = fresh.copied_to(folder)
    job.run_here()
    return str(job.verify()["rows_digest"])


# How often a job of six slices of two parts comes by, where that is more than once.
ARRIVALS = {
    CrashPoint.PART_WRITTEN: 12,
    CrashPoint.RECORD_WRITTEN: 6,
    CrashPoint.SLICE_COLLECTED: 6,
    CrashPoint.SET_COMMITTED: 2,
}


def of_seed(job: CacheJob, point: CrashPoint, seed: int) -> tuple[CacheJob, int]:
    """The job in other slices and with other workers, and at which arrival it dies; seed 0 dies in the middle."""
    if seed == 0:
        return job, ARRIVAL.get(point, 1)
    slice_rows = 16 * (1 + seed % 3)
    nth = 1 + Random(f"{point}-{seed}").randrange(ARRIVALS.get(point, 1))
    if point is not CrashPoint.SET_COMMITTED:
        nth = -(-nth * 16 // slice_rows)
    workers = f"extraction.num_workers={1 + seed % 2}"
    return job.changed(f"extraction.slice_rows={slice_rows}", workers), nth


# Of the steps of any run those at which a committee's differs from that of features: what its workers write, and
# how its finished run is found again.
COMMITTEE_STEPS = [
    CrashPoint.REJECTS_WRITTEN,
    CrashPoint.RECORD_WRITTEN,
    CrashPoint.MANIFEST_PUBLISHED,
    CrashPoint.SUCCESS_WRITTEN,
]


def points_and_seeds() -> list[object]:
    """In the short form every step kills one verb, and no job in other slices."""
    points = set(CrashPoint).difference(
        FIT_CRASH_POINTS, TRAINING_CRASH_POINTS, SEARCH_CRASH_POINTS, RETRAIN_CRASH_POINTS
    )
    return [
        pytest.param(point, seed, marks=pytest.mark.slow if seed or point in COMMITTEE_STEPS else ())
        for point in sorted(points)
        for seed in range(5)
    ]


@pytest.mark.parametrize(("point", "seed"), points_and_seeds())
def test_killed_job_resumes_to_the_same_rows(
    point: CrashPoint,
    seed: int,
    fresh_job: CacheJob,
    clean_digest: str,
    tmp_path: Path,
    fault_table: FaultTable,
) -> None:
    job, nth = of_seed(fresh_job.copied_to(tmp_path), point, seed)
    counter = tmp_path / "arrivals"
    environment = {"CONVOY_CRASH_POINT": f"{point}:{nth}:{counter}"}

    killed = job.start(environment)
    assert counter.stat().st_size >= nth, "the fault did not fire"
    if point in WORKER_STEPS:
        assert killed.returncode == 0, killed.stderr
    else:
        assert killed.returncode == -9, killed.stderr
    attempts_before = job.attempts()

    report = job.run_here()
    assert (report["samples"], report["rows"], report["rejects"]) == (job.num_images, job.num_images - 1, 1)
    proof = job.verify()
    assert proof["ok"], proof["problems"]
    assert proof["inputs"] == job.num_images
    assert proof["rows_digest"] == clean_digest
    for slice_name, attempts in attempts_before.items():
        assert job.attempts()[slice_name] == attempts, f"finished slice {slice_name} was computed again"
    fault_table.add(
        f"F2 killed at {point} ({nth}), cache",
        fired=1,
        audit=audit_run(job.workspace, report["run"]),
        clean_digest=clean_digest,
    )


@pytest.fixture(scope="module", params=["evaluate", pytest.param("score", marks=pytest.mark.slow)])
def fresh_committee(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CacheJob:
    """An evaluation that has not begun, or a scoring, whose rows lie in a partition for each label."""
    job = made_committee_job(tmp_path_factory.mktemp("fresh_committee"))
    return job if request.param == "evaluate" else replace(job.changed("partition_by=label"), verb="score")


@pytest.fixture(scope="module")
def clean_committee_digest(
    fresh_committee: CacheJob, tmp_path_factory: pytest.TempPathFactory, ray_cluster: dict[str, str]
) -> str:
    """The rows of the job where nothing kills it."""
    return digest_of_clean_run(fresh_committee, tmp_path_factory.mktemp("clean_committee"))


@pytest.mark.parametrize("point", COMMITTEE_STEPS)
def test_killed_job_of_a_committee_resumes_to_the_same_rows(
    point: CrashPoint,
    fresh_committee: CacheJob,
    clean_committee_digest: str,
    tmp_path: Path,
    fault_table: FaultTable,
) -> None:
    job = fresh_committee.copied_to(tmp_path)
    counter = tmp_path / "arrivals"
    nth = ARRIVAL.get(point, 1)

    killed = job.start({"CONVOY_CRASH_POINT": f"{point}:{nth}:{counter}"})
    assert counter.stat().st_size >= nth, "the fault did not fire"
    assert killed.returncode == (0 if point in WORKER_STEPS else -9), killed.stderr

    report = job.run_here()
    num_inputs = report["samples" if job.verb == "evaluate" else "inputs"]
    assert (num_inputs, report["results"], report["rejects"]) == (96, 95, 1)
    # The proof of the workspace's only run: a second one would have computed everything again.
    proof = job.verify()
    assert proof["ok"], proof["problems"]
    fault_table.add(
        f"F2 killed at {point}, {job.verb}",
        fired=1,
        audit=audit_run(job.workspace, proof["run"]),
        clean_digest=clean_committee_digest,
    )
