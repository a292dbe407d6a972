"""`convoy cache` and `convoy score` on images as they occur: each ends in results or, with its code, in rejects."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from awkward_images import AwkwardCase, write_awkward_folder
from cache_jobs import LENET, CacheJob, cached_features, freeze
from command_lines import convoy_json_here, last_json
from convoy.core.errors import ExitCode
from convoy.core.records import RejectCode
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store

pytestmark = pytest.mark.integration

UNREADABLE = "unreadable.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("awkward")


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[AwkwardCase]:
    cases = write_awkward_folder(folder / "images")
    unreadable = folder / "images" / UNREADABLE
    unreadable.write_bytes(next(case.data for case in cases if case.name == "rgba.png"))
    unreadable.chmod(0)
    return cases


@pytest.fixture(scope="module")
def job(folder: Path, cases: list[AwkwardCase]) -> CacheJob:
    workspace = str(folder / "workspace")
    num_images = freeze(folder / "images", workspace)["samples"]
    assert num_images == len(cases) + 1
    settings = (f"backbone={LENET}", "backbone.preset.resize_px=32", "taps=[f6]", "dataset=digits")
    return CacheJob(workspace, num_images, (*settings, "extraction={precision: fp32, batch_size: 16}"))


@pytest.fixture(scope="module")
def report(job: CacheJob, ray_cluster: Mapping[str, str]) -> dict[str, Any]:
    return job.run_here()


@pytest.fixture(scope="module")
def rejects(job: CacheJob, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the reject tables of the run, by sample id."""
    store = open_store(job.workspace)
    prefix = RunFolder(store, report["run"]).key("rejects/")
    paths = [store.uri(info.key) for info in store.list_objects(prefix)]
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    assert len({row["sample_id"] for row in rows}) == len(rows)
    return {row["sample_id"]: row for row in rows}


def test_every_file_ends_once_in_results_or_rejects(
    job: CacheJob, report: dict[str, Any], rejects: dict[str, Any]
) -> None:
    results = cached_features(job.workspace, report["sets"]["f6/0"])
    names = {path.name for path in (Path(job.workspace).parent / "images").iterdir()}
    assert results.keys() | rejects.keys() == names
    assert not results.keys() & rejects.keys()
    proof = job.verify()
    assert proof["ok"], proof["problems"]
    assert (proof["inputs"], proof["results"], proof["rejects"]) == (len(names), len(results), len(rejects))


def test_every_reject_has_the_code_of_its_case(
    cases: list[AwkwardCase], report: dict[str, Any], rejects: dict[str, Any]
) -> None:
    found = {name: RejectCode(row["code"]) for name, row in rejects.items() if name != UNREADABLE}
    assert found == {case.name: case.expected for case in cases if case.expected}
    assert all(row["reason"] for row in rejects.values())
    assert report["reject_codes"] == Counter(row["code"] for row in rejects.values())


def test_conversions_are_counted(cases: list[AwkwardCase], report: dict[str, Any]) -> None:
    flags = Counter(flag.value for case in cases for flag in case.flags if case.expected is None)
    # A file of root's that nobody may read is read by root, and has transparent pixels.
    flags["alpha_composed"] += os.geteuid() == 0
    flags["misnamed"] = 1
    assert report["flags"] == flags


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission_is_rejected_as_denied(rejects: dict[str, Any]) -> None:
    row = rejects[UNREADABLE]
    assert (row["code"], row["stage"]) == ("access_denied", "fetch")


def test_rejects_of_the_bytes_are_remembered(job: CacheJob, rejects: dict[str, Any]) -> None:
    plan = convoy_json_here(*job.arguments(), "--dry-run")
    assert plan["missing"] == sum(row["stage"] == "fetch" for row in rejects.values())
    assert all(row["stage"] == "decode" for name, row in rejects.items() if name != UNREADABLE)


def scoring_of(job: CacheJob) -> CacheJob:
    """A scoring of the dataset of another job."""
    backbone = "{arch: lenet5, weights: random, preset: {resize_px: 32, crop_px: 32}}"
    model = f"model={{backbone: {backbone}, classes: [{', '.join('abcdefghij')}]}}"
    settings = ("dataset=digits", model, "extraction={precision: fp32, batch_size: 16}")
    return replace(job, verb="score", settings=settings)


def test_a_scoring_rejects_the_same_files_for_the_same_reasons(
    job: CacheJob, report: dict[str, Any], rejects: dict[str, Any]
) -> None:
    scored = scoring_of(job).run_here()
    assert (scored["inputs"], scored["rejects"]) == (job.num_images, len(rejects))
    assert scored["reject_codes"] == report["reject_codes"]
    assert scored["flags"] == report["flags"]
    proof = job.verify(scored["run"])
    assert proof["ok"], proof["problems"]


def test_a_dataset_of_bad_images_alone_has_a_report_and_exceeds_the_budget(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    images, workspace = tmp_path / "images", str(tmp_path / "workspace")
    images.mkdir()
    for number in range(40):
        (images / f"{number}.jpg").write_bytes(
            b"<html>not an image</html>" if number % 2 else b"\xff\xd8\xff\xe0 cut"
        )
    freeze(images, workspace)
    job = scoring_of(CacheJob(workspace, 40, ())).changed("error_budget={rows: 10}")
    finished = job.start_here()
    assert finished.returncode == ExitCode.ERROR_BUDGET_EXCEEDED, finished.stderr
    scored = last_json(finished)
    assert (scored["inputs"], scored["results"], scored["rejects"]) == (40, 0, 40)
    assert scored["reject_codes"] == {"not_an_image": 20, "truncated": 20}
    assert job.verify(scored["run"])["ok"]
