"""`convoy cache` on image files as they occur: every one ends in results or, with its code, in rejects."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from awkward_images import AwkwardCase, write_awkward_folder
from cache_jobs import LENET, CacheJob, cached_features, freeze
from command_lines import convoy_json_here
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
