"""Two drivers of one run, giving a run up while it works, and mending a damaged one, with real jobs on a real Ray."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cache_jobs import CacheJob, made_job
from command_lines import CONVOY, TIMEOUT_S, convoy_here, last_json
from convoy.pipelines.runs_list import list_runs
from convoy.storage.commits import read_manifest
from convoy.storage.runs import RunFolder, run_ids
from convoy.storage.stores import open_store
from hanging_images import HangingImage, wait_until
from made_bundles import made_committee_job

pytestmark = pytest.mark.integration

SLICE_ROWS = 16


def runs(job: CacheJob, *words: str) -> dict[str, Any]:
    finished = convoy_here("runs", *words, "--workspace", job.workspace, "--json")
    assert finished.returncode == 0, finished.stderr
    return last_json(finished)


def newest_run(job: CacheJob) -> str:
    return list_runs(open_store(job.workspace)).runs[0].run


def last_image(folder: Path) -> Path:
    """The image that comes last in the manifest, and so lies in the last slice."""
    return max((folder / "images").rglob("*.jpg"), key=lambda path: str(path.relative_to(folder)))


@contextmanager
def working(job: CacheJob, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A driver that has done most slices, whose worker waits for the image of the last one."""
    command = [str(CONVOY), *job.arguments(), "--json"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **environment},
    ) as driver:
        try:
            wait_until(lambda: only_the_last_are_left(job))
            yield driver
        finally:
            driver.kill()


def only_the_last_are_left(job: CacheJob) -> bool:
    # On a busy machine Ray may hand a worker the last slice before the last but one, which waits behind it then.
    listed = list_runs(open_store(job.workspace)).runs
    return any((run.done or 0) >= job.num_images - 2 * SLICE_ROWS for run in listed)


def test_second_driver_exits_and_names_the_first(tmp_path: Path, ray_cluster: dict[str, str]) -> None:
    job = made_job(tmp_path)
    image = HangingImage(last_image(tmp_path))
    with working(job, ray_cluster) as first:
        second = job.start(ray_cluster)
        assert second.returncode == 1
        assert f"another driver works on this run: process {first.pid} on " in second.stderr

        (listed,) = runs(job, "list")["runs"]
        assert (listed["state"], listed["inputs"]) == ("held", 96)
        assert listed["done"] in (64, 80)
        assert f"process {first.pid} on " in listed["held_by"]
        shown = runs(job, "show", listed["run"])
        assert (shown["slices_done"] in (4, 5), shown["slices"]) == (True, 6)
        assert shown["images_per_s"] > 0

        image.release()
        assert first.wait(TIMEOUT_S) == 0
    assert job.verify()["ok"]
    assert {len(attempts) for attempts in job.attempts().values()} == {1}, "a slice was computed twice"


def test_cancelled_run_stops_and_the_same_command_starts_afresh(
    tmp_path: Path, ray_cluster: dict[str, str]
) -> None:
    job = made_job(tmp_path)
    image = HangingImage(last_image(tmp_path))
    with working(job, ray_cluster) as driver:
        cancelled = newest_run(job)
        report = runs(job, "cancel", cancelled)
        assert report["before"] == "held"
        image.release()
        assert driver.stderr is not None
        said = driver.stderr.read()
        assert driver.wait(TIMEOUT_S) == 6, said
        assert "the run was given up" in said
        assert "Traceback" not in said
    image.restore()

    assert (runs(job, "gc")["garbage"][0]["what"], runs(job, "gc")["changes"]) == (cancelled, "shown")
    report = job.run_here()
    assert report["run"] != cancelled
    assert (report["rows"], report["recomputed"]) == (job.num_images - 1, job.num_images)
    assert runs(job, "gc", "--apply")["garbage"][0]["what"] == cancelled
    assert run_ids(open_store(job.workspace)) == [report["run"]]
    assert job.verify(report["run"])["ok"]


@pytest.mark.parametrize("make", [made_job, made_committee_job])
def test_damaged_part_is_computed_again_and_no_other(
    make: Callable[[Path], CacheJob], tmp_path: Path, ray_cluster: dict[str, str]
) -> None:
    job = make(tmp_path)
    job.run_here()
    store, run = open_store(job.workspace), newest_run(job)
    clean, attempts = job.verify(run), job.attempts()
    manifest = read_manifest(RunFolder(store, run))
    assert manifest is not None
    (damaged, *_) = manifest.slices[2].parts.values()
    data = store.get(damaged.key).data
    store.put(damaged.key, data[: len(data) // 2])
    found = convoy_here("verify", run, "--workspace", job.workspace)
    assert found.returncode == 1

    shown = runs(job, "repair", run)
    assert [one["slice"] for one in shown["damaged"]] == ["0-000002"]
    assert convoy_here("verify", run, "--workspace", job.workspace).stdout == found.stdout, (
        "a dry run changed something"
    )
    runs(job, "repair", run, "--apply")
    (listed,) = runs(job, "list")["runs"]
    assert (listed["state"], listed["done"]) == ("open", job.num_images - SLICE_ROWS)

    job.run_here()
    assert newest_run(job) == run
    again = job.verify(run)
    assert again["ok"], again["problems"]
    assert again["rows_digest"] == clean["rows_digest"]
    redone = [name for name, before in attempts.items() if job.attempts()[name] != before]
    assert redone == ["0-000002"]
