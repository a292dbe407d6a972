"""Jobs that need features, also while another run of the same sets is unfinished, without Ray."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from torch import Tensor

from cache_jobs import write_digits
from convoy.core.errors import RunMismatch
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.pipelines.dataset import DatasetConfig, freeze
from convoy.pipelines.feature_plan import ExtractionConfig, FeatureRequest, PrecisionChoice
from convoy.pipelines.feature_summary import FeatureSummary
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.predictions import PredictionJob
from convoy.pipelines.runs_gc import collect_garbage
from convoy.pipelines.runs_repair import repair_run
from convoy.pipelines.runs_state import Changes
from convoy.pipelines.verify import verify_run
from convoy.storage.commits import RunManifest, read_manifest
from convoy.storage.datasets import open_dataset
from convoy.storage.leases import WhenHeld, hold_run
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import OpenRun, RunFolder, open_pointers
from convoy.vision.engine import FeatureEngine
from convoy.vision.engine_options import Precision
from convoy.vision.head_config import HeadKind
from features_here import compute_features_here
from made_bundles import FP32, made_classifier
from made_devices import made_device

NUM_IMAGES = 8
PATIENCE_S = 20
FEATURES = "convoy.pipelines.features"
IN_SLICES = FP32.model_copy(update={"slice_rows": 2})


class CutOff(Exception):
    """The driver dies while it computes."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_digits(tmp_path / "images", NUM_IMAGES)
    return tmp_path / "images"


@pytest.fixture
def store(images: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """A workspace with a dataset of digits, whose slices are computed by this process."""
    store = LocalStore(str(images.parent / "workspace"))
    compute_features_here(monkeypatch)
    refresh(store, images)
    return store


def refresh(store: LocalStore, images: Path) -> None:
    freeze(DatasetConfig(workspace=store.root_uri, name="digits", source=str(images)))


def job(
    store: LocalStore,
    *,
    rows: pa.Table | None = None,
    splits: tuple[Split, ...] | None = None,
    extraction: ExtractionConfig = FP32,
) -> FeatureJob:
    """Features of the dataset's current version, or of some splits or rows of it; always the same set."""
    backbone = made_classifier(store, 0).backbone
    request = FeatureRequest(dataset="digits", splits=splits, backbone=backbone.config, taps=("f6",))
    return FeatureJob(store, open_dataset(store, "digits"), backbone, request, extraction, rows=rows)


def ensure(job: FeatureJob, **options: Any) -> FeatureSummary:
    return job.ensure(progress=Silent(), **options)


def cut_off(job: FeatureJob, **options: Any) -> None:
    """A call that is killed while it computes."""

    def die(*_: Any, **__: Any) -> Any:
        raise CutOff

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(f"{FEATURES}.do_slices", die)
        with pytest.raises(CutOff):
            ensure(job, **options)


def some_rows(store: LocalStore) -> pa.Table:
    return open_dataset(store, "digits").read_table().slice(0, 3)


def test_every_call_says_why_images_have_no_features(store: LocalStore, images: Path) -> None:
    def reject_codes() -> dict[str, int]:
        refresh(store, images)
        summary = ensure(job(store))
        assert summary.rejects == sum(summary.reject_codes.values())
        return summary.reject_codes

    (images / "0/first.jpg").write_bytes(b"no image at all")
    assert reject_codes() == {"not_an_image": 1}
    assert reject_codes() == {"not_an_image": 1}
    (images / "0/second.jpg").write_bytes(b"no image either")
    (images / "0/third.jpg").write_bytes(b"")
    assert reject_codes() == {"not_an_image": 2, "empty": 1}
    (images / "0/first.jpg").unlink()
    assert reject_codes() == {"not_an_image": 1, "empty": 1}


@pytest.mark.parametrize(
    ("precision", "value"), [(PrecisionChoice.FP32, 70_000.0), (PrecisionChoice.BF16, float("nan"))]
)
def test_an_image_whose_features_cannot_be_stored_is_remembered_as_a_reject(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, precision: PrecisionChoice, value: float
) -> None:
    extraction = ExtractionConfig(precision=precision)
    run = FeatureEngine.run

    def run_with_a_hole(engine: FeatureEngine, images_BCHW: Tensor) -> dict[str, Tensor]:
        features = run(engine, images_BCHW)
        features["f6"][1, 0] = value
        return features

    with monkeypatch.context() as patched:
        patched.setattr(FeatureEngine, "run", run_with_a_hole)
        summary = ensure(job(store, extraction=extraction))
    assert (summary.rows, summary.reject_codes) == (NUM_IMAGES - 1, {"not_finite": 1})
    again = ensure(job(store, extraction=extraction))
    assert (again.rows, again.reject_codes) == (NUM_IMAGES - 1, {"not_finite": 1})


def test_who_needs_features_leaves_an_unfinished_run_of_another_version_alone(
    store: LocalStore, images: Path
) -> None:
    cut_off(job(store), when_held=WhenHeld.REFUSE)
    (begun,) = open_pointers(store)
    write_digits(images, 2, start=NUM_IMAGES)
    refresh(store, images)
    assert ensure(job(store)).rows == NUM_IMAGES + 2
    assert list(open_pointers(store)) == [begun]


def test_predictions_in_many_looks_into_the_features_are_those_of_one(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = job(store)
    ensure(needed)
    manifest = open_dataset(store, "digits")
    classifier = made_classifier(store, 0, classes=manifest.classes, head=HeadKind.SOFTMAX)

    def predicted(*, new_run: bool) -> RunManifest:
        set_id = needed.set_id("f6")
        predictions = PredictionJob(store, manifest, classifier, model_digest="made", set_id=set_id)
        return predictions.commit("digits", list(Split), {}, new_run=new_run)[1]

    at_once = predicted(new_run=False)
    monkeypatch.setattr("convoy.pipelines.predictions._SLICES_A_PASS", 1)
    slice_by_slice = predicted(new_run=True)
    assert len(slice_by_slice.slices) > 1
    assert slice_by_slice.num_results == NUM_IMAGES
    assert slice_by_slice.rows_digest() == at_once.rows_digest()


def test_who_needs_a_few_rows_is_not_kept_by_a_run_of_all(store: LocalStore) -> None:
    cut_off(job(store))
    assert ensure(job(store, rows=some_rows(store))).rows == 3


def test_who_needs_all_rows_is_not_kept_by_a_run_of_a_few(store: LocalStore) -> None:
    cut_off(job(store, rows=some_rows(store)))
    assert ensure(job(store)).rows == NUM_IMAGES


def test_a_killed_call_beside_an_unfinished_run_finds_its_own_again(store: LocalStore) -> None:
    cut_off(job(store), when_held=WhenHeld.REFUSE)
    (begun,) = open_pointers(store)
    needed = job(store, rows=some_rows(store))
    cut_off(needed)
    (own,) = open_pointers(store).keys() - {begun}
    # Also when the other one has ended.
    assert ensure(job(store), when_held=WhenHeld.REFUSE).run == begun
    assert ensure(needed).run == own
    assert open_pointers(store) == {}


def test_who_needs_features_goes_on_with_the_same_run_of_another_command(store: LocalStore) -> None:
    cut_off(job(store), when_held=WhenHeld.REFUSE)
    (begun,) = open_pointers(store)
    assert ensure(job(store)).run == begun


def test_a_dry_run_names_the_unfinished_run_and_not_one_that_only_did_not_close_its_pointer(
    store: LocalStore,
) -> None:
    cut_off(job(store), when_held=WhenHeld.REFUSE)
    (begun,) = open_pointers(store)
    plan = job(store).plan()
    assert (plan.missing, plan.unfinished_run) == (NUM_IMAGES, begun)
    with pytest.MonkeyPatch.context() as killed:
        killed.setattr(OpenRun, "close", lambda *_: None)
        ensure(job(store), when_held=WhenHeld.REFUSE)
    assert list(open_pointers(store)) == [begun]
    plan = job(store).plan()
    assert (plan.missing, plan.unfinished_run) == (0, None)


def test_a_new_run_leaves_that_of_other_inputs_where_it_is(store: LocalStore) -> None:
    cut_off(job(store), when_held=WhenHeld.REFUSE)
    (begun,) = open_pointers(store)
    assert ensure(job(store, rows=some_rows(store)), new_run=True).run != begun
    assert list(open_pointers(store)) == [begun]


def test_the_command_for_features_refuses_an_unfinished_run_of_other_inputs(store: LocalStore) -> None:
    cut_off(job(store))
    with pytest.raises(RunMismatch, match="rows"):
        ensure(job(store, rows=some_rows(store)), when_held=WhenHeld.REFUSE)


def test_an_unfinished_run_of_other_rows_is_ended_on_its_own_input(store: LocalStore, images: Path) -> None:
    former = job(store, rows=some_rows(store))
    cut_off(former)
    (begun,) = open_pointers(store)
    write_digits(images, 2, start=NUM_IMAGES)
    refresh(store, images)
    wanted = job(store)
    assert wanted.end_run_of_other_rows(Silent()) == begun
    assert open_pointers(store) == {}
    assert verify_run(store, begun).ok
    rest = ensure(wanted, when_held=WhenHeld.REFUSE)
    assert (rest.recomputed, rest.rows) == (NUM_IMAGES + 2 - 3, NUM_IMAGES + 2)
    assert wanted.end_run_of_other_rows(Silent()) is None


def test_an_unfinished_run_of_the_same_rows_is_left_to_go_on_with(store: LocalStore) -> None:
    cut_off(job(store))
    (begun,) = open_pointers(store)
    assert job(store).end_run_of_other_rows(Silent()) is None
    assert list(open_pointers(store)) == [begun]
    assert ensure(job(store), when_held=WhenHeld.REFUSE).run == begun


def damaged_run(store: LocalStore, needed: FeatureJob) -> RunFolder:
    """The finished run of a job, whose first slice has lost its part."""
    folder = RunFolder(store, str(ensure(needed).run))
    manifest = read_manifest(folder)
    assert manifest is not None
    store.delete(part.key for part in manifest.slices[0].parts.values())
    return folder


@pytest.mark.parametrize("is_of_rows", [True, False])
def test_a_repaired_run_of_some_rows_bars_no_command_and_the_next_one_computes_them(
    store: LocalStore, is_of_rows: bool
) -> None:
    """Such as an evaluation begins of the test split, or an advice of a sample."""
    part = {"rows": some_rows(store)} if is_of_rows else {"splits": (Split.TRAIN,)}
    needed = job(store, extraction=IN_SLICES, **part)
    damaged = damaged_run(store, needed)
    for _ in range(2):
        repaired = repair_run(store, damaged.run_id, Changes.MADE)
        assert repaired.left_to_do.endswith("its new run computes the missing rows")
        assert open_pointers(store) == {}
    again = ensure(needed)
    assert (again.recomputed, again.run == damaged.run_id) == (2, False)
    assert ensure(job(store), when_held=WhenHeld.REFUSE).rows == NUM_IMAGES


def test_a_run_of_all_rows_is_ended_after_its_repair_by_whoever_needs_them(store: LocalStore) -> None:
    damaged = damaged_run(store, job(store, extraction=IN_SLICES))
    repaired = repair_run(store, damaged.run_id, Changes.MADE)
    assert repaired.left_to_do.endswith(f"then convoy verify {damaged.run_id}")
    assert ensure(job(store), when_held=WhenHeld.REFUSE).run == damaged.run_id
    assert verify_run(store, damaged.run_id).ok


def test_a_repaired_run_whose_dataset_was_refreshed_bars_no_command(store: LocalStore, images: Path) -> None:
    damaged = damaged_run(store, job(store, extraction=IN_SLICES))
    write_digits(images, 2, start=NUM_IMAGES)
    refresh(store, images)

    for _ in range(2):
        repaired = repair_run(store, damaged.run_id, Changes.MADE)
        assert repaired.left_to_do.endswith("its new run computes the missing rows")
    assert open_pointers(store) == {}
    again = ensure(job(store), when_held=WhenHeld.REFUSE)
    assert (again.rows, again.recomputed, again.run == damaged.run_id) == (NUM_IMAGES + 2, 2 + 2, False)
    # Its sound rows are still needed.
    assert collect_garbage(store, Changes.MADE, older_than_days=0).garbage == []
    assert ensure(job(store)).recomputed == 0


def test_who_waited_for_a_run_that_turns_out_to_be_of_other_inputs_computes_beside_it(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    cut_off(job(store))
    (begun,) = open_pointers(store)
    folder = RunFolder(store, begun)
    record = folder.record()
    assert record is not None
    # As a driver leaves it that has opened its run and not written what it is about.
    store.delete([folder.key("run.json")])
    found: list[FeatureSummary] = []
    second = threading.Thread(target=lambda: found.append(ensure(job(store, rows=some_rows(store)))))
    with hold_run(folder, ttl_s=1.5):
        second.start()
        deadline_s = time.monotonic() + PATIENCE_S
        while f"run {begun} is held by" not in caplog.text:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        RunFolder(store, begun, open_key=record.open_key).write_record(record)
    second.join()
    assert [(summary.rows, summary.run == begun) for summary in found] == [(3, False)]
    assert list(open_pointers(store)) == [begun]


def test_features_of_a_cluster_are_of_its_workers_precision_and_done_ones_ask_nobody(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head without a GPU drives, and has no say in it."""
    answers = [made_device(Precision.BF16)]
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("convoy.pipelines.device_settings.find_device", answers.pop)
    summaries = [ensure(job(store, extraction=ExtractionConfig())) for _ in range(2)]
    assert [one.precision for one in summaries] == ["bf16", "bf16"]
    assert [one.recomputed for one in summaries] == [NUM_IMAGES, 0]
    for summary in summaries:
        assert "precision bf16: NVIDIA H100 computes bf16 natively" in summary.notes
    assert not answers


@pytest.mark.parametrize("told", [None, 3])
def test_the_batch_of_a_run_is_the_told_one_or_that_of_the_clusters_workers(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, told: int | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("convoy.pipelines.device_settings.find_device", made_device)
    run = ensure(job(store, extraction=FP32.model_copy(update={"batch_size": told}))).run
    record = RunFolder(store, str(run)).record()
    assert record is not None
    assert record.settings["batch_size"] == (told or made_device().batch_size(28))
