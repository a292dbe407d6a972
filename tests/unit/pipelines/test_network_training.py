"""Whose a training's run is: of two drivers one works, and it trains what the record of the run says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_jobs import write_digits
from convoy.cluster.training import WorkerOptions, WorkerPlan
from convoy.cluster.training_results import StepTaken
from convoy.cluster.training_spec import Ingest, TrainingSpec
from convoy.core.config import parse_config
from convoy.core.errors import (
    AccessDenied,
    ClusterError,
    ConfigError,
    ConvoyError,
    LeaseHeld,
    RunCancelled,
    RunMismatch,
    TrainingError,
)
from convoy.core.fingerprints import canonical_json
from convoy.core.progress import Silent
from convoy.core.splits import SplitOptions
from convoy.core.training_events import EpochResult, TrainingEvent
from convoy.pipelines import network_setup
from convoy.pipelines import network_training as network_training_module
from convoy.pipelines.distillation import TaughtRows
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.network_setup import TrainingSetup
from convoy.pipelines.network_training import NetworkTraining, config_identity, network_training
from convoy.pipelines.probing import HeadSummary
from convoy.pipelines.runs_cancel import cancel_run
from convoy.pipelines.train import random_weights
from convoy.pipelines.train_config import TrainConfig
from convoy.storage.checkpoints import CheckpointFolder, training_leftovers
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.documents import read_json
from convoy.storage.leases import WhenHeld, hold_run
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunRecord
from convoy.vision import training_config
from convoy.vision.engine_options import Precision
from made_devices import made_device
from made_events import epoch_result, training_event

Opened = Callable[..., AbstractContextManager[NetworkTraining]]
PATIENCE_S = 30.0


def drawn(history: Sequence[EpochResult]) -> bytes:
    """Stands for the picture of the epochs."""
    return f"{len(history)} epochs".encode()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """The training of a name on one dataset, as a call with some learning rate, and other changes, drives it."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "images", 60)
    store = LocalStore(str(folder / "workspace"))
    freeze_dataset(store, "digits", str(folder / "images"), splits=SplitOptions(val_fraction=0.3))
    manifest = open_dataset(store, "digits")

    def driven(
        name: str, rate: float | None, when_held: WhenHeld, **changes: Any
    ) -> AbstractContextManager[NetworkTraining]:
        settings = {
            "name": name,
            "dataset": "digits",
            "strategy": "from_scratch",
            "backbone": {"arch": "lenet5", "weights": "random"},
            "epochs": 1,
            "learning_rate": rate,
            "recipe": {"batch_size": 8},
            **changes,
        }
        config = parse_config(TrainConfig, settings, where="test")
        pretrained = fetch_backbone(store, random_weights(config, manifest))
        return network_training(
            store, manifest, pretrained, config, Silent(), new_run=False, when_held=when_held
        )

    return driven


def test_a_training_that_is_being_prepared_is_refused_to_a_second_driver(opened: Opened) -> None:
    with opened("prepared", 0.1, WhenHeld.REFUSE) as first:
        folder = first.folder
    # Neither has written what it trains.
    assert folder.record() is None
    with (
        hold_run(folder, ttl_s=1.5),
        pytest.raises(LeaseHeld, match="another driver works on this run: process "),
        opened("prepared", 0.2, WhenHeld.REFUSE),
    ):
        pass


def test_who_waited_for_another_training_does_not_train_over_it(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    with opened("waited", 0.1, WhenHeld.WAIT) as first:
        folder, identity = first.folder, first.identity
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            with opened("waited", 0.2, WhenHeld.WAIT):
                pass
        except RunMismatch as error:
            ended.append(error)

    second = threading.Thread(target=wait)
    with hold_run(folder, ttl_s=1.5):
        second.start()
        deadline_s = time.monotonic() + PATIENCE_S
        while f"run {folder.run_id} is held by" not in caplog.text:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        folder.write_record(
            RunRecord.new(folder.run_id, verb="train", identity=identity, config={}, outputs={}, groups=())
        )
    second.join()
    assert "learning_rate" in str(ended[0])


def identity_of(strategy: str, arch: str, recipe: dict[str, Any]) -> dict[str, Any]:
    settings = {"name": "n", "dataset": "d", "strategy": strategy, "backbone": {"arch": arch}}
    return config_identity(parse_config(TrainConfig, {**settings, "recipe": recipe}, where="test"))


def test_a_recipe_that_turns_the_papers_off_makes_another_training() -> None:
    papers = identity_of("from_scratch", "timm:convnext_atto", {})
    off = identity_of("from_scratch", "timm:convnext_atto", {"label_smoothing": 0.0, "mixup_alpha": 0.0})
    assert papers != off


@pytest.mark.parametrize(
    ("strategy", "recipe"),
    [
        ("fine_tune", {"label_smoothing": 0.0, "optimiser": {"kind": "sgd"}}),
        ("from_scratch", {"label_smoothing": 0.1, "optimiser": {"kind": "adamw", "weight_decay": 0.05}}),
        ("linear_probe", {"batch_size": 128}),
    ],
)
def test_a_recipe_that_spells_out_what_holds_anyway_makes_the_same_training(
    strategy: str, recipe: dict[str, Any]
) -> None:
    assert identity_of(strategy, "timm:convnext_atto", recipe) == identity_of(
        strategy, "timm:convnext_atto", {}
    )


ONE = WorkerPlan(
    num_workers=1,
    num_threads=1,
    cpus_per_worker=1,
    gpus_per_worker=0,
    ingest=Ingest.FUSED,
    preparers_per_worker=1,
    max_failures=0,
)


def test_a_training_that_began_before_batchnorm_was_shared_by_itself_goes_on() -> None:
    """Its record says `false`, which was the default."""
    by_itself, shared, never = (
        identity_of("fine_tune", "cifar_resnet20", recipe)["recipe"]["sync_batchnorm"]
        for recipe in ({}, {"sync_batchnorm": True}, {"sync_batchnorm": False})
    )
    assert by_itself is False
    assert shared is True
    # Who turns it off later does not get what was trained with it.
    assert never not in (by_itself, shared)


class _Stopped(Exception):
    """Where the workers would begin."""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[TrainingSpec]:
    """What workers were told; none starts."""
    specs: list[TrainingSpec] = []

    def start(spec: TrainingSpec, *_: object) -> None:
        specs.append(spec)
        raise _Stopped

    monkeypatch.setattr(network_training_module, "ray_session", nullcontext)
    monkeypatch.setattr(network_training_module, "plan_workers", lambda options: ONE)
    monkeypatch.setattr(network_training_module, "run_training", start)
    return specs


WITH_TEACHER = {"strategy": "fine_tune", "distill": {"teacher": "teacher"}}
PHASE = {"name": "all", "epochs": 1, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"freeze_depth": 99}, "a freeze depth of 99 is impossible"),
        ({"recipe": {"batch_size": 97}}, "a batch of 97 rows cannot be filled"),
        ({"phases": [{**PHASE, "resolution_px": 2}]}, "images of 2 px"),
        ({"phases": [PHASE], "head_source": "cache"}, "the head cannot come from the feature cache"),
    ],
)
@pytest.mark.usefixtures("told")
def test_what_cannot_be_trained_is_refused_before_the_teacher_is_asked_and_colours_are_measured(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], refused: str
) -> None:
    for module, work in (
        (network_training_module, "taught_rows"),
        (network_setup, "resolve_augmentation"),
        (network_setup, "fit_probe"),
    ):
        monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("it worked"))
    alone = {"epochs": None} if "phases" in changes else {}
    with (
        opened("refused", None, WhenHeld.REFUSE, **WITH_TEACHER, **alone, **changes) as training,
        pytest.raises(ConfigError, match=refused),
    ):
        training.run(drawn)


@pytest.mark.parametrize("num_left_out", [0, 3])
def test_a_training_is_planned_for_the_rows_that_the_teacher_could_use(
    opened: Opened, told: list[TrainingSpec], monkeypatch: pytest.MonkeyPatch, num_left_out: int
) -> None:
    planned: list[int] = []
    count = network_setup.count_classes

    def counted(rows: pa.Table, classes: Sequence[str]) -> list[int]:
        planned.append(rows.num_rows)
        return count(rows, classes)

    def teach(
        store: ObjectStore, manifest: Manifest, config: TrainConfig, rows: pa.Table, **_: object
    ) -> TaughtRows:
        return TaughtRows(rows=rows.slice(num_left_out))

    monkeypatch.setattr(network_setup, "count_classes", counted)
    monkeypatch.setattr(network_training_module, "taught_rows", teach)
    settings = {"distill": {"teacher": "teacher"}}
    with (
        opened(f"taught-{num_left_out}", 0.1, WhenHeld.REFUSE, **settings) as training,
        pytest.raises(_Stopped),
    ):
        training.run(drawn)
    (spec,) = told
    assert planned == [spec.train.num_rows + num_left_out, spec.train.num_rows][: 1 + bool(num_left_out)]


def test_a_training_that_an_older_convoy_began_goes_on_with_its_draws(
    opened: Opened, told: list[TrainingSpec]
) -> None:
    def drive() -> None:
        with opened("drawn", 0.1, WhenHeld.REFUSE) as training, pytest.raises(_Stopped):
            training.run(drawn)

    drive()
    with opened("drawn", 0.1, WhenHeld.REFUSE) as training:
        folder = training.folder
    record = folder.record()
    assert record is not None
    settings = {key: value for key, value in record.settings.items() if key != "draw_version"}
    older = record.model_copy(update={"settings": settings})
    folder.store.put(folder.key("run.json"), canonical_json(older))
    drive()
    assert [spec.draw_version for spec in told] == [2, 1]


@pytest.mark.usefixtures("told")
def test_a_training_that_was_given_up_stops_though_its_workers_tell_nothing(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(
        spec: TrainingSpec, plan: WorkerPlan, tell: Callable[..., None], check: Callable[[], None]
    ) -> None:
        check()
        cancel_run(training.folder.store, training.folder.run_id)
        deadline_s = time.monotonic() + PATIENCE_S
        # The store is not asked each time.
        while time.monotonic() < deadline_s:
            check()
            time.sleep(0.05)

    monkeypatch.setattr(network_training_module, "run_training", wait)
    with opened("cancelled", 0.1, WhenHeld.REFUSE) as training, pytest.raises(RunCancelled):
        training.run(drawn)


@pytest.mark.parametrize("error", [TrainingError, ClusterError])
@pytest.mark.usefixtures("told")
def test_a_training_that_diverges_or_loses_its_workers_leaves_its_curves(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, error: type[ConvoyError]
) -> None:
    epochs = [epoch_result(epoch=number, phase=phase) for number, phase in enumerate(["head", "body"], 1)]
    seen: list[bytes] = []

    def curves() -> bytes:
        return training.folder.store.get(training.folder.key("learning_curves.png")).data

    def train(
        spec: TrainingSpec, plan: WorkerPlan, tell: Callable[[TrainingEvent], None], *_: object
    ) -> dict[str, Any]:
        tell(training_event(phase="head", result=epochs[0]))
        # A restarted group begins with what its checkpoint knows.
        tell(training_event(phase="body", history=tuple(epochs[:1])))
        seen.append(curves())
        tell(training_event(phase="body", result=epochs[1]))
        if error is ClusterError:
            raise ClusterError("the workers were lost too often")
        history = [one.model_dump(mode="json") for one in epochs]
        last = StepTaken(phase="body", epoch=2, num_epochs=4, step=3, num_steps=5)
        return {"diverged": last.model_dump(), "history": history}

    monkeypatch.setattr(network_training_module, "run_training", train)
    with (
        opened(f"broken-{error.__name__}", 0.1, WhenHeld.REFUSE) as training,
        pytest.raises(error) as caught,
    ):
        training.run(drawn)
    if error is TrainingError:
        assert str(caught.value.where).endswith("checkpoints/, phase body, epoch 2 of 4, step 3 of 5")
    assert [*seen, curves()] == [b"1 epochs", b"2 epochs"]
    kept = read_json(training.folder.store, training.folder.key("history.json"))
    assert [EpochResult.model_validate(one) for one in kept] == epochs


def test_a_network_learnt_from_the_images_that_could_be_used(
    opened: Opened, told: list[TrainingSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(spec: TrainingSpec, *_: object) -> dict[str, Any]:
        told.append(spec)
        return {
            "weights_key": spec.initial_weights_key,
            "diverged": None,
            "history": [],
            "reject_codes": {"empty": 1, "truncated": 2},
        }

    monkeypatch.setattr(network_training_module, "run_training", train)
    with opened("rejects", 0.1, WhenHeld.REFUSE) as training:
        network = training.run(drawn)
    num_images = told[0].train.num_rows
    assert (network.num_train_images, network.num_train_rows) == (num_images, num_images - 3)


@pytest.mark.usefixtures("told")
def test_a_network_that_ends_below_its_fitted_head_says_so(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = HeadSummary(
        num_rows=42,
        fit_seconds=1.0,
        num_passes=1,
        body_pass_s=None,
        saved_s=None,
        converged=True,
        trials=[],
        val_top1=0.9,
    )
    set_up = network_training_module.set_up_training

    def with_head(*arguments: Any, **options: Any) -> tuple[TrainingSetup, bytes]:
        setup, weights = set_up(*arguments, **options)
        return setup.model_copy(update={"head": head}), weights

    def train(spec: TrainingSpec, *_: object) -> dict[str, Any]:
        return {
            "weights_key": spec.initial_weights_key,
            "diverged": None,
            "history": [],
            "val_top1": 0.0,
            "reject_codes": {},
        }

    monkeypatch.setattr(network_training_module, "set_up_training", with_head)
    monkeypatch.setattr(network_training_module, "run_training", train)
    with opened("below", 0.1, WhenHeld.REFUSE) as training:
        *_, note = training.run(drawn).notes
    assert "is 0.0000, and was 0.9000" in note


@pytest.mark.parametrize("delete", ["allowed", "refused"])
def test_a_training_that_ended_leaves_no_checkpoints_or_leaves_them_to_gc(
    opened: Opened, told: list[TrainingSpec], monkeypatch: pytest.MonkeyPatch, delete: str
) -> None:
    def train(spec: TrainingSpec, *_: object) -> dict[str, Any]:
        checkpoints.write(7, b"weights and momenta", details={})
        outcome = {
            "weights_key": spec.initial_weights_key,
            "diverged": None,
            "history": [],
            "reject_codes": {},
        }
        store.put(training.folder.key("trained.json"), canonical_json(outcome))
        return outcome

    def refuse(store: LocalStore, keys: Iterable[str]) -> None:
        doomed = list(keys)
        if any("/checkpoints/" in key for key in doomed):
            raise AccessDenied("may not delete")
        delete_all(store, doomed)

    delete_all = LocalStore.delete
    monkeypatch.setattr(network_training_module, "run_training", train)
    with opened(f"ended-{delete}", 0.1, WhenHeld.REFUSE) as training:
        store = training.folder.store
        checkpoints = CheckpointFolder(store, training.folder.run_id)
        network = training.run(drawn)
        store.put(training.folder.key("ray_train/start/.validate_storage_marker"), b"")
        assert len(training_leftovers(training.folder)) == 3
        if delete == "refused":
            monkeypatch.setattr(LocalStore, "delete", refuse)
        training.finish(network, {}, drawn)
        assert training.folder.is_finished()
        assert bool(training_leftovers(training.folder)) is (delete == "refused")
        # A driver that waited for this one still finds what was trained.
        assert training.run(drawn).backbone == network.backbone


def test_where_the_object_store_is_too_small_for_batches_threads_prepare_them(
    opened: Opened, told: list[TrainingSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int | None, int]] = []

    def plan(options: WorkerOptions, *, batch_bytes: int = 0) -> WorkerPlan:
        asked.append((options.num_workers, batch_bytes))
        return ONE.model_copy(update={"ingest": Ingest.FUSED if batch_bytes else Ingest.SPLIT})

    monkeypatch.setattr(network_training_module, "plan_workers", plan)
    with opened("small-store", 0.1, WhenHeld.REFUSE) as training:
        with pytest.raises(_Stopped):
            training.run(drawn)
        assert "Ray's object store is too small" in training.notes[0]
    (spec,) = told
    assert spec.ingest is Ingest.FUSED
    # The number of workers is that of the learning rates, which were set before.
    assert asked == [(None, 0), (1, spec.largest_batch_bytes(1))]


@pytest.mark.parametrize(
    ("wanted", "has_gpus", "settled", "has_note"),
    [
        (Ingest.AUTO, True, Ingest.FUSED, True),
        (Ingest.AUTO, False, Ingest.FUSED, False),
        (Ingest.SPLIT, True, Ingest.SPLIT, False),
    ],
)
def test_images_in_parquet_files_are_prepared_by_threads_unless_told_otherwise(
    tmp_path: Path,
    told: list[TrainingSpec],
    monkeypatch: pytest.MonkeyPatch,
    wanted: Ingest,
    has_gpus: bool,
    settled: Ingest,
    has_note: bool,
) -> None:
    def plan(options: WorkerOptions, **_: object) -> WorkerPlan:
        split_or_wanted = Ingest.SPLIT if options.ingest is Ingest.AUTO else options.ingest
        return ONE.model_copy(update={"gpus_per_worker": int(has_gpus), "ingest": split_or_wanted})

    monkeypatch.setattr(network_training_module, "plan_workers", plan)
    write_digits(tmp_path / "images", 30)
    paths = sorted((tmp_path / "images").rglob("*.jpg"))
    table = pa.table(
        {"image": [path.read_bytes() for path in paths], "label": [path.parent.name for path in paths]}
    )
    pq.write_table(table, tmp_path / "digits.parquet", row_group_size=10)
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(store, "digits", str(tmp_path / "digits.parquet"))
    settings = {
        "name": "lenet",
        "dataset": "digits",
        "strategy": "from_scratch",
        "backbone": {"arch": "lenet5"},
        "recipe": {"batch_size": 8},
        "workers": {"ingest": wanted},
    }
    config = parse_config(TrainConfig, settings, where="test")
    manifest = open_dataset(store, "digits")
    pretrained = fetch_backbone(store, random_weights(config, manifest))
    with network_training(
        store, manifest, pretrained, config, Silent(), new_run=True, when_held=WhenHeld.REFUSE
    ) as training:
        with pytest.raises(_Stopped):
            training.run(drawn)
        assert any("rows of parquet files" in note for note in training.notes) == has_note
    assert [spec.ingest for spec in told] == [settled]


def test_the_scale_of_a_lists_weights_is_no_learning_rate(tmp_path: Path, told: list[TrainingSpec]) -> None:
    write_digits(tmp_path / "images", 60)
    paths = sorted((tmp_path / "images").rglob("*.jpg"))
    store = LocalStore(str(tmp_path / "workspace"))
    settings = {
        "name": "lenet",
        "dataset": "digits",
        "strategy": "from_scratch",
        "backbone": {"arch": "lenet5"},
        "recipe": {"balance": "weights", "batch_size": 8},
    }
    config = parse_config(TrainConfig, settings, where="test")
    for scale in (1, 100):
        lines = [
            f"images/{path.parent.name}/{path.name},{path.parent.name},{scale * (1 + number % 2)}"
            for number, path in enumerate(paths)
        ]
        (tmp_path / "list.csv").write_text("\n".join(["path,label,weight", *lines]))
        freeze_dataset(store, "digits", str(tmp_path / "list.csv"), splits=SplitOptions(val_fraction=0.3))
        manifest = open_dataset(store, "digits")
        pretrained = fetch_backbone(store, random_weights(config, manifest))
        with (
            network_training(
                store,
                manifest,
                pretrained,
                config,
                Silent(),
                new_run=True,
                when_held=WhenHeld.REFUSE,
            ) as training,
            pytest.raises(_Stopped),
        ):
            training.run(drawn)
    once, hundredfold = told
    weights, heavy = (store.open_parquet(spec.train.key).read()["weight"].to_numpy() for spec in told)
    np.testing.assert_allclose(heavy, weights, rtol=1e-6)
    assert heavy.mean() == pytest.approx(1, rel=1e-6)
    assert heavy.max() == pytest.approx(2 * heavy.min(), rel=1e-6)
    assert once.class_weights is not None
    assert hundredfold.class_weights == pytest.approx(once.class_weights, rel=1e-6)


def test_a_training_on_a_cluster_is_of_its_workers_precision_also_when_it_goes_on(
    opened: Opened, told: list[TrainingSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head without a GPU drives, and has no say in it."""
    answers = [made_device(Precision.BF16)]
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(network_setup, "find_device", answers.pop)
    for _ in range(2):
        with opened("asked", 0.1, WhenHeld.REFUSE) as training, pytest.raises(_Stopped):
            training.run(drawn)
    assert [spec.recipe.precision for spec in told] == [training_config.TrainingPrecision.BF16] * 2
    record = training.folder.record()
    assert record is not None
    assert "precision bf16: NVIDIA H100 computes bf16 natively" in record.settings["setup"]["plan"]["notes"]
    assert not answers
