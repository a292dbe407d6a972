"""A search in the hands of one driver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_jobs import write_digits
from convoy.cluster.search_plan import GivenUp
from convoy.core.crop_policies import CropPolicy
from convoy.core.errors import ConfigError, LeaseHeld, RunMismatch, TrainingError
from convoy.core.fingerprints import digest
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.core.trial_events import TrialState
from convoy.pipelines import tune, tune_plan
from convoy.pipelines.ensemble_building import EnsembleReport
from convoy.pipelines.ensemble_choice import EnsembleBudget, EnsembleSettings
from convoy.pipelines.feature_plan import PrecisionChoice
from convoy.pipelines.network_training import open_training
from convoy.pipelines.runs_gc import collect_garbage
from convoy.pipelines.runs_state import Changes
from convoy.pipelines.trial_candidates import as_candidate, candidate_trials, view_notes
from convoy.pipelines.trial_journal import TrialCost, TrialJournal, TrialRecord
from convoy.pipelines.tune import _Search, run_tune
from convoy.pipelines.tune_config import SearchBudget
from convoy.pipelines.tune_plan import SearchPins
from convoy.storage.bundles import BundleRef
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.leases import hold_run, is_given_up
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import OpenRun, RunFolder, open_pointers
from convoy.vision.engine_options import Precision
from made_bundles import DIGITS, made_classifier, write_classifier
from made_devices import made_device
from made_ensembles import made_candidates, made_report
from made_leases import put_lease
from made_searches import DRAW, config_in, store_of_digits, write_lenet, write_teacher
from made_sources import jpeg_bytes


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return store_of_digits(tmp_path)


@pytest.fixture
def search(store: LocalStore) -> Iterator[_Search]:
    folder = OpenRun(store, verb="tune", target=digest(["search"])).start()
    with hold_run(folder) as lease:
        yield _Search(store, open_dataset(store, "digits"), config_in(store), Silent(), folder, lease)


def test_a_search_that_is_at_work_is_refused_to_a_second_driver(store: LocalStore) -> None:
    config = config_in(store)
    folder = OpenRun(store, verb="tune", target=digest([config.name])).start()
    with (
        hold_run(folder, ttl_s=1.5),
        pytest.raises(LeaseHeld, match="another driver works on this run: process "),
    ):
        run_tune(config, progress=Silent(), draw=DRAW)
    assert folder.record() is None


def test_validation_rows_without_labels_are_found_out_before_a_trial(
    store: LocalStore, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for split, labels in (("train", ["cat", "dog"]), ("val", [None, None])):
        table = pa.table({"image": [jpeg_bytes(0), jpeg_bytes(1)], "label": pa.array(labels, pa.string())})
        pq.write_table(table, source / f"{split}.parquet")
    freeze_dataset(store, "digits", str(source))
    assert open_dataset(store, "digits").counts[Split.VAL].num_unlabelled == 2
    with pytest.raises(ConfigError, match="labelled validation rows, and the dataset has none"):
        run_tune(config_in(store), progress=Silent(), draw=DRAW)


RESIZED, WHOLE = (
    {"arch": "lenet5", "weights": "random", "preset": {"resize_px": resize_px, "crop_px": 32}}
    for resize_px in (36, None)
)


@pytest.mark.parametrize(
    ("backbones", "crops", "words"),
    [
        ([RESIZED, WHOLE], None, "keep no views of ten: they hold center, flip"),
        ([RESIZED, WHOLE], CropPolicy.TEN, "trials are planned"),
        ([RESIZED], None, "trials are planned"),
    ],
)
def test_crops_that_a_network_of_the_space_will_not_keep_are_refused_before_its_trial(
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    backbones: list[dict[str, Any]],
    crops: CropPolicy | None,
    words: str,
) -> None:
    def plan_trials(*arguments: object, **batch: int) -> NoReturn:
        raise ConfigError("trials are planned")

    monkeypatch.setattr(tune, "ray_session", nullcontext)
    monkeypatch.setattr(tune, "plan_trials", plan_trials)
    ensemble = EnsembleSettings(crops=(CropPolicy.TEN,))
    config = config_in(store).model_copy(
        update={"space": {"backbone": {"grid": backbones}}, "crops": crops, "ensemble": ensemble}
    )
    with pytest.raises(ConfigError, match=words):
        run_tune(config, progress=Silent(), draw=DRAW)


def test_a_trial_that_the_end_of_the_time_cut_short_keeps_its_epochs_and_goes_on_with_a_larger_budget(
    search: _Search,
) -> None:
    journal: TrialJournal = search._journal
    ran, waited = (journal.point(index, {"recipe.seed": index}) for index in range(2))
    for point in (ran, waited):
        journal.drawn(point)
    end = GivenUp(state=TrialState.STOPPED, reason="late", epochs=((1, 0.5),), seconds=9.0)
    # The second call comes when there is no time left: nothing runs in it.
    for cut_short in ({ran.trial: end}, {}):
        with pytest.raises(TrainingError, match="none of 2 trials finished") as caught:
            search._ended(cut_short)
        assert caught.value.next_step is not None
        assert "what was cut short goes on" in caught.value.next_step
        of_ran, of_waited = search.records()
        assert (of_ran.state, of_ran.reason) == (TrialState.STOPPED, "late")
        assert (of_ran.epochs, of_ran.top1) == (((1, 0.5),), 0.5)
        assert of_waited.epochs == ()
        assert of_waited.reason is not None
        assert "before it came to run" in of_waited.reason
    plan = search._plan(1)
    assert (plan.past, plan.waiting) == ((), (ran, waited))
    # It has gone on, and ended.
    journal.write(finished(search, ran.index, top1=0.9, classes=DIGITS))
    assert [record.state for record in search._ended({})] == [TrialState.FINISHED, TrialState.STOPPED]
    assert search._plan(1).waiting == (waited,)


@pytest.mark.parametrize("hours", [0.005, None])
def test_a_search_without_a_finished_trial_tells_its_time_beside_what_a_trial_took(
    search: _Search, hours: float | None
) -> None:
    """Where nothing foretells how long a trial takes, as on GPUs, this is what a budget is corrected by."""
    search._config = search._config.model_copy(update={"budget": SearchBudget(trials=2, hours=hours)})
    points = [search._journal.point(index, {"recipe.seed": index}) for index in range(2)]
    for point in points:
        search._journal.drawn(point)
    end = GivenUp(state=TrialState.STOPPED, reason="late", epochs=((1, 0.5),), seconds=9.0)
    with pytest.raises(TrainingError) as caught:
        search._ended({points[1].trial: end})
    told = (
        f"the budget was 18 s in all, and the longest trial, {points[1].trial}, ran for 9 s; epochs done: 1"
    )
    assert (told in str(caught.value)) == (hours is not None)


def opened_trainings(search: _Search, index: int) -> list[RunFolder]:
    """What the process of a trial left when it was stopped: a run of its training, or of that of each fold."""
    point = search._journal.point(index, {"recipe.seed": index})
    search._journal.drawn(point)
    return [open_training(search._store, name).start() for name in search._journal.trainings(point.trial)]


@pytest.mark.parametrize("folds", [None, 2])
def test_a_training_that_no_trial_goes_on_with_is_given_up(search: _Search, folds: int | None) -> None:
    search._config = search._config.model_copy(update={"folds": folds})
    search._journal = TrialJournal(search._folder, search._config)
    stopped, (going_on, *_), (held, *_), cut_short = (opened_trainings(search, index) for index in range(4))
    assert len(stopped) == (folds or 1)
    search._journal.write(finished(search, 1, top1=0.5, classes=DIGITS))
    for index in (0, 2):
        end = GivenUp(state=TrialState.STOPPED, reason="behind", epochs=(), seconds=9.0)
        search._journal.give_up(search._journal.point(index, {"recipe.seed": index}), end)
    for folder in (*stopped, *cut_short):
        put_lease(folder, ttl_s=0.1)
    with hold_run(held, ttl_s=1.0):
        search._ended({})
    left = {folder.run_id for folder in stopped}
    kept = {folder.run_id for folder in (going_on, held, *cut_short)}
    pointers = open_pointers(search._store)
    assert left.isdisjoint(pointers)
    assert kept <= pointers.keys()
    assert not is_given_up(held)
    removed = {one.what for one in collect_garbage(search._store, Changes.MADE, watch_s=0).garbage}
    assert left <= removed
    assert kept.isdisjoint(removed)


def test_a_search_that_goes_on_elsewhere_keeps_what_names_meant_when_it_began(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trials are compared: all of them learn from one teacher, and begin with the same weights."""
    file, num_classes = tmp_path / "lenet.safetensors", len(open_dataset(store, "digits").classes)
    backbone = {"arch": "lenet5", "weights": str(file), "num_classes": num_classes}
    base = {"backbone": backbone, "strategy": "fine_tune", "epochs": 1, "distill": {"teacher": "photos"}}
    config = config_in(store).model_copy(update={"base": base})

    def change(seed: int, precision: Precision) -> BundleRef:
        write_lenet(file, seed, num_classes=num_classes)
        monkeypatch.setattr(tune_plan, "find_device", lambda: made_device(precision))
        return write_teacher(store, seed)

    seen: list[SearchPins] = []

    def run(search: _Search, _: object, pins: SearchPins) -> list[TrialRecord]:
        seen.append(pins)
        if len(seen) == 1:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(tune, "ray_session", nullcontext)
    monkeypatch.setattr(_Search, "run", run)
    monkeypatch.setattr(_Search, "build_ensemble", lambda *_: made_report(made_candidates(1.0, 1.2)))
    first = change(0, Precision.FP32)
    with pytest.raises(KeyboardInterrupt):
        run_tune(config, progress=Silent(), draw=DRAW)
    change(1, Precision.BF16)
    report = run_tune(config, progress=Silent(), draw=DRAW)
    begun, resumed = seen
    assert resumed == begun
    assert (begun.precision, begun.teachers) == (PrecisionChoice.FP32, {"photos": str(first)})
    assert len(begun.weights) == 1
    assert report.notes == begun.notes
    anew = run_tune(config, progress=Silent(), draw=DRAW, new_run=True)
    assert anew.run != report.run
    assert seen[-1].precision is PrecisionChoice.BF16
    assert seen[-1].teachers != begun.teachers
    assert seen[-1].weights.keys() == begun.weights.keys()
    assert seen[-1].weights != begun.weights


def test_a_cut_off_search_is_ended_on_the_images_on_which_it_began(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[tuple[str, int]] = []

    def run(search: _Search, *_: Any) -> list[TrialRecord]:
        searched.append((search._folder.run_id, search._manifest.num_samples))
        if len(searched) == 1:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(tune, "ray_session", nullcontext)
    monkeypatch.setattr(_Search, "run", run)
    monkeypatch.setattr(_Search, "build_ensemble", lambda *_: made_report(made_candidates(1.0, 1.2)))
    config = config_in(store)
    with pytest.raises(KeyboardInterrupt):
        run_tune(config, progress=Silent(), draw=DRAW)
    write_digits(tmp_path / "images", 2, start=30)
    freeze_dataset(store, "digits", str(tmp_path / "images"), splits=SplitOptions(val_fraction=0.3))
    with pytest.raises(RunMismatch) as refused:
        run_tune(config.model_copy(update={"seed": 1}), progress=Silent(), draw=DRAW)
    assert "seed" in str(refused.value)
    assert "fingerprint" not in str(refused.value), "nobody can restore that"
    ended, newest = (run_tune(config, progress=Silent(), draw=DRAW) for _ in range(2))
    begun, again, anew = searched
    assert begun == again == (ended.run, 30)
    assert anew == (newest.run, 32)
    assert ["an unfinished run goes on" in str(one.notes) for one in (ended, newest)] == [True, False]


def test_a_search_that_began_without_a_word_on_names_pins_none() -> None:
    """Then each of its trials decides, as those before have done."""
    assert SearchPins.model_validate({}).precision is PrecisionChoice.AUTO
    assert SearchPins.model_validate({"precision": "fp32"}) == SearchPins(precision=PrecisionChoice.FP32)


def test_another_ensemble_is_built_of_the_trials_that_there_are(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(search: _Search, records: object) -> EnsembleReport:
        return made_report(made_candidates(1.0, 1.2), search._config.ensemble)

    monkeypatch.setattr(tune, "ray_session", nullcontext)
    monkeypatch.setattr(_Search, "run", lambda *_: [])
    monkeypatch.setattr(_Search, "build_ensemble", build)
    config = config_in(store)
    too_fast, slower = (
        config.model_copy(update={"ensemble": EnsembleSettings(budget=EnsembleBudget(min_images_per_s=rate))})
        for rate in (1e6, 1.0)
    )
    with pytest.raises(ConfigError, match="no candidate is within the budget"):
        run_tune(too_fast, progress=Silent(), draw=DRAW)
    unfinished = OpenRun(store, verb="tune", target=digest(["search"])).current()
    assert unfinished is not None
    with pytest.raises(RunMismatch, match="seed"):
        run_tune(slower.model_copy(update={"seed": 1}), progress=Silent(), draw=DRAW)
    report = run_tune(slower, progress=Silent(), draw=DRAW)
    assert (report.run, report.settings) == (unfinished.run_id, slower.ensemble)


def test_a_finished_search_is_answered_and_goes_on_only_by_a_larger_budget(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def run(search: _Search, *_: Any) -> list[TrialRecord]:
        done.append("searched")
        return []

    def build(search: _Search, records: object) -> EnsembleReport:
        done.append("built")
        return made_report(made_candidates(1.0, 1.2), search._config.ensemble)

    monkeypatch.setattr(tune, "ray_session", nullcontext)
    monkeypatch.setattr(_Search, "run", run)
    monkeypatch.setattr(_Search, "build_ensemble", build)
    config = config_in(store)

    def again(*, new_run: bool = False, **changes: object) -> str:
        done.clear()
        changed = config.model_copy(update=changes)
        report = run_tune(changed, progress=Silent(), draw=DRAW, new_run=new_run)
        assert (report.settings, report.budget) == (changed.ensemble, changed.budget)
        return report.run

    first = again()
    assert done == ["searched", "built"]
    assert (again(), done) == (first, [])
    uniform = {"ensemble": EnsembleSettings(max_members=2)}
    assert (again(**uniform), done) == (first, ["built"])
    assert (again(budget=SearchBudget(trials=9), **uniform), done) == (first, ["searched", "built"])
    other = again(seed=1)
    assert other != first
    assert done == ["searched", "built"]
    anew = again(new_run=True)
    assert anew not in (first, other)
    assert (again(), done) == (anew, [])


def finished(
    search: _Search, index: int, *, top1: float, classes: tuple[str, ...], **values: Any
) -> TrialRecord:
    point = search._journal.point(index, {"recipe.seed": index, **values})
    bundle = write_classifier(
        search._store, point.trial, made_classifier(search._store, index, classes=classes)
    )
    return TrialRecord(
        **point.model_dump(),
        config=search._journal.recorded_config(point),
        state=TrialState.FINISHED,
        top1=top1,
        bundles=(str(bundle),),
        predictions_runs=("run-1",),
        cost=TrialCost(parameters=10, macs=20, size_bytes=30, num_views=1, images_per_s=100.0),
        started_unix_s=0,
        finished_unix_s=1,
    )


def test_trials_that_cannot_vote_with_the_best_one_are_no_candidates(search: _Search) -> None:
    """A pretrained network as it is knows all its classes, a trained one those of the dataset."""
    records = [
        finished(search, 0, top1=0.5, classes=DIGITS),
        finished(search, 1, top1=0.7, classes=(*DIGITS, "ten")),
        finished(search, 2, top1=0.8, classes=DIGITS[::-1]),
        finished(search, 3, top1=0.6, classes=DIGITS, **{"extraction.decode.version": 1}),
    ]
    candidates, (note,) = candidate_trials(search._store, records)
    assert candidates == [records[0], records[2]]
    assert note.startswith(f"2 trials cannot be members beside the best, {records[2].trial}")


def test_candidates_that_were_timed_with_different_shares_of_the_cluster_are_compared_on_all_of_it(
    search: _Search,
) -> None:
    """Eight at once, then one at a time after a resume; and one of an earlier Convoy, which knew no share."""
    record = finished(search, 0, top1=0.5, classes=DIGITS)
    assert record.cost is not None
    of_eight, alone = (
        record.model_copy(
            update={"cost": record.cost.model_copy(update={"images_per_s": rate, "cluster_share": share})}
        )
        for rate, share in ((100.0, 1 / 8), (800.0, 1.0))
    )
    document = alone.model_dump(mode="json")
    del document["cost"]["cluster_share"], document["cost"]["network_share"]
    records = (of_eight, alone, TrialRecord.model_validate(document))
    assert [as_candidate(one).seconds_per_pass for one in records] == [1 / 800] * 3


def test_trials_that_came_to_the_same_model_are_one_candidate(search: _Search) -> None:
    """As two probes do that differ in a freeze depth. Models of folds are the same if all of them are."""
    records = [finished(search, index, top1=0.5, classes=DIGITS) for index in range(4)]
    (zero,), (one,), *_ = (record.bundles for record in records)
    again = str(write_classifier(search._store, "again", made_classifier(search._store, 0)))
    of_trials = [(zero,), (again,), (zero, one), (again, one)]
    trials = [
        record.model_copy(update={"bundles": bundles, "predictions_runs": bundles})
        for record, bundles in zip(records, of_trials, strict=True)
    ]
    candidates, notes = candidate_trials(search._store, trials)
    assert candidates == [trials[0], trials[2]]
    first, second, third, fourth = (record.trial for record in trials)
    assert notes == [
        f"trial {second} is the same model as {first}",
        f"trial {fourth} is the same model as {third}",
    ]


def test_a_trial_that_kept_fewer_crops_than_the_others_is_named(search: _Search) -> None:
    records = [
        record.model_copy(update={"cost": record.cost.model_copy(update={"num_views": num_views})})
        for index, num_views in enumerate((10, 2, 10))
        if (record := finished(search, index, top1=0.5, classes=DIGITS)).cost is not None
    ]
    (note,) = view_notes(records)
    assert f"no more crops than {records[1].trial} kept: 2 views an image, where others kept up to 10" in note
    assert view_notes(records[::2]) == view_notes([]) == []


def test_a_search_says_which_trials_lost_rows_and_how_many_chose(
    search: _Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        finished(search, index, top1=0.5, classes=DIGITS).model_copy(update=rejected)
        for index, rejected in enumerate(({}, {"rejects": 960, "within_error_budget": False}, {"rejects": 3}))
    ]
    report = made_report(made_candidates(1.0, 1.2)).model_copy(update={"num_val_rows": 40})
    monkeypatch.setattr(tune, "build_ensemble", lambda *args, **named: report)
    search.build_ensemble(records)
    _, much, little = (record.trial for record in records)
    assert search.notes == [
        f"trials that rejected more images than error_budget allows: {much}",
        f"40 validation rows chose, those that every candidate predicted: {much} lost 960, {little} lost 3",
    ]
    search.notes.clear()
    search.build_ensemble(records[:1])
    assert not search.notes


def test_a_search_breaks_its_error_budget_where_a_trial_or_the_ensembles_evaluation_does(
    search: _Search,
) -> None:
    good = finished(search, 0, top1=0.5, classes=DIGITS)
    bad = good.model_copy(update={"within_error_budget": False})
    report = made_report(made_candidates(1.0, 1.2))
    few, many = (
        report.model_copy(update={"evaluation": SimpleNamespace(rejects=rejects, samples=1000)})
        for rejects in (100, 101)
    )
    for records, ensemble, is_within in (
        ([good, good], report, True),
        ([good, bad], report, False),
        ([good], few, True),
        ([good], many, False),
    ):
        assert search.is_within_error_budget(records, ensemble) == is_within


def test_a_search_whose_trials_rejected_too_much_keeps_its_results_and_says_so_each_time(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(search: _Search, *_: Any) -> list[TrialRecord]:
        good = finished(search, 0, top1=0.5, classes=DIGITS)
        return [good.model_copy(update={"within_error_budget": False})]

    monkeypatch.setattr(tune, "ray_session", nullcontext)
    monkeypatch.setattr(_Search, "run", run)
    monkeypatch.setattr(_Search, "build_ensemble", lambda *_: made_report(made_candidates(1.0, 1.2)))
    config = config_in(store)
    for _ in range(2):
        report = run_tune(config, progress=Silent(), draw=DRAW)
        assert not report.within_error_budget
        assert [trial.within_error_budget for trial in report.trials] == [False]
        assert report.ensemble
