"""`convoy cache` on a real Ray: what is computed, what is not, and what it says of it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cache_jobs import CacheJob, cached_features, freeze, made_job, write_digits
from command_lines import convoy_here, last_json
from convoy.core.config import load_config
from convoy.core.records import Split
from convoy.pipelines.cache import CacheConfig, CachePlan, plan_cache
from convoy.storage.commits import feature_prefix, read_commits
from convoy.storage.datasets import open_dataset
from convoy.storage.feature_cache import FeatureSetSpec
from convoy.storage.runs import RunFolder, open_pointers, run_ids
from convoy.storage.stores import open_store
from convoy.vision.engine_options import Precision, device_here

pytestmark = pytest.mark.integration

JOBS = Path(__file__).parents[2] / "jobs"
# Splits are drawn by name: all of these are in train, but for the one whose name says it.
IN_TRAIN, COPY_IN_TEST = "3/00003.jpg", "3/copy_14.jpg"
FOUR, FOUR_AMONG_FIVES = "4/00004.jpg", "5/copy_0.jpg"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base") / "images"


@pytest.fixture(scope="module")
def base(images: Path) -> CacheJob:
    """96 digits, one of them damaged, whose taps c3 and f6 were cached by one worker in a Ray of its own."""
    job = made_job(images.parent)
    report = job.run()
    assert (report["recomputed"], report["rows"], report["rejects"]) == (96, 95, 1)
    return job


@pytest.fixture
def job(base: CacheJob, tmp_path: Path) -> CacheJob:
    return base.copied_to(tmp_path)


@pytest.fixture(scope="module")
def grown(
    base: CacheJob, images: Path, ray_cluster: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The report after three more images: a copy in another split, a copy of another class, and a new one."""
    job = base.copied_to(tmp_path_factory.mktemp("grown"))
    shutil.copy(images / IN_TRAIN, images / COPY_IN_TEST)
    shutil.copy(images / FOUR, images / FOUR_AMONG_FIVES)
    write_digits(images, 1, start=200)
    changes = freeze(images, job.workspace)
    assert (changes["added"], changes["changed"], changes["removed"]) == (3, 0, 0)
    return job.run_here()


def files(job: CacheJob, set_id: str) -> dict[str, str]:
    """The etags of all files of a feature set, by key."""
    return {info.key: info.etag for info in open_store(job.workspace).list_objects(f"features/{set_id}/")}


def planned(job: CacheJob, *settings: str) -> CachePlan:
    """What `convoy cache --dry-run` says, without the start of a process."""
    overrides = [*job.settings, f"workspace={job.workspace}", *settings]
    return plan_cache(load_config(CacheConfig, None, overrides))


def test_the_second_run_computes_nothing(job: CacheJob) -> None:
    (run,) = run_ids(open_store(job.workspace))
    report = job.run_here()
    assert (report["recomputed"], report["samples"], report["rows"], report["rejects"]) == (0, 96, 95, 1)
    assert (report["run"], report["notes"]) == (run, ["nothing was missing"])
    assert run_ids(open_store(job.workspace)) == [run]


def test_new_images_cost_only_themselves(grown: dict[str, Any]) -> None:
    assert (grown["recomputed"], grown["samples"], grown["rows"], grown["rejects"]) == (3, 99, 98, 1)


def test_copies_across_splits_and_classes_are_reported(grown: dict[str, Any]) -> None:
    found = grown["duplicates"]
    assert (found["groups"], found["samples"]) == (2, 4)
    assert (found["across_splits"], found["label_conflicts"]) == (1, 1)
    assert found["examples"] == [[FOUR, FOUR_AMONG_FIVES], [IN_TRAIN, COPY_IN_TEST]]


def test_one_more_tap_computes_only_that_tap(job: CacheJob, ray_cluster: Mapping[str, str]) -> None:
    before = job.run_here()["sets"]
    old_files = {set_id: files(job, set_id) for set_id in before.values()}
    report = job.changed("taps=[c3, f6, c1]").run_here()
    assert report["recomputed"] == 96
    assert {set_id: files(job, set_id) for set_id in before.values()} == old_files
    assert {name: report["sets"][name] for name in before} == before
    features = cached_features(job.workspace, report["sets"]["c1/0"])
    assert (len(features), features["0/00000.jpg"].shape) == (95, (6,))
    assert job.verify(report["run"])["ok"]
    assert job.changed("taps=[c3, f6, c1]").run()["run"] == report["run"]


def test_one_more_view_computes_only_that_view(job: CacheJob, ray_cluster: Mapping[str, str]) -> None:
    before = job.run_here()["sets"]
    old_files = {set_id: files(job, set_id) for set_id in before.values()}
    report = job.changed("views=2", "augmentation.seed=1").run_here()
    assert report["recomputed"] == 96
    assert {set_id: files(job, set_id) for set_id in before.values()} == old_files
    assert {name: report["sets"][name] for name in before} == before
    plain = cached_features(job.workspace, report["sets"]["f6/0"])
    drawn = cached_features(job.workspace, report["sets"]["f6/1"])
    assert plain.keys() == drawn.keys()
    # A drawn crop may by chance be the whole image, but rarely.
    assert sum(np.array_equal(plain[sample_id], drawn[sample_id]) for sample_id in plain) < 10
    assert job.verify(report["run"])["ok"]


def test_views_in_other_light_measure_the_colours_of_the_train_split_once(
    base: CacheJob, tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    job = base.copied_to(tmp_path).changed("taps=[f6]", "views=2", "augmentation.pca_colour={strength: 0.5}")
    note = "the colours of the train split will be measured first, for pca_colour"
    plan = planned(job)
    assert plan.missing_by_set == {"f6/0": 0, "f6/1": 96}
    assert note in plan.notes
    report = job.run_here()
    assert report["recomputed"] == 96
    store = open_store(job.workspace)
    (key,) = [info.key for info in store.list_objects("datasets/digits/") if "pixel_statistics" in info.key]
    statistics = json.loads(store.get(key).data)
    train = open_dataset(store, "digits").counts[Split.TRAIN].num_samples
    measured = statistics["measured"]
    assert measured["num_images"] + sum(measured["rejects"].values()) == train
    # Grey images differ along grey only.
    assert statistics["basis"]["eigenvectors"][0] == pytest.approx([3**-0.5] * 3, abs=1e-6)
    assert statistics["basis"]["eigenvalues"][1:] == [0, 0]
    again = job.run_here()
    assert (again["recomputed"], again["sets"]) == (0, report["sets"])
    assert planned(job).missing == 0
    assert note not in planned(job).notes
    spec = json.loads(store.get(f"features/{report['sets']['f6/1']}/spec.json").data)
    assert spec["view_recipe"]["policy"]["pca_colour"]["basis"] == statistics["basis"]


@pytest.mark.parametrize(
    "setting",
    [
        "splits=[train]",
        "augmentation.mirror.probability=0",
        "error_budget.rows=0",
        "extraction.batch_size=8",
        "extraction.slice_rows=5",
        "extraction.num_workers=2",
        "extraction.num_fetch_threads=1",
    ],
)
def test_settings_that_leave_features_alone_cost_nothing(base: CacheJob, setting: str) -> None:
    assert planned(base, setting).missing == 0


@pytest.mark.parametrize(
    "setting",
    [
        "extraction.decode.min_side_px=3",
        "extraction.decode.background_rgb=[0, 0, 0]",
        "extraction.precision=bf16",
        "extraction.dtype=float32",
        "backbone.preset.mean=[0.5, 0.5, 0.5]",
        "backbone.preset.std=[0.5, 0.5, 0.5]",
        "backbone.preset.interpolation=bicubic",
        "backbone.seed=1",
    ],
)
def test_settings_that_change_features_compute_all_anew(job: CacheJob, setting: str) -> None:
    plan = planned(job, setting)
    assert plan.missing_by_set == {"c3/0": 96, "f6/0": 96}


def test_dry_run_shows_the_work_and_does_none(job: CacheJob) -> None:
    written = {info.key for info in open_store(job.workspace).list_objects()}
    finished = convoy_here(*job.changed("taps=[c3, c1]").arguments(), "--dry-run", "--json")
    plan = last_json(finished)
    assert (plan["samples"], plan["missing_by_set"]) == (96, {"c3/0": 0, "c1/0": 96})
    assert plan["config"]["taps"] == ["c3", "c1"]
    assert {info.key for info in open_store(job.workspace).list_objects()} == written


@pytest.fixture
def versions(
    job: CacheJob, images: Path, tmp_path: Path, ray_cluster: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The version of the dataset of which a run was killed before its first slice, and the one that replaced it."""
    write_digits(images, 2, start=300)
    frozen = freeze(images, job.workspace)
    killed = job.start({"CONVOY_CRASH_POINT": f"run_recorded:1:{tmp_path / 'arrivals'}"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    write_digits(images, 1, start=302)
    return frozen, freeze(images, job.workspace)


def test_an_unfinished_run_of_a_former_version_is_ended_before_the_rest_is_computed(
    job: CacheJob, versions: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    frozen, refrozen = versions
    report = job.run_here()
    (note,) = (note for note in report["notes"] if "was ended first" in note)
    ended = note.split()[1].rstrip(",")
    store = open_store(job.workspace)
    former = RunFolder(store, ended).record()
    assert former is not None
    assert former.identity["dataset_fingerprint"] == frozen["fingerprint"]
    assert former.num_inputs == frozen["added"]
    assert report["recomputed"] == refrozen["added"]
    assert report["rows"] == refrozen["samples"] - 1
    assert open_pointers(store) == {}
    for run in (ended, report["run"]):
        assert job.verify(run)["ok"]


def test_a_new_run_leaves_an_unfinished_one_of_a_former_version_behind(
    job: CacheJob, versions: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    frozen, refrozen = versions
    afresh = convoy_here(*job.arguments(), "--new-run", "--json")
    assert afresh.returncode == 0, afresh.stderr
    report = last_json(afresh)
    assert report["recomputed"] == frozen["added"] + refrozen["added"]
    assert report["rows"] == refrozen["samples"] - 1
    assert job.verify(report["run"])["ok"]


def test_exceeded_error_budget_exits_with_3_and_keeps_the_results(job: CacheJob) -> None:
    strict = job.changed("error_budget={rows: 0, rate: 0}").start_here()
    assert strict.returncode == 3
    report = last_json(strict)
    assert (report["within_error_budget"], report["rows"], report["rejects"]) == (False, 95, 1)
    assert "the results are kept" in strict.stderr
    assert job.run_here()["within_error_budget"]


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("extraction.batchsize=8", "extraction.batchsize: unknown key; did you mean 'batch_size'?"),
        ("tap=[f6]", "tap: unknown key; did you mean 'taps'?"),
        ("extraction.batch_size=0", "extraction.batch_size: Input should be greater than 0"),
        ("backbone.arch=lenet", "choose one of lenet5"),
    ],
)
def test_unusable_settings_exit_with_2_and_a_hint(base: CacheJob, setting: str, hint: str) -> None:
    finished = base.changed(setting).start_here()
    assert (finished.returncode, finished.stdout) == (2, "")
    assert hint in finished.stderr
    assert "Traceback" not in finished.stderr


def test_script_and_command_are_the_same_call(job: CacheJob) -> None:
    by_command = job.run()
    command = [sys.executable, str(JOBS / "cache.py"), *job.arguments()[1:], "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    times = {"job_s": 0.0}
    assert {**last_json(finished), **times} == {**by_command, **times}


def test_rows_do_not_depend_on_workers_slices_or_the_cluster(
    base: CacheJob, tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    other = made_job(tmp_path).changed("extraction.num_workers=2", "extraction.slice_rows=25")
    assert other.run_here()["rows"] == 95
    assert len(other.attempts()) == 4
    assert len(base.attempts()) == 6
    assert other.verify()["rows_digest"] == base.verify()["rows_digest"]


@pytest.mark.skipif(device_here().precision is Precision.FP32, reason="this machine has no native bf16")
def test_bf16_run_records_how_close_it_is_to_fp32(job: CacheJob, ray_cluster: Mapping[str, str]) -> None:
    exact = job.run_here()["sets"]
    report = job.changed("extraction.precision=auto").run_here()
    assert (report["precision"], report["recomputed"]) == ("bf16", 96)
    effect = report["precision_effect"]
    assert effect.keys() == {"c3", "f6"}
    assert all(0.99 < cosine <= 1.0001 for cosine in effect.values())
    reduced = cached_features(job.workspace, report["sets"]["f6/0"])
    full = cached_features(job.workspace, exact["f6/0"])
    assert not all(np.array_equal(reduced[sample_id], full[sample_id]) for sample_id in full)
    assert max(float(np.abs(reduced[sample_id] - full[sample_id]).max()) for sample_id in full) < 0.1


def test_every_set_lists_its_run_and_its_parts(base: CacheJob) -> None:
    store = open_store(base.workspace)
    for set_id in base.run()["sets"].values():
        (commit,) = read_commits(store, set_id)
        assert len(commit.parts) == 6
        assert all(part.key.startswith(feature_prefix(set_id, commit.run_id)) for part in commit.parts)
        assert {part.key for part in commit.parts} <= files(base, set_id).keys()


def test_a_file_of_features_says_by_itself_what_its_rows_are(base: CacheJob) -> None:
    store = open_store(base.workspace)
    for set_id in base.run()["sets"].values():
        (commit,) = read_commits(store, set_id)
        told = pq.read_schema(store.uri(commit.parts[0].key)).metadata
        assert FeatureSetSpec.model_validate_json(told[b"convoy.spec"]).set_id == set_id
        assert told[b"convoy.run_id"] == commit.run_id.encode()
