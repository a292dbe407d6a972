"""What a trial records of itself: its own errors, and nothing that is the matter with the place."""

from __future__ import annotations

import pytest

from cache_jobs import write_digits
from convoy.cluster.search_plan import Concurrency, EpochAccuracies, GivenUp
from convoy.cluster.training import TrialWorkers
from convoy.core.config import parse_config
from convoy.core.errors import OBSTACLES, ConvoyError, DataError
from convoy.core.progress import Silent
from convoy.core.splits import SplitOptions
from convoy.core.trial_events import TrialState
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.feature_plan import PrecisionChoice
from convoy.pipelines.train_config import DistillConfig, TrainConfig
from convoy.pipelines.trial_journal import TrialJournal
from convoy.pipelines.trials import TrialJob, _here, run_trial
from convoy.pipelines.tune_config import TuneConfig
from convoy.pipelines.wanted_training import wanted_recipe
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder
from convoy.vision.training_config import TrainingPrecision

CONFIG = {
    "name": "search",
    "dataset": "digits",
    "base": {"backbone": {"arch": "lenet5", "weights": "random"}, "strategy": "linear_probe", "tap": "f6"},
    "space": {"recipe.seed": {"grid": [0, 1]}},
}
PINNED = f"photos@{'a' * 32}"


class Meeting(Silent):
    """A trial that meets an error at the first thing that it does."""

    def __init__(self, error: ConvoyError) -> None:
        self._error = error

    def stage(self, text: str) -> None:
        raise self._error

    def finish(self, epochs: EpochAccuracies, top1: float) -> None:
        raise AssertionError("it does not finish")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrialJob:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "images", 30)
    store = LocalStore(str(folder / "workspace"))
    freeze_dataset(store, "digits", str(folder / "images"), splits=SplitOptions(val_fraction=0.3))
    return TrialJob(
        workspace=store.root_uri,
        run_id="run-1",
        dataset_fingerprint=open_dataset(store, "digits").fingerprint,
        config=parse_config(TuneConfig, CONFIG, where="test"),
        share=Concurrency(max_concurrent=1, workers=TrialWorkers(num_workers=1, on_gpus=False)),
        weights={},
        teachers={"photos": PINNED},
        code_digests={},
        precision=PrecisionChoice.BF16,
    )


def journal_of(job: TrialJob) -> TrialJournal:
    return TrialJournal(RunFolder(LocalStore(job.workspace), job.run_id), job.config)


@pytest.mark.parametrize("kind", OBSTACLES)
def test_a_trial_that_the_place_kept_from_going_on_has_no_record(
    job: TrialJob, kind: type[ConvoyError]
) -> None:
    journal = journal_of(job)
    point = journal.point(0, {"recipe.seed": 0})
    with pytest.raises(kind):
        run_trial(job, lambda history: b"", point, Meeting(kind("it stands in the way")))
    assert journal.record(point.trial) is None


def test_an_error_of_the_trial_is_recorded(job: TrialJob) -> None:
    journal = journal_of(job)
    point = journal.point(1, {"recipe.seed": 1})
    run_trial(job, lambda history: b"", point, Meeting(DataError("no image can be used")))
    record = journal.record(point.trial)
    assert record is not None
    assert (record.state, record.reason) == (TrialState.FAILED, "no image can be used")


def test_a_drawn_point_that_is_no_training_fails_alone(job: TrialJob) -> None:
    """Of a search with hours for a budget not all draws were checked."""
    journal = journal_of(job)
    drawn, never_ran = (journal.point(index, {"recipe.seed": -index}) for index in (2, 3))
    run_trial(job, lambda history: b"", drawn, Silent())
    journal.give_up(never_ran, GivenUp(state=TrialState.STOPPED, reason="no time", epochs=(), seconds=0))
    failed, stopped = (journal.record(point.trial) for point in (drawn, never_ran))
    assert failed is not None
    assert (failed.state, failed.values, failed.config) == (TrialState.FAILED, {"recipe.seed": -2}, {})
    assert "recipe.seed" in (failed.reason or "")
    assert stopped is not None
    assert (stopped.state, stopped.config) == (TrialState.STOPPED, {})


def test_a_job_and_a_record_that_were_written_out_train_what_was_drawn(job: TrialJob) -> None:
    """Also where a value of the search is the one that a recipe has without a paper."""
    base = {"backbone": {"arch": "timm:convnext_atto"}, "strategy": "from_scratch"}
    space = {"recipe.label_smoothing": {"grid": [0.0, 0.2]}}
    config = parse_config(TuneConfig, {**CONFIG, "base": base, "space": space}, where="test")
    sent = job.model_copy(update={"config": config})
    arrived = journal_of(TrialJob.model_validate_json(sent.model_dump_json()))
    point = arrived.point(0, {"recipe.label_smoothing": 0.0})
    arrived.give_up(point, GivenUp(state=TrialState.STOPPED, reason="no time", epochs=(), seconds=0))
    record = arrived.record(point.trial)
    assert record is not None
    for training in (arrived.train_config(point), TrainConfig.model_validate(record.config)):
        recipe = wanted_recipe(training)
        assert (recipe.label_smoothing, recipe.mixup_alpha, recipe.batch_size) == (0.0, 0.8, 4096)


def test_auto_means_one_precision_in_all_trials(job: TrialJob) -> None:
    """Not what the node is good for on which a trial happens to be."""
    train_config = journal_of(job).train_config(journal_of(job).point(0, {"recipe.seed": 0}))
    here = _here(job, train_config)
    assert (here.extraction.precision, here.recipe.precision) == (
        PrecisionChoice.BF16,
        TrainingPrecision.BF16,
    )
    explicit = train_config.model_copy(
        update={
            "extraction": train_config.extraction.model_copy(update={"precision": PrecisionChoice.FP32}),
            "recipe": train_config.recipe.model_copy(update={"precision": TrainingPrecision.FP16}),
        }
    )
    kept = _here(job, explicit)
    assert (kept.extraction.precision, kept.recipe.precision) == (
        PrecisionChoice.FP32,
        TrainingPrecision.FP16,
    )


def test_a_network_of_a_trial_is_served_in_the_precision_that_its_recipe_names(job: TrialJob) -> None:
    """Also where that is not what `auto` means in the search; of a probe the recipe says nothing."""
    drawn = journal_of(job).train_config(journal_of(job).point(0, {"recipe.seed": 0}))
    recipe = drawn.recipe.model_copy(update={"precision": TrainingPrecision.FP32})
    for strategy, precision in (
        (Strategy.FINE_TUNE, PrecisionChoice.FP32),
        (Strategy.LINEAR_PROBE, job.precision),
    ):
        config = drawn.model_copy(update={"strategy": strategy, "recipe": recipe})
        assert _here(job, config).extraction.precision is precision


def test_a_name_of_a_teacher_means_one_bundle_in_all_trials(job: TrialJob) -> None:
    """Not what a nightly job has made of the name by the time that a trial begins, or goes on."""
    train_config = journal_of(job).train_config(journal_of(job).point(0, {"recipe.seed": 0}))
    for given, found in (("photos", PINNED), ("other", "other")):
        taught = train_config.model_copy(update={"distill": DistillConfig(teacher=given, weight=0.5)})
        assert _here(job, taught).distill == DistillConfig(teacher=found, weight=0.5)


def test_a_trial_trains_with_the_workers_of_its_share_and_records_none_of_it(job: TrialJob) -> None:
    here = _here(job, journal_of(job).train_config(journal_of(job).point(0, {"recipe.seed": 0})))
    assert here.workers == job.share.workers
    assert "on_gpus" not in here.model_dump()["workers"]
