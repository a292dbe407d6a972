"""Workers and nodes die under a job, again and again: only the slices that they had are done again."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from chaos_jobs import SLICE_ROWS, ChaosBucket, ChaosJob, FaultTable, WorkerKiller
from command_lines import last_json
from convoy.storage.datasets import open_dataset
from fault_proxy import Delay, FaultProxy, FaultRule, Hang

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

# Images come so late that a slice takes most of a second.
SLOW_IMAGES = FaultRule(method="GET", key="images/", action=Delay(0.15))
FEW_THREADS = "extraction.num_fetch_threads=4"


@pytest.fixture(scope="module")
def bucket(
    ray_behind_proxy: None, s3_behind_proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory
) -> ChaosBucket:
    return ChaosBucket(s3_behind_proxy, tmp_path_factory.mktemp("images"), num_images=24 * SLICE_ROWS)


@pytest.fixture(scope="module")
def clean_digest(bucket: ChaosBucket) -> str:
    job = bucket.new_job("score")
    job.run_here()
    return job.audit().digest


@pytest.fixture
def job(bucket: ChaosBucket, s3_behind_proxy: FaultProxy) -> Iterator[ChaosJob]:
    job = bucket.new_job("score").changed(FEW_THREADS)
    with s3_behind_proxy.injecting(SLOW_IMAGES):
        yield job


@pytest.mark.parametrize("num_kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_workers_that_are_killed_cost_only_the_slices_they_had(
    num_kills: int, job: ChaosJob, clean_digest: str, fault_table: FaultTable
) -> None:
    # Some slices are finished between two kills.
    with WorkerKiller(lambda kills: kills < num_kills and job.num_records() >= 1 + 1.5 * kills) as killer:
        job.run_here()
    assert killer.kills == num_kills
    # A kill may come between the record of a slice and the news of it: then the slice has two.
    assert sum(map(len, job.attempts().values())) <= 24 + num_kills
    fault_table.add(
        f"F1 workers killed ({num_kills}), score",
        fired=killer.kills,
        audit=job.audit(),
        clean_digest=clean_digest,
    )


@pytest.mark.slow
def test_an_image_that_ends_every_worker_becomes_a_reject(
    bucket: ChaosBucket, s3_behind_proxy: FaultProxy, fault_table: FaultTable
) -> None:
    """What the kernel does to a worker in which a decoder takes all memory: the same image would do it for ever."""
    job = bucket.new_job("score")
    deadly = image_of(job, "0-000005", 3)
    # While it is waited for its slice has a worker, which is then killed.
    waiting = FaultRule(method="GET", key=deadly, action=Hang(60))
    with (
        s3_behind_proxy.injecting(waiting) as (injected,),
        WorkerKiller(lambda kills: injected.fired > kills) as killer,
    ):
        finished = job.start_here()
    assert finished.returncode == 0, finished.stderr
    # Two with the slice, and two with nothing but the image.
    assert killer.kills == 4
    assert last_json(finished)["reject_codes"] == {"ends_workers": 1, "truncated": 1}
    fault_table.add(
        "F5 one image ends every worker, score", fired=killer.kills, audit=job.audit(), clean_digest=None
    )


@pytest.mark.slow
def test_a_slice_that_ends_every_worker_ends_the_job_by_its_name(
    bucket: ChaosBucket, s3_behind_proxy: FaultProxy, clean_digest: str, fault_table: FaultTable
) -> None:
    """What the kernel does to a worker whose network takes all memory: no image of the slice is to blame."""
    job = bucket.new_job("score")
    deadly = "0-000005"
    # While its part is written the slice has a worker, which is then killed.
    waiting = FaultRule(method="PUT", key=f"{deadly}-[^/]*parquet$", action=Hang(60))
    with (
        s3_behind_proxy.injecting(waiting) as (injected,),
        WorkerKiller(lambda kills: injected.fired > kills) as killer,
    ):
        finished = job.start_here()
    assert finished.returncode == 1, finished.stderr
    assert f"one slice ended 5 workers, one after another [slice {deadly}]" in finished.stderr
    assert killer.kills == 6
    before = job.attempts()
    assert len(before) >= 5
    assert deadly not in before
    job.run_here()
    assert {name: job.attempts()[name] for name in before} == before
    fault_table.add(
        "F5 one slice ends every worker, score",
        fired=killer.kills,
        audit=job.audit(),
        clean_digest=clean_digest,
    )


def image_of(job: ChaosJob, slice_name: str, number: int) -> str:
    """A pattern for the key of an image of a slice: samples are frozen in the order of the manifest."""
    table = open_dataset(job.store, "digits").read_table(["uri"])
    row = int(slice_name.split("-")[1]) * SLICE_ROWS + number
    return re.escape(table["uri"][row].as_py().removeprefix("s3://")) + "$"
