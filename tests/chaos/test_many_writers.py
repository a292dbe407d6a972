"""Jobs of many writers on a store whose conditional PUT is atomic: one winner, whatever becomes of its answers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from chaos_jobs import SLICE_ROWS, ChaosBucket, ChaosJob, FaultTable, wait_for
from command_lines import last_json
from convoy.storage.leases import read_lease
from convoy.storage.runs import RunFolder
from fault_proxy import (
    CONFLICT,
    PRECONDITION_FAILED,
    Conditions,
    Delay,
    Exchange,
    FaultProxy,
    FaultRule,
    lose_answer,
)

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NUM_SLICES = 6
MANY = "writers=many"
# What is created, or replaced, only if nobody else has done so.
CLAIMS = r"/(open/[^/]+|lease\.json|manifest\.json)$"


def refuse_after_storing(exchange: Exchange) -> None:
    """As a client's own retry sees it whose first try was stored and not answered."""
    exchange.forward()
    PRECONDITION_FAILED(exchange)


SPOILT_CLAIMS = {
    "F17 answers to claims lost": lose_answer,
    "F18 409 to claims": CONFLICT,
    "F18 412 to claims that were stored": refuse_after_storing,
}


@pytest.fixture(scope="module")
def bucket(
    ray_behind_proxy: None, s3_behind_proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory
) -> ChaosBucket:
    folder = tmp_path_factory.mktemp("images")
    return ChaosBucket(s3_behind_proxy, folder, num_images=NUM_SLICES * SLICE_ROWS)


@pytest.fixture(autouse=True)
def honest(s3_behind_proxy: FaultProxy) -> Iterator[None]:
    with s3_behind_proxy.keeping(Conditions.ATOMIC):
        yield


@pytest.fixture(scope="module")
def clean_digest(bucket: ChaosBucket) -> str:
    job = bucket.new_job("score")
    job.run_here()
    return job.audit().digest


@pytest.mark.parametrize("fault", list(SPOILT_CLAIMS))
def test_a_job_rides_over_claims_whose_fate_is_unknown(
    fault: str, bucket: ChaosBucket, clean_digest: str, s3_behind_proxy: FaultProxy, fault_table: FaultTable
) -> None:
    job = bucket.new_job("score").changed(MANY)
    rule = FaultRule(method="PUT", key=CLAIMS, action=SPOILT_CLAIMS[fault], times_a_key=1)
    with s3_behind_proxy.injecting(rule) as (injected,):
        job.run_here()
    assert injected.fired >= 3, "the fault did not fire for each kind of claim"
    assert {len(attempts) for attempts in job.attempts().values()} == {1}
    fault_table.add(
        f"{fault}, score of many writers",
        fired=injected.fired,
        audit=job.audit(),
        clean_digest=clean_digest,
    )


@pytest.mark.slow
def test_a_second_driver_is_refused_and_takes_over_when_the_first_is_dead(
    bucket: ChaosBucket, clean_digest: str, s3_behind_proxy: FaultProxy, fault_table: FaultTable
) -> None:
    job = bucket.new_job("score").changed(MANY, "extraction.num_fetch_threads=2")
    with s3_behind_proxy.injecting(FaultRule(method="GET", key="images/", action=Delay(0.3))):
        first = started(job)
        try:
            wait_for(lambda: job.num_records() >= 2, first)
            refused = job.start_here()
            assert refused.returncode == 1, refused.stderr
            assert "another driver" in refused.stderr
            assert first.poll() is None, "the first one ended before it was killed"
        finally:
            first.kill()
            first.wait()
    before = job.attempts()
    assert 2 <= len(before) < NUM_SLICES
    report = last_json(job.start_here())
    assert (report["results"], report["rejects"]) == (NUM_SLICES * SLICE_ROWS - 1, 1)
    assert {name: job.attempts()[name] & before[name] for name in before} == before
    lease = read_lease(RunFolder(job.store, job.run_id))
    assert lease is not None
    assert lease.token == 2
    fault_table.add(
        "F12 a second driver, the first one killed, score",
        fired=1,
        audit=job.audit(),
        clean_digest=clean_digest,
    )


def started(job: ChaosJob) -> subprocess.Popen[str]:
    """The command in a process of its own, with a Ray of its own."""
    environment = {**os.environ, **job.environment}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        job.command(), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
