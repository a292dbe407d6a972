"""`convoy score` on a whole folder of other people's odd files, such as the test images of Pillow's sources."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow.dataset as pads
import pytest

from cache_jobs import CacheJob
from command_lines import convoy_json_here, settings_arguments
from convoy.storage.commits import read_manifest
from convoy.storage.parts import read_rejects
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from made_bundles import made_classifier, write_classifier

pytestmark = [pytest.mark.integration, pytest.mark.slow]

FOLDER = os.environ.get("CONVOY_ODD_FILES")


@pytest.mark.skipif(FOLDER is None, reason="CONVOY_ODD_FILES names no folder, such as Pillow's Tests/images")
def test_every_file_of_a_folder_ends_once_in_results_or_rejects(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    workspace = str(tmp_path / "workspace")
    store = open_store(workspace)
    arguments = settings_arguments("reading={kind: images, labels: none}")
    frozen = convoy_json_here("dataset", str(FOLDER), "--name", "odd", "--workspace", workspace, *arguments)
    write_classifier(store, "one", made_classifier(store, 0))
    settings = ("dataset=odd", "bundle=one", "error_budget.rate=0.99", "extraction={slice_rows: 256}")
    report = CacheJob(workspace, frozen["samples"], settings, verb="score").run_here()

    folder = RunFolder(store, report["run"])
    manifest = read_manifest(folder)
    assert manifest is not None
    scored = pads.dataset(Path(workspace, "runs", report["run"], "predictions"), partitioning="hive")
    results = scored.to_table(columns=["sample_id"])["sample_id"].to_pylist()
    rejects = read_rejects(store, manifest)["sample_id"].to_pylist()
    files = {str(path.relative_to(str(FOLDER))) for path in Path(str(FOLDER)).rglob("*") if path.is_file()}
    assert files - {*results, *rejects} == set(), "neither in results nor in rejects"
    assert len(results) + len(rejects) == len({*results, *rejects}) == frozen["samples"]
    assert report["rejects"] == len(rejects) > 0
    # Each slice was done in one go: no file ended a worker.
    assert len(manifest.slices) == -(-frozen["samples"] // 256)
    assert "ends_workers" not in report["reject_codes"]
