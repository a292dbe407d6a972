"""The steps of a retraining, and the decision that follows from the last of them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from hashlib import md5
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_jobs import write_digits
from convoy.core.config import parse_config
from convoy.core.crop_policies import CropPlan, CropPolicy
from convoy.core.errors import ConfigError, ExitCode, TrainingError
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.pipelines import retrain_steps, retrain_work, train
from convoy.pipelines.committees import open_committee, write_ensemble
from convoy.pipelines.feature_plan import FeatureDtype
from convoy.pipelines.model_registry import promote_model
from convoy.pipelines.network_training import NetworkTraining, open_training
from convoy.pipelines.retrain import run_retrain
from convoy.pipelines.retrain_config import Decision, RetrainConfig, RetrainReport, StepResult
from convoy.pipelines.retrain_gate import GateConfig, ModelScores, judge
from convoy.pipelines.retrain_rows import RetrainRows
from convoy.pipelines.retrain_steps import MadeModel
from convoy.pipelines.retrain_work import RetrainJob, _Outcome, take_until_settled
from convoy.pipelines.train import TrainReport
from convoy.report.curves import draw_learning_curves
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.leases import hold_run, is_given_up
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import WriterMode
from convoy.storage.registry import Alias, AliasMove, move_aliases, read_aliases
from convoy.storage.retrains import RetrainFolder, RetrainPlan
from convoy.storage.runs import RunFolder, RunRecord
from convoy.vision.head_config import HeadKind
from features_here import compute_features_here
from made_bundles import FP32, made_classifier, write_classifier

NAME = "digits"
CHAMPION = f"{NAME}@{'a' * 32}"
AGAIN = StepResult(
    step="refit_head", candidate=CHAMPION, train_rows=9, evidence=None, reason="the same", is_champion=True
)
OTHER = AGAIN.model_copy(update={"step": "fine_tune", "is_champion": False})

# What a training says of itself, but for its bundle.
MEASURED = {
    **dict.fromkeys(("samples", "results", "labelled", "top1", "top5"), 1),
    **dict.fromkeys(("cache_run", "nll", "brier", "ece", "reliability")),
    **{name: [] for name in ("splits", "per_class", "classes", "confusion")},
    "run": "r",
    "model_digest": "m",
    "rejects": 0,
    "intervals": {},
    "strategy": "fine_tune",
    "tap": "logits",
    "num_train_rows": 20,
    "within_error_budget": True,
}


@pytest.fixture
def job(tmp_path: Path) -> RetrainJob:
    """A date of a model on a few digits."""
    write_digits(tmp_path / "images", 40)
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(store, NAME, str(tmp_path / "images"), splits=SplitOptions(test_fraction=0.5))
    return begun(store)


def begun(store: LocalStore, date: str = "2026-01-01", **settings: Any) -> RetrainJob:
    """A date of the model, by some more settings."""
    plan = RetrainPlan(
        date=date,
        fingerprint=open_dataset(store, NAME).fingerprint,
        previous_fingerprint=None,
        champion=None,
        config={},
    )
    backbone = {"arch": "lenet5", "weights": "random"}
    settings = {"name": NAME, "dataset": NAME, "backbone": backbone, **settings}
    return RetrainJob(
        store,
        RetrainFolder(store, NAME),
        parse_config(RetrainConfig, settings, where="test"),
        plan,
        progress=Silent(),
        draw_curves=draw_learning_curves,
    )


def right_scores(num_rows: int) -> ModelScores:
    """A model that is right about so many rows."""
    return ModelScores(
        labels_N=np.zeros(num_rows, np.int64),
        correct_N=np.ones(num_rows, np.bool_),
        found_N=np.ones(num_rows, np.bool_),
        ece=None,
        macs=1,
    )


def test_a_step_that_gives_the_champion_again_is_the_last_one() -> None:
    refused = AGAIN.model_copy(update={"is_champion": False})
    assert take_until_settled([AGAIN, OTHER]) == [AGAIN]
    assert take_until_settled([refused, OTHER]) == [refused, OTHER]


def test_what_a_person_took_back_is_promoted_by_nobody_else(job: RetrainJob) -> None:
    on_champion = right_scores(400), right_scores(0)
    evidence = judge(on_champion, on_champion, ("digit",), GateConfig(margin=0.1))
    passed = AGAIN.model_copy(update={"is_champion": False, "evidence": evidence})
    assert passed.passed

    def move(action: str, digest: str, run: str = "") -> None:
        entry = AliasMove(action=action, moves={Alias.CHAMPION: digest}, run=run, reason="a complaint")
        move_aliases(job._store, NAME, lambda _: entry)

    move("promoted", "a" * 32, run=f"retrains/{NAME}/2025-12-30")
    assert job._decide(passed, on_champion).decision is Decision.PROMOTED
    move("rolled_back", "b" * 32)
    outcome = job._decide(passed, on_champion)
    assert outcome.decision is Decision.HELD
    assert "a person took the champion back (a complaint)" in outcome.reason
    move("promoted", "a" * 32)
    assert job._decide(passed, on_champion).decision is Decision.PROMOTED


def test_a_network_that_costs_more_than_the_early_tap_of_the_champion_is_not_trained_in_vain(
    job: RetrainJob,
) -> None:
    """Of the same architecture, so that whole networks cost the same."""
    job = begun(job._store, fine_tune={"epochs": 1})
    champion = replace(made_classifier(job._store, 0, head=HeadKind.SOFTMAX), tap="c1")
    maker = job._maker
    assert maker._fine_tune(champion) is None
    assert any("the gate would refuse lenet5: an image costs 1.8" in note for note in maker.notes)


def test_a_first_holdout_that_is_too_small_for_the_gate_is_said_at_once(job: RetrainJob) -> None:
    (note,) = job._holdout_notes()
    assert "only a clear gain will be promoted" in note


def test_what_is_new_is_told_from_is_said_where_the_champions_version_is_not_known(job: RetrainJob) -> None:
    assert job._version_notes() == []
    job._plan = job._plan.model_copy(update={"is_champions_version": False})
    (note,) = job._version_notes()
    assert note.endswith("all rows count as new")
    job._plan = job._plan.model_copy(update={"previous_fingerprint": "0" * 32})
    (note,) = job._version_notes()
    assert note.endswith("since the last date that was not held")


def test_a_date_that_was_killed_after_its_move_is_decided_by_the_move(job: RetrainJob) -> None:
    run = f"retrains/{NAME}/2026-01-01"
    nothing_new = job._decide(AGAIN, (right_scores(2), right_scores(0)))
    assert job._move_aliases(nothing_new, [AGAIN]).decision is Decision.NOTHING_NEW
    assert not read_aliases(job._store, NAME).history
    back = AliasMove(action="rolled_back", moves={Alias.CHAMPION: "b" * 32}, run=run, reason="it was worse")
    move_aliases(job._store, NAME, lambda _: back)
    moved = job._move_aliases(nothing_new, [AGAIN])
    assert (moved.decision, moved.reason) == (Decision.ROLLED_BACK, "it was worse")


def test_a_date_that_was_killed_after_its_move_names_the_candidate_that_was_moved(job: RetrainJob) -> None:
    moved = [
        job._move_aliases(_Outcome(decision=Decision.PROMOTED, reason="better", candidate=digest), [])
        for digest in ("a" * 32, "b" * 32)
    ]
    assert moved[1] == moved[0]
    assert read_aliases(job._store, NAME).aliases[Alias.CHAMPION] == moved[1].candidate == "a" * 32


def test_a_date_trains_one_network_however_often_it_is_killed_while_that_is_scored(
    job: RetrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(job._store.root_uri)
    champion = open_committee(store, str(write_classifier(store, NAME, made_classifier(store, 0))))
    seeds = count(1)

    def trained(*_: Any, **__: Any) -> TrainReport:
        """To other weights each time, as on a GPU."""
        bundle = str(write_classifier(store, NAME, made_classifier(store, next(seeds))))
        return TrainReport.model_validate({**MEASURED, "bundle": bundle})

    monkeypatch.setattr(retrain_steps, "run_train", trained)

    def made(date: str) -> MadeModel:
        job = begun(store, date, fine_tune={"epochs": 1})
        tuned = job._maker.steps(champion)["fine_tune"]()
        assert tuned is not None
        return tuned

    first = made("2026-01-01")
    assert first.train_rows == 20
    assert made("2026-01-01") == first
    assert made("2026-01-02").ref != first.ref


@pytest.mark.parametrize(("ratio", "is_trained"), [(10.0, False), (1000.0, True)])
def test_a_network_that_the_gate_would_refuse_for_its_cost_is_not_trained(
    job: RetrainJob, monkeypatch: pytest.MonkeyPatch, ratio: float, is_trained: bool
) -> None:
    store = LocalStore(job._store.root_uri)
    bundle = str(write_classifier(store, NAME, made_classifier(store, 0)))
    champion = open_committee(store, bundle)
    report = TrainReport.model_validate({**MEASURED, "bundle": bundle})
    monkeypatch.setattr(retrain_steps, "run_train", lambda *_, **__: report)
    dear = {"arch": "cifar_resnet20", "weights": "random"}
    maker = begun(store, backbone=dear, fine_tune={"epochs": 1}, gate={"max_cost_ratio": ratio})._maker
    made = maker.steps(champion)["fine_tune"]()
    assert (made is not None) == is_trained
    other, *left_out = maker.notes
    assert other == "fine_tune is for cifar_resnet20, the config's backbone, and the champion is lenet5"
    assert len(left_out) == (0 if is_trained else 1)
    assert all("allowed are 10.00" in note for note in left_out)


def test_a_network_whose_training_fails_is_left_out_and_not_gone_on_with(
    job: RetrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the settings of its date it would fail again, and no option of a retraining leaves its run."""
    store = LocalStore(job._store.root_uri)
    champion = open_committee(store, str(write_classifier(store, NAME, made_classifier(store, 0))))

    def diverge(*_: object) -> None:
        raise TrainingError("the loss is no finite number any more")

    monkeypatch.setattr(train, "ray_session", nullcontext)
    monkeypatch.setattr(NetworkTraining, "run", diverge)
    maker = begun(store, workspace=store.root_uri, fine_tune={"epochs": 1})._maker
    assert maker.steps(champion)["fine_tune"]() is None
    assert "its training failed: the loss is no finite number any more" in maker.notes[-1]
    assert open_training(store, f"{NAME}/retrain").current() is None


def test_a_first_head_on_random_weights_learns_from_the_float32_features_by_which_its_date_looks(
    job: RetrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_features_here(monkeypatch)
    first = begun(job._store, extraction=FP32.model_dump(), head={"C": [1.0]})
    set_id = first._ensure_set()
    made = first._maker.steps(None)["first_model"]()
    assert made is not None
    assert job._store.list_folders("features/") == [set_id]
    (member,) = open_committee(job._store, str(made.ref)).members
    assert member.classifier.dtype is FeatureDtype.FLOAT32


def test_a_head_that_nothing_could_choose_is_refused_before_the_date_is_begun(tmp_path: Path) -> None:
    write_digits(tmp_path / "images", 40)
    settings = {
        "workspace": str(tmp_path / "workspace"),
        "name": NAME,
        "dataset": NAME,
        "source": str(tmp_path / "images"),
        "splits": {"val_fraction": 0.0},
        "backbone": {"arch": "lenet5", "weights": "random"},
        "date": "2026-01-01",
    }
    config = parse_config(RetrainConfig, settings, where="test")
    with pytest.raises(ConfigError, match="no validation rows to choose by"):
        run_retrain(config, progress=Silent(), draw_curves=draw_learning_curves)
    assert RetrainFolder(LocalStore(str(tmp_path / "workspace")), NAME).plan("2026-01-01") is None


class _Stopped(Exception):
    """Where a training would begin."""


def test_a_date_leaves_behind_what_an_earlier_one_trained_and_nothing_of_a_person(
    job: RetrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(job._store.root_uri)
    champion = open_committee(store, str(write_classifier(store, NAME, made_classifier(store, 0))))

    def unfinished(target: str) -> RunFolder:
        folder = open_training(store, target).start()
        record = RunRecord.new(
            folder.run_id, verb="train", identity={"epochs": 90}, config={}, outputs={}, groups=()
        )
        folder.write_record(record)
        return folder

    def stop(*_: object) -> None:
        raise _Stopped

    monkeypatch.setattr(train, "ray_session", nullcontext)
    monkeypatch.setattr(NetworkTraining, "run", stop)
    persons, earlier = unfinished(NAME), unfinished(f"{NAME}/retrain")
    date = begun(store, workspace=store.root_uri, fine_tune={"epochs": 1})
    with hold_run(persons):
        for _ in range(2):
            with pytest.raises(_Stopped):
                date._maker.steps(champion)["fine_tune"]()
    left, own = (open_training(store, target).current() for target in (NAME, f"{NAME}/retrain"))
    assert left is not None
    assert own is not None
    assert left.run_id == persons.run_id
    assert own.run_id != earlier.run_id
    assert [is_given_up(folder) for folder in (left, earlier, own)] == [False, True, False]


def test_images_of_the_holdout_under_another_name_are_learnt_by_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_digits(tmp_path / "images", 40)
    for path in list((tmp_path / "images").rglob("*.jpg")):
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(store, NAME, str(tmp_path / "images"), splits=SplitOptions(test_fraction=0.5))
    rows = open_dataset(store, NAME).read_table()
    bytes_of = {
        content_id: md5(Path(uri).read_bytes()).digest()
        for content_id, uri in zip(rows["content_id"].to_pylist(), rows["uri"].to_pylist(), strict=True)
    }
    ids = sorted(bytes_of)
    digests = np.array([bytes_of[one] for one in ids], "S16")
    job = begun(store)
    trained_on: list[set[bytes]] = []

    def stop(rows: RetrainRows, *_: Any, **__: Any) -> None:
        trained_on.append({bytes_of[one] for one in rows.training(Split.TRAIN)["content_id"].to_pylist()})
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_ensure_set", lambda: "set")
    monkeypatch.setattr(retrain_work, "content_digests", lambda *_: (np.array(ids, "S16"), digests))
    monkeypatch.setattr(retrain_work, "examine_new_data", stop)
    no_lease: Any = None
    with pytest.raises(KeyboardInterrupt):
        job.run(no_lease)
    # numpy drops zeros at the end.
    judges = {bytes_of[one.ljust(16, b"\0")] for one in job._rows.holdout.content_ids_N.tolist()}
    assert trained_on[0]
    assert not trained_on[0] & judges


@pytest.mark.parametrize("crops", [CropPolicy.CENTER, CropPolicy.TEN])
def test_only_a_former_champion_that_can_be_compared_may_come_back(
    job: RetrainJob, crops: CropPolicy
) -> None:
    store = job._store
    refs = [write_classifier(store, NAME, made_classifier(store, seed)) for seed in (0, 1)]
    alone = replace(open_committee(store, str(refs[0])), plan=CropPlan(policy=crops))
    ensemble = write_ensemble(
        store, NAME, alone, metrics={"top1": 0.5, "splits": ["test"]}, card="# former\n"
    )
    move = AliasMove(
        action="promoted",
        moves={Alias.CHAMPION: refs[1].digest, Alias.PREVIOUS: ensemble.digest},
        run=f"retrains/{NAME}/2025-12-31",
        reason="better",
    )
    move_aliases(job._store, NAME, lambda _: move)
    job._plan = job._plan.model_copy(update={"champion": refs[1].digest})
    found = job._former_champion()
    assert (found is not None) == (crops is CropPolicy.CENTER)
    promoted = promote_model(
        store.root_uri, NAME, digest="previous", reason="by name", writers=WriterMode.MANY
    )
    assert promoted.aliases[Alias.CHAMPION] == ensemble.digest


def test_the_champion_made_again_is_nothing_new_and_no_refusal(job: RetrainJob) -> None:
    on_champion = right_scores(2), right_scores(0)
    outcome = job._decide(AGAIN, on_champion)
    assert (outcome.decision, outcome.candidate) == (Decision.NOTHING_NEW, None)
    assert job._decide(OTHER, on_champion).decision is Decision.HELD


@pytest.mark.parametrize(("is_damaged", "weight"), [(True, 1), (False, 0)])
def test_a_class_of_which_no_training_image_can_be_used_holds_every_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool, weight: int
) -> None:
    compute_features_here(monkeypatch)
    write_digits(tmp_path / "images", 60)
    images = sorted((tmp_path / "images").rglob("*.jpg"))
    source = tmp_path / "images.csv"
    with source.open("w") as rows:
        rows.write("uri,label,weight,split\n")
        for index, image in enumerate(images):
            rows.write(f"{image},{image.parent.name},1,{('train', 'val', 'test')[index % 3]}\n")
    settings = {
        "workspace": str(tmp_path / "workspace"),
        "name": NAME,
        "dataset": NAME,
        "source": str(source),
        "backbone": {"arch": "lenet5", "weights": "random"},
        "extraction": FP32.model_dump(),
    }

    def night(date: str) -> RetrainReport:
        config = parse_config(RetrainConfig, {**settings, "date": date}, where="test")
        return run_retrain(config, progress=Silent(), draw_curves=draw_learning_curves)

    assert night("2026-01-01").decision is Decision.PROMOTED
    with source.open("a") as rows:
        for index in range(12):
            image = tmp_path / f"{index}.jpg"
            image.write_bytes(b"no image" * index if is_damaged else images[index].read_bytes() + b"another")
            rows.write(f"{image},newclass,{weight},train\n")
    for date in ("2026-01-02", "2026-01-03"):
        report = night(date)
        assert report.process_exit_code is ExitCode.REFUSED_BY_GATE
        assert "no training image can be used of: newclass" in report.reason
