"""Scorings and evaluations of committees that are asked for again, without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import quote

import pytest

from cache_jobs import write_digits
from convoy.cluster.scoring import Scorer
from convoy.cluster.scoring_spec import ScoringSpec
from convoy.cluster.slices import PlannedWork, SliceTask, WorkerPool
from convoy.core.crop_policies import CropPolicy
from convoy.core.errors import ConfigError, ConvoyError, DataError, RunMismatch, StoreUnavailable
from convoy.core.fingerprints import canonical_json
from convoy.core.progress import Silent
from convoy.pipelines import committee_predictions
from convoy.pipelines.comparison import CompareConfig, compare_bundles
from convoy.pipelines.dataset import DatasetConfig, freeze
from convoy.pipelines.evaluate import EvaluateConfig, open_evaluation, run_evaluate
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.forecast import Forecast, extrapolate
from convoy.pipelines.model_registry import promote_model
from convoy.pipelines.runs_gc import collect_garbage
from convoy.pipelines.runs_list import list_runs
from convoy.pipelines.runs_repair import repair_run
from convoy.pipelines.runs_state import Changes
from convoy.pipelines.score import FORECASTS, ScoreConfig, plan_score, run_score
from convoy.pipelines.verify import verify_run
from convoy.storage.commits import SliceRecord, read_manifest
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import WriterMode
from convoy.storage.predictions import PREDICTIONS
from convoy.storage.runs import SUBMISSION_VARIABLE, OpenRun, RunFolder, RunRecord, open_pointers, run_ids
from convoy.vision.engine_options import Precision
from convoy.vision.head_config import HeadKind
from made_bundles import made_classifier, write_classifier
from made_devices import made_device
from made_sources import shard_bytes, write_files

NUM_IMAGES = 12
EXTRACTION = ExtractionConfig(batch_size=4)
PETS = {
    "backbone": {"arch": "lenet5", "weights": "random", "num_classes": 2},
    "classes": ["cat", "dog"],
}
ONE_WORKER = WorkerPool(num_workers=1, num_cpus=1, num_gpus=0, num_threads=1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Digits beside their workspace, which has two models; one of them is no image."""
    write_digits(tmp_path / "images", NUM_IMAGES)
    (tmp_path / "images" / "0" / "damaged.png").write_bytes(b"not much of an image")
    return tmp_path / "images"


@pytest.fixture
def store(images: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    store = LocalStore(str(images.parent / "workspace"))
    freeze(DatasetConfig(workspace=store.root_uri, name="digits", source=str(images)))
    for seed, name in enumerate(("one", "two")):
        write_classifier(store, name, made_classifier(store, seed))

    def do_slices(_: RunFolder, record: RunRecord, run: Any, **_options: Any) -> list[SliceRecord]:
        tasks = [SliceTask(slice=name, outputs=record.outputs_of(name)) for name in record.slice_names()]
        return list(run(tasks, ONE_WORKER))

    def score_slices(spec: ScoringSpec, tasks: Sequence[SliceTask], _: WorkerPool) -> Iterator[SliceRecord]:
        return map(Scorer(spec), tasks)

    monkeypatch.setattr("convoy.pipelines.committee_predictions.do_slices", do_slices)
    monkeypatch.setattr("convoy.pipelines.committee_predictions.score_slices", score_slices)
    monkeypatch.setattr("convoy.pipelines.forecast_sampling.ray_session", nullcontext)
    monkeypatch.setattr("convoy.pipelines.forecast_sampling.plan_pool", lambda *_: ONE_WORKER)
    return store


@contextmanager
def cut_off(*, after: int = 0) -> Iterator[None]:
    """The job within dies after so many slices."""

    def die(_: RunFolder, record: RunRecord, run: Any, **__: Any) -> Any:
        names = list(record.slice_names())[:after]
        list(run([SliceTask(slice=name, outputs=record.outputs_of(name)) for name in names], ONE_WORKER))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("convoy.pipelines.committee_predictions.do_slices", die)
        with pytest.raises(KeyboardInterrupt):
            yield


def score(store: LocalStore, *, new_run: bool = False) -> Any:
    config = ScoreConfig(workspace=store.root_uri, dataset="digits", bundle="one", extraction=EXTRACTION)
    return run_score(config, progress=Silent(), new_run=new_run)


def evaluate(store: LocalStore, *, new_run: bool = False) -> Any:
    config = EvaluateConfig.model_validate(
        {
            "workspace": store.root_uri,
            "dataset": "digits",
            "splits": ["train"],
            "ensemble": {"members": [{"bundle": "one"}, {"bundle": "two"}]},
            "extraction": EXTRACTION,
        }
    )
    return run_evaluate(config, progress=Silent(), new_run=new_run)


@pytest.mark.parametrize("settings", [{}, {"crops": "flip"}])
def test_both_models_of_a_comparison_are_checked_before_either_is_measured(
    store: LocalStore, settings: dict[str, Any]
) -> None:
    other = write_classifier(store, "other", made_classifier(store, 2, classes=("cat", "dog")))
    config = CompareConfig.model_validate(
        {
            "workspace": store.root_uri,
            "dataset": "digits",
            "splits": ["train"],
            "bundles": ["one", "other"],
            **settings,
        }
    )
    progress = Mock(Silent)
    with pytest.raises(
        ConfigError, match=f"the bundle {other} does not know 10 classes of the dataset: 0, 1"
    ):
        compare_bundles(config, progress=progress)
    assert (run_ids(store), open_pointers(store)) == ([], {})
    progress.stage.assert_not_called()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            {"bundle": "other"},
            "the bundle other does .* dataset with its class names, or a model that was trained",
        ),
        ({"model": PETS}, "lenet5 does .* give its outputs those of the dataset: model.classes names all"),
        (
            {"ensemble": {"members": [PETS, PETS]}},
            "the ensemble does .*: of a member, classes names all in order",
        ),
        (
            {"ensemble": {"members": [PETS, {"bundle": "other"}]}},
            "the ensemble does .* or a model that was trained",
        ),
    ],
)
def test_who_evaluates_a_model_of_other_classes_is_told_what_can_be_done_of_it(
    store: LocalStore, model: dict[str, Any], said: str
) -> None:
    write_classifier(store, "other", made_classifier(store, 2, classes=("cat", "dog")))
    settings = {"workspace": store.root_uri, "dataset": "digits", "splits": ["train"]}
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        open_evaluation(EvaluateConfig.model_validate({**settings, **model}))


@pytest.mark.parametrize("job", [score, evaluate])
def test_images_that_could_not_be_fetched_are_counted_and_the_report_says_how_to_try_them_again(
    store: LocalStore, images: Path, job: Any
) -> None:
    away = images / "1" / "away"
    image = next(path for path in sorted((images / "1").iterdir()))
    image.rename(away)
    first = job(store)
    away.rename(image)
    again = job(store)
    for report in (first, again):
        assert (report.run, report.rejects, report.unfetched) == (first.run, 2, 1)
        assert "1 gone" in report.notes[-1]
        assert f"repair {first.run} --retry-unfetched" in report.notes[-1]
    assert repair_run(store, first.run, Changes.MADE, retry_unfetched=True).retried_images == 1
    mended = job(store)
    assert (mended.run, mended.rejects, mended.unfetched) == (first.run, 1, 0)
    assert not any("--retry-unfetched" in note for note in mended.notes)
    assert job(store, new_run=True).run != first.run


def test_images_that_were_replaced_are_not_tried_again_as_each_try_wants_the_frozen_ones(
    store: LocalStore, images: Path
) -> None:
    first, second, *_ = sorted((images / "1").iterdir())
    first.write_bytes(second.read_bytes())
    report = score(store)
    assert report.reject_codes == {"changed": 1, "not_an_image": 1}
    assert report.unfetched == 0
    assert "1 images were replaced since the dataset was frozen" in report.notes[-1]
    assert repair_run(store, report.run, Changes.SHOWN, retry_unfetched=True).retried_images == 0


def test_no_probabilities_are_made_of_the_margins_of_a_linear_svm(store: LocalStore) -> None:
    write_classifier(store, "svm", made_classifier(store, 0, head=HeadKind.LINEAR_SVM))
    settings = {"workspace": store.root_uri, "dataset": "digits", "bundle": "svm", "extraction": EXTRACTION}
    config = ScoreConfig.model_validate({**settings, "columns": {"outputs": "probabilities"}})
    with pytest.raises(ConfigError, match="margins"):
        run_score(config, progress=Silent())
    config = ScoreConfig.model_validate({**settings, "columns": {"outputs": "logits"}})
    assert run_score(config, progress=Silent()).results == NUM_IMAGES


def test_what_a_bundle_keeps_and_what_a_mode_leaves_out_is_said(store: LocalStore) -> None:
    settings = {"workspace": store.root_uri, "dataset": "digits", "bundle": "one"}
    given = {"decode": {"max_pixels": 10**8}, "precision": "bf16", "batch_size": 4}
    config = ScoreConfig.model_validate({**settings, "extraction": given})
    kept = "without effect on bundles, which keep their own: extraction.decode, extraction.precision"
    assert kept in run_score(config, progress=Silent()).notes
    assert not any("without effect" in note for note in score(store).notes)
    with pytest.raises(ValueError, match="mode dense looks at the whole central square"):
        ScoreConfig.model_validate({**settings, "mode": "dense", "crops": "ten"})


def test_a_run_costs_by_the_prices_of_its_forecast_unless_it_is_given_others(store: LocalStore) -> None:
    settings = {"workspace": store.root_uri, "dataset": "digits", "bundle": "one", "extraction": EXTRACTION}
    priced = ScoreConfig.model_validate({**settings, "prices": {"per_gb_written": 5.0}})
    assert plan_score(priced, progress=Silent()).cost.total > 0
    report = run_score(ScoreConfig.model_validate(settings), progress=Silent())
    assert report.actual.cost.total == pytest.approx(report.actual.bytes_written / 10**9 * 5.0)
    free = ScoreConfig.model_validate({**settings, "prices": {}})
    assert run_score(free, progress=Silent()).actual.cost.total == 0


def test_the_report_of_an_evaluation_says_which_rows_its_models_learnt_from(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def overlap_notes(*arguments: Any) -> list[str]:
        asked.extend(arguments[2:4])
        return ["one of them learnt from these rows"]

    monkeypatch.setattr("convoy.pipelines.evaluate.overlap_notes", overlap_notes)
    assert evaluate(store).notes == ["one of them learnt from these rows"]
    assert asked == ["digits", ("train",)]


@pytest.mark.parametrize("job", [score, evaluate])
def test_a_new_run_that_was_cut_off_is_gone_on_with_by_the_plain_command(store: LocalStore, job: Any) -> None:
    first = job(store)
    with cut_off():
        job(store, new_run=True)
    (begun,) = open_pointers(store)
    again = job(store)
    assert again.run == begun != first.run
    assert open_pointers(store) == {}
    assert job(store).run == begun


@pytest.mark.parametrize("job", [score, evaluate])
def test_a_try_begins_anew_unless_one_before_it_did(
    store: LocalStore, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = job(store)
    monkeypatch.setenv(SUBMISSION_VARIABLE, "convoy-score-1")
    with monkeypatch.context() as patched:
        patched.setattr(OpenRun, "start", Mock(side_effect=StoreUnavailable("the store kept failing")))
        with pytest.raises(StoreUnavailable):
            job(store, new_run=True)
    with cut_off():
        job(store, new_run=True)
    (begun,) = open_pointers(store)
    assert job(store, new_run=True).run == begun != first.run
    assert job(store, new_run=True).run == begun
    monkeypatch.setenv(SUBMISSION_VARIABLE, "convoy-score-2")
    assert job(store, new_run=True).run not in {first.run, begun}


def promote(store: LocalStore, digest: str) -> None:
    promote_model(store.root_uri, "one", digest=digest, reason="better", writers=WriterMode.MANY)


def from_source(images: Path, store: LocalStore, **changes: Any) -> ScoreConfig:
    settings = {"workspace": store.root_uri, "name": "new", "source": str(images), "bundle": "one"}
    return ScoreConfig.model_validate({**settings, "extraction": EXTRACTION, **changes})


@pytest.fixture
def begun(images: Path, store: LocalStore) -> str:
    """A scoring of a source that was cut off, and whose source has two more images since."""

    with cut_off():
        run_score(from_source(images, store), progress=Silent())
    write_digits(images, 2, start=NUM_IMAGES)
    (run,) = open_pointers(store)
    return run


def test_a_cut_off_scoring_of_a_source_is_ended_before_newer_images_are_taken(
    images: Path, store: LocalStore, begun: str
) -> None:
    config = from_source(images, store)
    first = run_score(config, progress=Silent())
    assert (first.run, first.inputs) == (begun, NUM_IMAGES + 1)
    assert f"with version {first.fingerprint} of new" in first.notes[0]
    second = run_score(config, progress=Silent())
    assert (second.run != begun, second.inputs) == (True, NUM_IMAGES + 3)
    assert not any("an unfinished run goes on" in note for note in second.notes)


@pytest.mark.parametrize("is_refreshed", [True, False])
def test_a_cut_off_scoring_of_a_dataset_is_ended_though_the_dataset_was_refreshed(
    images: Path, store: LocalStore, begun: str, is_refreshed: bool
) -> None:
    assert run_score(from_source(images, store), progress=Silent()).run == begun
    config = ScoreConfig.model_validate(
        {"workspace": store.root_uri, "dataset": "new", "bundle": "one", "extraction": EXTRACTION}
    )
    with cut_off():
        run_score(config, progress=Silent(), new_run=True)
    (begun_again,) = open_pointers(store)
    if is_refreshed:
        freeze(DatasetConfig(workspace=store.root_uri, name="new", source=str(images)), progress=Silent())
    report = run_score(config, progress=Silent())
    assert (report.run, report.inputs) == (begun_again, NUM_IMAGES + 1)
    assert any("an unfinished run goes on" in note for note in report.notes) is is_refreshed


@pytest.mark.parametrize("job", [run_score, plan_score])
def test_a_scoring_of_no_image_is_an_error_that_names_the_splits_with_some(
    images: Path, store: LocalStore, job: Any
) -> None:
    config = from_source(images, store, reading={"labels": "none"}, splits=["train", "val"])
    with pytest.raises(DataError, match="no image") as refused:
        job(config, progress=Silent())
    assert refused.value.next_step.endswith(": test")
    assert (run_ids(store), open_pointers(store)) == ([], {})


@pytest.mark.parametrize("job", [run_score, plan_score])
def test_a_scoring_by_label_refuses_a_class_whose_folder_no_disk_could_hold(
    images: Path, store: LocalStore, job: Any
) -> None:
    (images / "0").rename(images / ("x" * 250))
    assert job(from_source(images, store), progress=Silent()).notes
    kept = run_ids(store)
    with pytest.raises(ConfigError, match="255 bytes"):
        job(from_source(images, store, partition_by="label"), progress=Silent())
    assert (run_ids(store), open_pointers(store)) == (kept, {})


def test_a_cut_off_scoring_by_label_is_ended_under_the_folder_names_that_it_began_with(
    images: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "0").rename(images / "Käfer")
    config = from_source(images, store, partition_by="label")
    with cut_off(), monkeypatch.context() as earlier:
        earlier.setattr("convoy.storage.scores._label_folder", lambda label: f"label_name={quote(label)}")
        run_score(config, progress=Silent())
    report = run_score(config, progress=Silent())
    folders = store.list_folders(f"runs/{report.run}/predictions/")
    assert [name for name in folders if "K" in name] == ["label_name=K%C3%A4fer"]
    assert verify_run(store, report.run).ok


@pytest.mark.parametrize("job", [run_score, plan_score])
def test_files_beside_class_folders_are_not_left_out_of_a_scoring_unasked(
    images: Path, store: LocalStore, job: Any
) -> None:
    write_files(images, "beside.jpg")
    with pytest.raises(DataError, match=r"left out: 1 \(beside.jpg\)") as refused:
        job(from_source(images, store), progress=Silent())
    assert "reading.labels=none" in refused.value.next_step
    everything = run_score(from_source(images, store, reading={"labels": "none"}), progress=Silent())
    assert everything.inputs == NUM_IMAGES + 2


def test_a_scoring_says_what_of_its_source_was_left_out_also_when_it_goes_on(
    images: Path, store: LocalStore
) -> None:
    shards = images.parent / "shards"
    shards.mkdir()
    (shards / "0.tar").write_bytes(shard_bytes({str(key): "0" for key in range(4)})[:-15_000])
    write_files(shards, ".hidden/1.tar")
    config = from_source(shards, store)
    with cut_off():
        run_score(config, progress=Silent())
    for call in (run_score, run_score, plan_score):
        report = call(config, progress=Silent())
        assert "1 objects skipped as hidden" in report.notes
        assert any("0.tar is cut off" in note for note in report.notes)


def test_a_damaged_scoring_is_repaired_though_its_dataset_was_refreshed(
    images: Path, store: LocalStore
) -> None:
    first = score(store)
    manifest = read_manifest(RunFolder(store, first.run))
    assert manifest is not None
    store.delete([manifest.slices[0].parts[PREDICTIONS].key])
    write_digits(images, 2, start=NUM_IMAGES)
    freeze(DatasetConfig(workspace=store.root_uri, name="digits", source=str(images)))
    repaired = repair_run(store, first.run, Changes.MADE)
    assert "run the same convoy score command again" in repaired.left_to_do
    again = score(store)
    assert (again.run, again.inputs, again.results) == (first.run, first.inputs, first.results)
    assert "an unfinished run goes on" in again.notes[0]
    assert verify_run(store, first.run).ok


ENSEMBLE = {"members": [{"bundle": "one@champion"}, {"bundle": "two"}]}


@pytest.mark.parametrize("model", [{"bundle": "one@champion"}, {"bundle": None, "ensemble": ENSEMBLE}])
def test_a_cut_off_scoring_is_ended_with_the_champion_that_it_began_with(
    images: Path, store: LocalStore, model: dict[str, Any]
) -> None:
    former, latter = (write_classifier(store, "one", made_classifier(store, seed)) for seed in (0, 7))
    config = from_source(images, store, **model)
    promote(store, former.digest)
    with cut_off():
        run_score(config, progress=Silent())
    (begun,) = open_pointers(store)
    promote(store, latter.digest)
    note = f"with {former} for one@champion; once it has ended, the same command takes {latter}"
    assert any(note in one for one in plan_score(config, progress=Silent()).notes)
    with pytest.raises(RunMismatch, match=r"crops\.policy"):
        run_score(config.model_copy(update={"crops": CropPolicy.FLIP}), progress=Silent())
    first = run_score(config, progress=Silent())
    assert first.run == begun
    assert any(note in one for one in first.notes)
    second = run_score(config, progress=Silent())
    assert (second.run != begun, second.model_digest != first.model_digest) == (True, True)
    assert not any("an unfinished run goes on" in one for one in second.notes)


def test_a_cut_off_scoring_is_not_ended_with_another_model_that_is_asked_for(
    images: Path, store: LocalStore, begun: str
) -> None:
    barred = "'new' has other inputs or settings: the scoring itself needs another --name"
    told = plan_score(from_source(images, store, bundle="two"), progress=Silent()).notes
    assert any(barred in note for note in told)
    assert not any(barred in note for note in plan_score(from_source(images, store), progress=Silent()).notes)
    with pytest.raises(RunMismatch, match="committee") as caught:
        run_score(from_source(images, store, bundle="two"), progress=Silent())
    assert "(--name) to leave that run alone" in caught.value.next_step
    anew = run_score(from_source(images, store, bundle="two"), progress=Silent(), new_run=True)
    assert anew.run != begun


def test_a_dry_run_does_not_keep_a_cut_off_scoring_from_going_on(
    images: Path, store: LocalStore, begun: str
) -> None:
    config = from_source(images, store)
    forecast = plan_score(config, progress=Silent())
    assert forecast.images == NUM_IMAGES + 1
    assert "an unfinished run goes on" in forecast.notes[0]
    assert run_score(config, progress=Silent()).run == begun


def forecast_files(store: LocalStore) -> list[bytes]:
    return [store.get(info.key).data for info in store.list_objects(FORECASTS)]


@pytest.mark.parametrize(("done", "left"), [(1, 9), (3, 1)])
def test_a_dry_run_forecasts_what_is_left_of_a_scoring_that_was_cut_off(
    images: Path, store: LocalStore, done: int, left: int
) -> None:
    settings = ExtractionConfig(batch_size=2, slice_rows=4)
    config = from_source(images, store, extraction=settings, prices={"per_gb_read": 10**9})
    whole = plan_score(config, progress=Silent())
    assert (whole.images, whole.get_requests) == (NUM_IMAGES + 1, 0), "images and workspace are local"
    kept = forecast_files(store)
    with cut_off(after=done):
        run_score(config, progress=Silent())
    (begun,) = open_pointers(store)
    # A run keeps its settings.
    changed = config.model_copy(update={"extraction": ExtractionConfig(batch_size=4, slice_rows=8)})
    forecast = plan_score(changed, progress=Silent())
    assert forecast.images == left
    assert forecast.cost.read == pytest.approx(forecast.bytes_read)
    assert 0 < forecast.bytes_read < whole.bytes_read
    note = f"{done} of 4 slices of run {begun} are done: the forecast is of what is left"
    assert note in forecast.notes
    assert forecast_files(store) == kept, "the next run would be compared with a part of it"
    assert plan_score(config, progress=Silent(), new_run=True).images == NUM_IMAGES + 1
    assert run_score(config, progress=Silent()).run == begun


def test_a_split_that_is_named_twice_is_counted_once(images: Path, store: LocalStore) -> None:
    once, twice = (from_source(images, store, splits=splits) for splits in (["train"], ["train", "train"]))
    forecast = plan_score(twice, progress=Silent())
    report = run_score(twice, progress=Silent())
    assert forecast.images == report.inputs > 0
    assert run_score(once, progress=Silent()).run == report.run


def test_a_dry_run_of_a_scoring_of_which_nothing_is_left_says_so_at_once(
    images: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_source(images, store)
    with cut_off(after=NUM_IMAGES):
        run_score(config, progress=Silent())
    (begun,) = open_pointers(store)
    with monkeypatch.context() as patched:
        patched.setattr("convoy.pipelines.score.forecast_scoring", Mock(side_effect=AssertionError))
        uncommitted = plan_score(config, progress=Silent())
        assert run_score(config, progress=Silent()).run == begun
        finished = plan_score(config, progress=Silent())
    for forecast in (uncommitted, finished):
        assert (forecast.images, forecast.hours, forecast.put_requests) == (0, 0, 0)
    assert f"all slices of run {begun} are done, and the same command commits them" in uncommitted.notes[-1]
    assert f"every row was scored already, by run {begun}; --new-run" in finished.notes[-1]
    assert plan_score(config, progress=Silent(), new_run=True).images == NUM_IMAGES + 1
    write_digits(images, 2, start=NUM_IMAGES)
    assert plan_score(config, progress=Silent()).images == NUM_IMAGES + 3


@pytest.mark.parametrize(("num_workers", "counted"), [(3, 3), (60, 4)])
def test_a_forecast_is_of_the_workers_that_the_cluster_has_and_the_run_has_slices_for(
    images: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch, num_workers: int, counted: int
) -> None:
    told: dict[str, Any] = {}
    asked: list[PlannedWork] = []

    def plan_pool(*arguments: Any) -> WorkerPool:
        asked.append(arguments[2])
        return ONE_WORKER.model_copy(update={"num_workers": num_workers})

    def extrapolated(sample: Sequence[SliceRecord], **options: Any) -> Forecast:
        told.update(options, sampled_slices=len(sample))
        return extrapolate(sample, **options)

    computed: list[PlannedWork] = []
    do_slices = committee_predictions.do_slices

    def compute(*arguments: Any, work: PlannedWork, **options: Any) -> list[SliceRecord]:
        computed.append(work)
        return do_slices(*arguments, work=work, **options)

    monkeypatch.setattr("convoy.pipelines.forecast_sampling.plan_pool", plan_pool)
    monkeypatch.setattr("convoy.pipelines.forecast_sampling.extrapolate", extrapolated)
    monkeypatch.setattr("convoy.pipelines.committee_predictions.do_slices", compute)
    config = from_source(images, store, extraction=ExtractionConfig(batch_size=2, slice_rows=4))
    plan_score(config, progress=Silent())
    num_rows = NUM_IMAGES + 1
    assert asked == [PlannedWork(num_rows, asked[0].weights_bytes, -(-num_rows // 4), asked[0].forward_s)]
    assert asked[0].forward_s > 0
    # The sample is computed by the operators of the whole.
    assert computed == asked
    assert (told["num_workers"], told["sampled_slices"]) == (counted, 6)


@pytest.mark.parametrize("job", [run_score, plan_score])
def test_a_scoring_behind_a_gate_that_is_not_there_is_refused_first(
    images: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch, job: Any
) -> None:
    monkeypatch.setattr("convoy.pipelines.forecast_sampling.ray_session", Mock(side_effect=AssertionError))
    with pytest.raises(ConfigError, match="no gate"):
        job(from_source(images, store, mode="gated"), progress=Silent())


@pytest.mark.parametrize("partition_by", ["none", "split", "label"])
@pytest.mark.parametrize("splits", [None, ["train", "test"]])
def test_a_forecast_counts_the_slices_of_each_partition_as_the_run_cuts_them(
    images: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch, partition_by: str, splits: Any
) -> None:
    told: dict[str, Any] = {}

    def extrapolated(*arguments: Any, **options: Any) -> Forecast:
        told.update(options)
        return extrapolate(*arguments, **options)

    monkeypatch.setattr("convoy.pipelines.forecast_sampling.extrapolate", extrapolated)
    extraction = ExtractionConfig(batch_size=2, slice_rows=4)
    config = from_source(images, store, partition_by=partition_by, splits=splits, extraction=extraction)
    forecast = plan_score(config, progress=Silent())
    report = run_score(config, progress=Silent())
    record, manifest = RunFolder(store, report.run).record(), read_manifest(RunFolder(store, report.run))
    assert record is not None
    assert manifest is not None
    assert forecast.images == record.num_inputs
    assert sorted(told["slice_rows"]) == sorted(record.rows_of(name) for name in record.slice_names())
    num_batches = sum(-(-(one.num_results + one.num_rejects) // 2) for one in manifest.slices)
    assert told["batches_ratio"] == num_batches / -(-record.num_inputs // 2)


@pytest.mark.parametrize(("crops", "is_refreshed"), [("flip", False), ("center", True), ("center", False)])
def test_a_dry_run_that_was_cut_off_bars_no_other_one(
    images: Path, store: LocalStore, crops: str, is_refreshed: bool
) -> None:
    with cut_off():
        plan_score(from_source(images, store), progress=Silent())
    (sample,) = open_pointers(store)
    if is_refreshed:
        write_digits(images, 2, start=NUM_IMAGES)
    config = from_source(images, store, crops=crops)
    assert plan_score(config, progress=Silent()).images == NUM_IMAGES + 1 + 2 * is_refreshed
    assert (run_ids(store), open_pointers(store)) == ([sample], {})


def test_the_sample_of_a_dry_run_that_was_cut_off_is_named_and_collected(
    images: Path, store: LocalStore
) -> None:
    with cut_off():
        plan_score(from_source(images, store), progress=Silent())
    (sample,) = open_pointers(store)
    (listed,) = list_runs(store).runs
    assert (listed.run, listed.verb) == (sample, "score --dry-run")
    run_score(from_source(images, store), progress=Silent())
    assert sample not in {one.what for one in collect_garbage(store, Changes.MADE).garbage}, "it is young"
    assert sample in {one.what for one in collect_garbage(store, Changes.MADE, older_than_days=0).garbage}
    assert (sample in run_ids(store), open_pointers(store)) == (False, {})


def test_a_forecast_of_another_convoy_keeps_no_run_from_its_end(images: Path, store: LocalStore) -> None:
    config = from_source(images, store)
    foretold = plan_score(config, progress=Silent())
    (key,) = (info.key for info in store.list_objects(FORECASTS))
    store.put(key, canonical_json(foretold.model_dump(mode="json") | {"of_another_version": 1}))
    report = run_score(config, progress=Silent())
    assert (report.forecast, report.results + report.rejects) == (None, NUM_IMAGES + 1)


def test_a_run_whose_record_has_a_forecast_of_another_convoy_ends_without_it(
    images: Path, store: LocalStore
) -> None:
    config = from_source(images, store)
    plan_score(config, progress=Silent())
    with cut_off():
        run_score(config, progress=Silent())
    (begun,) = open_pointers(store)
    key = f"runs/{begun}/run.json"
    record = json.loads(store.get(key).data)
    del record["settings"]["forecast"]["hours"]
    store.put(key, canonical_json(record))
    report = run_score(config, progress=Silent())
    assert (report.run, report.forecast) == (begun, None)


def test_a_new_run_takes_the_source_as_it_is(images: Path, store: LocalStore, begun: str) -> None:
    assert plan_score(from_source(images, store), progress=Silent(), new_run=True).images == NUM_IMAGES + 3
    report = run_score(from_source(images, store), progress=Silent(), new_run=True)
    assert (report.run != begun, report.inputs) == (True, NUM_IMAGES + 3)


@pytest.mark.parametrize(
    ("change", "error"), [({"crops": "flip"}, RunMismatch), ({"reading": {"labels": "none"}}, ConfigError)]
)
def test_a_cut_off_scoring_is_not_ended_with_other_settings(
    images: Path, store: LocalStore, begun: str, change: dict[str, Any], error: type[ConvoyError]
) -> None:
    with pytest.raises(error):
        run_score(from_source(images, store, **change), progress=Silent())
    assert list(open_pointers(store)) == [begun]


def test_a_pretrained_network_scores_in_precision_and_batches_of_a_clusters_workers(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head without a GPU drives, and has no say in it; what is done asks nobody."""
    answers = [made_device(Precision.BF16)]
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("convoy.pipelines.device_settings.find_device", answers.pop)
    config = ScoreConfig.model_validate(
        {
            "workspace": store.root_uri,
            "dataset": "digits",
            "name": "as-is",
            "model": {
                "backbone": {"arch": "lenet5", "weights": "random", "num_classes": 10},
                "classes": [str(digit) for digit in range(10)],
            },
            "extraction": ExtractionConfig(),
        }
    )
    first, again = (run_score(config, progress=Silent()) for _ in range(2))
    assert first.run == again.run
    record = RunFolder(store, first.run).record()
    assert record is not None
    assert record.identity["precision"] == ["bf16"]
    # Of 256 that the GPU computes at once, there are so few.
    assert record.settings["batch_size"] == 32
    assert not answers
