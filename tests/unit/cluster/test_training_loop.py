from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from checkpoint_records import checkpoint_records
from convoy.cluster import training_board, training_checkpoints, training_loop, training_meter
from convoy.cluster.training_checkpoints import Position, TrainingCheckpoints
from convoy.cluster.training_loop import TrainingWorker
from convoy.cluster.training_meter import Spent
from convoy.cluster.training_results import TrainingOutcome, read_outcome
from convoy.cluster.training_spec import TrainingSpec
from convoy.core.crash_points import CrashPoint
from convoy.core.errors import AccessDenied, DataError
from convoy.core.training_events import TrainingEvent
from convoy.storage.checkpoints import CheckpointFolder, CheckpointRecord
from convoy.storage.local_cache import CacheCounts, LocalCacheOptions, LocalImageCache
from convoy.storage.local_store import LocalStore
from convoy.vision.averaging import BestEpochs
from convoy.vision.backbone_config import BackboneConfig, NewLayers
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.training_config import Balance, Optimiser, OptimiserKind, Phase, WeightAveraging
from convoy.vision.training_state import PackedTraining, is_finite
from convoy.vision.weights import read_state_dict
from made_training import (
    RUN_ID,
    GroupOfOne,
    digit_rows,
    frozen_rows,
    recipe,
    store_rows,
    store_teacher,
    training_spec,
)

# 40 training rows in 5 steps an epoch, and 10 rows for validation.
NUM_IMAGES = 50
# Residual blocks, BatchNorm and dropout.
REUSE = BackboneConfig(
    arch="cifar_resnet20",
    weights="random",
    num_classes=10,
    new_layers=NewLayers.model_validate(
        {"after": "layer1.0", "convs": [{"width": 8, "stride": 2}], "hidden_widths": [16], "dropout": 0.3}
    ),
)
TWO_PHASES = (
    Phase(name="head", epochs=1, freeze_depth="body", learning_rate=0.05),
    Phase(name="body", epochs=2, freeze_depth=1, learning_rate=0.02, body_rate=0.5, layer_decay=0.9),
)


class KilledError(Exception):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return digit_rows(tmp_path_factory.mktemp("digits"), NUM_IMAGES)


def resolved(phases: tuple[Phase, ...], backbone: BackboneConfig) -> tuple[Phase, ...]:
    """The phases with the body's depth as a number, as a plan has it."""
    most = len(depth_axis(backbone, build_network(backbone))) - 1
    return tuple(
        phase.model_copy(update={"freeze_depth": most}) if phase.freeze_depth == "body" else phase
        for phase in phases
    )


def reuse_spec(workspace: Path, rows: pa.Table, **settings: Any) -> TrainingSpec:
    fields = {"backbone": REUSE, "phases": resolved(TWO_PHASES, REUSE), **settings}
    return training_spec(workspace, rows, **fields)


def train(spec: TrainingSpec) -> TrainingOutcome:
    return TrainingWorker(spec, GroupOfOne(), None).run()


def train_until_killed(spec: TrainingSpec, at_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train up to a step of the run, counted over its epochs from 1, and end there as a killed process does."""
    arrivals = []

    def die(point: CrashPoint) -> None:
        arrivals.append(point)
        if arrivals.count(CrashPoint.TRAINING_STEP) == at_step:
            raise KilledError

    worker = TrainingWorker(spec, GroupOfOne(), None)
    with monkeypatch.context() as patched:
        patched.setattr(training_loop, "crash_point", die)
        with pytest.raises(KilledError):
            worker.run()
    # What was under way arrives before the next process looks; kills in between have tests of their own.
    worker._checkpoints.close()


def weights_of(spec: TrainingSpec, outcome: TrainingOutcome) -> dict[str, Tensor]:
    assert outcome.weights_key is not None
    return read_state_dict(LocalStore(spec.workspace).get(outcome.weights_key).data)


def timeless(outcome: TrainingOutcome) -> list[dict[str, Any]]:
    seconds = {"seconds", "wait_s", "images_per_s"}
    return [one.model_dump(exclude=seconds) for one in outcome.history]


def assert_same(
    spec: TrainingSpec, found: TrainingOutcome, other: TrainingSpec, expected: TrainingOutcome
) -> None:
    first, second = weights_of(spec, found), weights_of(other, expected)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert timeless(found) == timeless(expected)
    assert (found.val_nll, found.val_top1) == (expected.val_nll, expected.val_top1)
    assert found.reject_codes == expected.reject_codes


RECIPES = {
    "ema": {"averaging": "ema", "ema_decay": 0.9},
    "soup": {"averaging": "soup", "average_epochs": 2},
    "swa": {"averaging": "swa", "average_epochs": 2, "accumulate": 2},
    "best": {"averaging": "best", "clip_norm": 0.5, "label_smoothing": 0.1},
    "mixing": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0},
    "adamw": {"optimiser": Optimiser(kind=OptimiserKind.ADAMW, weight_decay=0.01)},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_training_ends_with_the_very_weights_of_one_that_was_not(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = {"recipe": recipe(**RECIPES[name]), "checkpoint_steps": 3}
    whole = reuse_spec(tmp_path / "whole", rows, **settings)
    expected = train(whole)
    killed = reuse_spec(tmp_path / "killed", rows, **settings)
    # In the middle of an epoch, each time: of the head's, and then of the first and the last of the body's.
    for at_step in (4, 4, 7):
        train_until_killed(killed, at_step, monkeypatch)
    assert_same(killed, train(killed), whole, expected)
    assert len(expected.history) == 3


@pytest.mark.parametrize(("batch_size", "at_step"), [(8, 9), (40, 3)])
def test_a_training_with_few_steps_is_saved_by_the_clock_and_goes_on_to_the_bit(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch, batch_size: int, at_step: int
) -> None:
    # In the middle of an epoch, or where an epoch is a single step.
    monkeypatch.setattr(training_loop, "_SECONDS_BETWEEN_LOOKS", 0.0)
    phase = Phase(name="train", epochs=3, learning_rate=0.05)
    settings = {"checkpoint_steps": 1000, "batch_size": batch_size, "phases": (phase,)}
    whole = training_spec(tmp_path / "whole", rows, **settings)
    killed = training_spec(tmp_path / "killed", rows, **settings, checkpoint_minutes=1e-9)
    train_until_killed(killed, at_step, monkeypatch)
    newest, *_ = checkpoint_records(LocalStore(killed.workspace), RUN_ID)
    assert newest.step == at_step - 1
    assert_same(killed, train(killed), whole, train(whole))


def test_an_epoch_that_was_broken_off_took_the_seconds_before_and_after(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = Phase(name="train", epochs=2, learning_rate=0.05)
    spec = training_spec(tmp_path, rows, phases=(phase,), checkpoint_steps=3)
    with pytest.MonkeyPatch.context() as slow:
        # A clock that makes them hours.
        slow.setattr(training_meter, "time", SimpleNamespace(monotonic=lambda: 1e5 * time.monotonic()))
        train_until_killed(spec, 4, monkeypatch)
    newest, *_ = checkpoint_records(LocalStore(spec.workspace), RUN_ID)
    spent = Spent.model_validate(newest.details["spent"])
    first, second = train(spec).history
    assert 0 < spent.wait_s < spent.seconds
    assert 0 < first.seconds - spent.seconds < spent.seconds
    assert first.wait_s > spent.wait_s
    assert second.seconds < spent.seconds


def test_a_killed_distillation_ends_with_the_very_weights_of_one_that_was_not(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_NK = np.random.default_rng(0).normal(size=(40, 10)).astype(np.float16)
    specs = []
    for name in ("whole", "killed"):
        teacher = store_teacher(LocalStore(str(tmp_path / name)), logits_NK)
        specs.append(reuse_spec(tmp_path / name, rows, recipe=recipe(mixup_alpha=0.4), teacher=teacher))
    whole, killed = specs
    train_until_killed(killed, 8, monkeypatch)
    assert_same(killed, train(killed), whole, train(whole))


class PartnerWithoutImages(GroupOfOne):
    """As one worker sees a group of which another has none but rejects in every pass."""

    def total(self, values: Tensor) -> Tensor:
        return values if values.is_floating_point() else values + 1


def test_statistics_of_averaged_weights_are_those_of_passes_in_which_every_worker_has_images(
    tmp_path: Path, rows: pa.Table
) -> None:
    settings = {"recipe": recipe(averaging="swa", average_epochs=2)}
    means = {}
    for group in (GroupOfOne(), PartnerWithoutImages()):
        spec = reuse_spec(tmp_path / type(group).__name__, rows, **settings)
        # Of the new layers, which are trained in the last phase; a file of weights keeps no order.
        means[type(group)] = weights_of(spec, TrainingWorker(spec, group, None).run())[
            "convs.0.1.running_mean"
        ]
    assert means[GroupOfOne].abs().sum() > 0
    assert means[PartnerWithoutImages].abs().sum() == 0


def test_a_training_killed_before_its_first_checkpoint_begins_anew(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = (training_spec(tmp_path / name, rows) for name in ("whole", "killed"))
    train_until_killed(killed, 2, monkeypatch)
    assert_same(killed, train(killed), whole, train(whole))


def test_a_training_killed_while_it_writes_its_weights_writes_them_again(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KilledError

    settings = {"recipe": recipe(averaging="swa", average_epochs=2)}
    whole, killed = (reuse_spec(tmp_path / name, rows, **settings) for name in ("whole", "killed"))
    worker = TrainingWorker(killed, GroupOfOne(), None)
    with monkeypatch.context() as patched:
        patched.setattr(training_loop, "write_weights", die)
        with pytest.raises(KilledError):
            worker.run()
    assert_same(killed, train(killed), whole, train(whole))
    assert read_outcome(LocalStore(killed.workspace), RUN_ID) is not None


def test_a_damaged_checkpoint_costs_steps_and_changes_nothing(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = (
        reuse_spec(tmp_path / name, rows, recipe=recipe(averaging="ema")) for name in ("whole", "killed")
    )
    train_until_killed(killed, 9, monkeypatch)
    newest, before = checkpoint_records(LocalStore(killed.workspace), RUN_ID)
    path = Path(killed.workspace) / newest.key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    board = Notes()
    worker = TrainingWorker(killed, GroupOfOne(), board)
    assert board.notes[0].startswith(f"checkpoint of step {newest.step} cannot be used: ")
    assert board.notes[1] == f"going on from the checkpoint of step {before.step}"
    assert_same(killed, worker.run(), whole, train(whole))


def test_what_is_wrong_with_the_image_cache_is_told_once(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = CacheCounts(notes=Counter({"the disk is full": 7, "a file is damaged": 1}))
    monkeypatch.setattr(LocalImageCache, "counts", counts)
    options = LocalCacheOptions(folder=str(tmp_path / "images"), max_bytes=1 << 20)
    board = Notes()
    TrainingWorker(training_spec(tmp_path, rows, local_cache=options), GroupOfOne(), board).run()
    assert board.notes == [f"image cache of a node (local_cache): {reason}" for reason in counts.notes]


@pytest.mark.parametrize(("checkpoint_steps", "kept"), [(2, [15, 14, 12, 10, 8, 6, 4, 2]), (5, [15, 10, 5])])
def test_a_training_whose_checkpoints_cannot_be_deleted_goes_on_and_says_so_once(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch, checkpoint_steps: int, kept: list[int]
) -> None:
    """Also where only the last of them has a former one to delete."""

    def refuse(_store: LocalStore, keys: Iterable[str]) -> None:
        for key in keys:
            raise AccessDenied("no right to delete", where=key)

    monkeypatch.setattr(LocalStore, "delete", refuse)
    phase = Phase(name="train", epochs=3, learning_rate=0.05)
    spec = training_spec(tmp_path, rows, checkpoint_steps=checkpoint_steps, phases=(phase,))
    board = Notes()
    outcome = TrainingWorker(spec, GroupOfOne(), board).run()
    assert outcome.weights_key is not None
    assert [one.step for one in checkpoint_records(LocalStore(spec.workspace), RUN_ID)] == kept
    (note,) = board.notes
    assert "could not be deleted: no right to delete [" in note


class Notes:
    """Ray's handle of a board that keeps all events."""

    def __init__(self) -> None:
        self.events: list[TrainingEvent] = []
        self.post = self

    def remote(self, event: str) -> None:
        self.events.append(TrainingEvent.model_validate_json(event))

    @property
    def notes(self) -> list[str]:
        return [note for event in self.events for note in event.notes]


@pytest.mark.parametrize("averaging", WeightAveraging)
def test_a_training_that_diverges_says_where_and_keeps_finite_checkpoints(
    tmp_path: Path, rows: pa.Table, averaging: WeightAveraging
) -> None:
    spec = training_spec(
        tmp_path,
        rows,
        recipe=recipe(averaging=averaging),
        checkpoint_steps=1,
        phases=(
            Phase(name="calm", epochs=1, learning_rate=0.01),
            Phase(name="wild", epochs=3, learning_rate=1e30),
        ),
    )
    outcome = train(spec)
    assert outcome.weights_key is None
    assert outcome.diverged is not None
    # The two phases have an epoch and three.
    told = outcome.diverged
    assert (told.phase, told.epoch, told.num_epochs, told.num_steps) == ("wild", 2, 4, 5)
    assert [one.phase for one in outcome.history] == ["calm"]
    outcome.model_dump_json()
    store = LocalStore(spec.workspace)
    assert read_outcome(store, RUN_ID) is None
    records = checkpoint_records(store, RUN_ID)
    assert records
    network = build_network(spec.backbone)
    for record in records:
        PackedTraining(CheckpointFolder(store, RUN_ID).read(record)).load_network(network)
        assert is_finite(network)


@pytest.mark.parametrize(
    ("at_step", "found_at_step"),
    # By the loss of the next step; and, behind a step whose loss was a number, by the checkpoint that is due.
    [(7, 8), (9, 9)],
)
def test_a_weight_that_becomes_nan_in_a_phase_stops_it_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch, at_step: int, found_at_step: int
) -> None:
    phase = Phase(name="train", epochs=3, learning_rate=0.05)
    whole, spoilt = (training_spec(tmp_path / name, rows, phases=(phase,)) for name in ("whole", "spoilt"))
    worker = TrainingWorker(spoilt, GroupOfOne(), None)
    steps: list[int] = []
    injected: list[int] = []

    def spoil(point: CrashPoint) -> None:
        steps.append(len(steps) + 1)
        if len(steps) == at_step:
            with torch.no_grad():
                next(worker._network.parameters())[0] = torch.nan
            assert not is_finite(worker._network)
            injected.append(at_step)

    with monkeypatch.context() as patched:
        # The loss is looked at after every step.
        patched.setattr(training_loop, "_SECONDS_BETWEEN_LOOKS", 0.0)
        patched.setattr(training_loop, "crash_point", spoil)
        outcome = worker.run()
    assert (injected, len(steps)) == ([at_step], found_at_step)
    told = outcome.diverged
    assert told is not None
    assert (told.phase, told.epoch, told.step, outcome.weights_key) == ("train", 2, found_at_step - 5, None)
    # One was due at step 9, and is not there: the newest is the last good one.
    folder = CheckpointFolder(LocalStore(spoilt.workspace), RUN_ID)
    records = checkpoint_records(LocalStore(spoilt.workspace), RUN_ID)
    assert [record.step for record in records] == [6, 3]
    network = build_network(spoilt.backbone)
    for record in records:
        PackedTraining(folder.read(record)).load_network(network)
        assert is_finite(network)
    assert_same(spoilt, train(spoilt), whole, train(whole))


def test_an_update_that_only_validation_finds_to_be_too_large_ends_the_training(
    tmp_path: Path, rows: pa.Table
) -> None:
    # One step an epoch, so that its loss is that of the weights before it.
    phase = Phase(name="wild", epochs=2, learning_rate=1e22)
    outcome = train(training_spec(tmp_path, rows, batch_size=40, phases=(phase,), checkpoint_steps=100))
    assert outcome.diverged is not None
    assert outcome.weights_key is None
    assert all(one.val_nll is not None and one.val_nll < float("inf") for one in outcome.history)


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_a_weight_that_the_last_update_of_an_epoch_spoilt_is_told_of_that_epoch(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch, num_epochs: int
) -> None:
    """Only the checkpoint behind it finds that, when the position is already that of the next epoch or phase."""
    monkeypatch.setattr(training_checkpoints, "is_finite", lambda network: False)
    phase = Phase(name="wild", epochs=num_epochs, learning_rate=0.01)
    outcome = train(training_spec(tmp_path, rows, phases=(phase,), checkpoint_steps=5 * num_epochs))
    told = {"phase": "wild", "epoch": num_epochs, "num_epochs": num_epochs, "step": 5, "num_steps": 5}
    assert outcome.diverged is not None
    assert outcome.diverged.model_dump() == told


def test_a_phase_without_progress_ends_early_and_the_next_one_begins(tmp_path: Path, rows: pa.Table) -> None:
    tiny = 1e-12
    spec = training_spec(
        tmp_path,
        rows,
        recipe=recipe(patience_epochs=2),
        phases=(
            Phase(name="first", epochs=9, learning_rate=tiny),
            Phase(name="second", epochs=2, learning_rate=tiny),
        ),
    )
    board = Notes()
    outcome = TrainingWorker(spec, GroupOfOne(), board).run()
    # The first epoch is the best; two without a rise follow.
    assert [(one.phase, one.epoch, one.phase_epoch) for one in outcome.history] == [
        ("first", 1, 1),
        ("first", 2, 2),
        ("first", 3, 3),
        ("second", 10, 1),
        ("second", 11, 2),
    ]
    results = [event for event in board.events if event.result]
    assert [event.result for event in results] == list(outcome.history)
    assert [event.steps_left for event in results] == [50, 45, 10, 5, 0]


def test_a_training_that_goes_on_tells_the_epochs_before_its_checkpoint(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = reuse_spec(tmp_path, rows)
    train_until_killed(spec, 12, monkeypatch)
    board = Notes()
    outcome = TrainingWorker(spec, GroupOfOne(), board).run()
    assert len(board.events[0].history) == 2
    told = [*board.events[0].history, *(event.result for event in board.events if event.result)]
    assert told == list(outcome.history)


@pytest.mark.parametrize(
    ("seconds_between_looks", "told"),
    [(0.0, [(epoch, step) for epoch in range(1, 6) for step in range(1, 5)]), (1e9, [(1, 1), (5, 1)])],
)
def test_slow_steps_are_told_one_by_one_and_fast_ones_by_the_score(
    tmp_path: Path,
    rows: pa.Table,
    monkeypatch: pytest.MonkeyPatch,
    seconds_between_looks: float,
    told: list[tuple[int, int]],
) -> None:
    monkeypatch.setattr(training_loop, "_SECONDS_BETWEEN_LOOKS", seconds_between_looks)
    monkeypatch.setattr(training_board, "_SECONDS_BETWEEN_EVENTS", 0.0)
    phase = Phase(name="train", epochs=5, learning_rate=0.01)
    board = Notes()
    TrainingWorker(training_spec(tmp_path, rows, phases=(phase,)), GroupOfOne(), board).run()
    glimpses = [event for event in board.events if event.result is None]
    assert [(event.epoch, event.step) for event in glimpses] == told
    assert all(event.train_loss and event.seconds_left for event in glimpses)


class SecondOfTwo(GroupOfOne):
    """The second worker of a group whose first one adds 3 to every sum."""

    def total(self, values: Tensor) -> Tensor:
        return values + 3


def test_the_usable_images_of_an_update_are_those_of_all_workers() -> None:
    assert GroupOfOne().total_rows(4) == 4
    of_group = SecondOfTwo(rank=1, num_workers=2).total_rows(4)
    assert isinstance(of_group, Tensor)
    assert of_group.tolist() == 7


def test_when_to_look_and_when_to_save_is_the_word_of_the_first_worker(
    tmp_path: Path, rows: pa.Table
) -> None:
    second = SecondOfTwo(rank=1, num_workers=2)
    assert GroupOfOne().number_of_first(7) == 7
    assert second.number_of_first(7) == 3
    spec = training_spec(tmp_path, rows)
    store = LocalStore(spec.workspace)
    assert not TrainingCheckpoints(store, spec, GroupOfOne()).is_late()
    assert TrainingCheckpoints(store, spec, second).is_late()


def test_each_worker_of_a_resumed_training_reads_the_checkpoint_once(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = training_spec(tmp_path, rows)
    train_until_killed(spec, 9, monkeypatch)
    store, read = LocalStore(spec.workspace), CheckpointFolder.read
    was_read: list[CheckpointRecord] = []

    def note(folder: CheckpointFolder, record: CheckpointRecord) -> bytes:
        was_read.append(record)
        return read(folder, record)

    monkeypatch.setattr(CheckpointFolder, "read", note)
    first = TrainingCheckpoints(store, spec, GroupOfOne()).newest()
    (chosen,) = was_read
    monkeypatch.setattr(SecondOfTwo, "from_first", lambda *_: chosen.model_dump(mode="json"))
    second = TrainingCheckpoints(store, spec, SecondOfTwo(rank=1, num_workers=2)).newest()
    assert was_read == [chosen, chosen]
    assert first.tensors is not None
    assert second.tensors is not None
    assert second.position == first.position != Position()


def test_the_frozen_body_stays_and_after_a_resume_in_the_second_phase_it_trains(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = reuse_spec(tmp_path, rows, checkpoint_steps=2)
    store = LocalStore(spec.workspace)
    initial = read_state_dict(store.get(spec.initial_weights_key).data)

    def moved() -> set[str]:
        """The names of what differs from the initial weights in the newest checkpoint."""
        network = build_network(spec.backbone)
        loaded, _ = CheckpointFolder(store, RUN_ID).newest_intact()
        assert loaded is not None
        PackedTraining(loaded.data).load_network(network)
        return {name for name, one in network.state_dict().items() if not torch.equal(one, initial[name])}

    train_until_killed(spec, 6, monkeypatch)
    # The newest checkpoint is the end of the head's phase: body, new convolution and hidden layer were frozen.
    assert moved() == {"mlp.3.weight", "mlp.3.bias"}
    train_until_killed(spec, 6, monkeypatch)
    axis = depth_axis(spec.backbone, build_network(spec.backbone))
    trainable = {name for stage in axis.stages[1:] for name in stage.parameter_names}
    frozen = {name for stage in axis.stages[:1] for name in stage.parameter_names}
    found = moved()
    assert trainable <= found
    assert not frozen & found
    assert not any(name.startswith("body.bn1.") for name in found)
    outcome = train(spec)
    final = weights_of(spec, outcome)
    assert all(torch.equal(final[name], initial[name]) for name in frozen)
    assert [one.phase for one in outcome.history] == ["head", "body", "body"]


@pytest.mark.parametrize(
    ("first_px", "averaging", "expected"),
    [(None, "best", [2, 1, 0]), (24, "best", [1, 0]), (None, "swa", [1, 0]), (None, "soup", [1, 0])],
)
def test_keepers_are_told_how_many_epochs_are_left_over_all_phases_that_compare(
    tmp_path: Path,
    rows: pa.Table,
    monkeypatch: pytest.MonkeyPatch,
    first_px: int | None,
    averaging: str,
    expected: list[int],
) -> None:
    first, second = resolved(TWO_PHASES, REUSE)
    phases = (first.model_copy(update={"resolution_px": first_px}), second)
    told: list[int] = []

    class Watched(BestEpochs):
        def after_epoch(self, network: torch.nn.Module, *, score: float, epochs_left: int) -> None:
            told.append(epochs_left)

    monkeypatch.setattr(training_loop, "build_keeper", lambda _: Watched(0))
    train(reuse_spec(tmp_path, rows, phases=phases, recipe=recipe(averaging=averaging)))
    assert told == expected


def test_the_history_counts_every_image_and_its_losses_fall(tmp_path: Path, rows: pa.Table) -> None:
    spec = training_spec(
        tmp_path,
        rows,
        recipe=recipe(balance=Balance.WEIGHTS),
        class_weights=tuple(0.5 + label / 10 for label in range(10)),
        phases=(Phase(name="train", epochs=12, learning_rate=0.05),),
    )
    outcome = TrainingWorker(spec, GroupOfOne(), None).run()
    assert [one.images for one in outcome.history] == [40] * 12
    assert [one.rejects for one in outcome.history] == [0] * 12
    assert outcome.history[-1].train_loss < 0.9 * outcome.history[0].train_loss
    assert outcome.val_top1 == outcome.history[-1].val_top1
    assert outcome.val_nll == outcome.history[-1].val_nll
    assert [one.epoch for one in outcome.history] == list(range(1, 13))
    assert outcome == read_outcome(LocalStore(spec.workspace), RUN_ID)


def test_without_validation_rows_the_training_loss_ranks_epochs(tmp_path: Path, rows: pa.Table) -> None:
    spec = training_spec(tmp_path, rows, val=None, recipe=recipe(averaging="best"))
    outcome = train(spec)
    assert (outcome.val_nll, outcome.val_top1) == (None, None)
    assert all(one.val_nll is None and one.val_top1 is None for one in outcome.history)
    assert outcome.weights_key is not None


def test_phases_may_have_their_own_resolution(tmp_path: Path, rows: pa.Table) -> None:
    phases = (
        Phase(name="small", epochs=1, learning_rate=0.01, resolution_px=24),
        Phase(name="large", epochs=1, learning_rate=0.01),
    )
    outcome = train(reuse_spec(tmp_path, rows, phases=phases))
    assert [one.phase for one in outcome.history] == ["small", "large"]


def damage(rows: pa.Table, which: list[int], folder: Path, workspace: Path) -> pa.Table:
    """The rows again, after the files of some of them were cut off."""
    for row in which:
        path = Path(rows["uri"][row].as_py())
        path.write_bytes(path.read_bytes()[:150])
    return frozen_rows(workspace, folder)


def test_rejects_are_counted_once_and_named_by_the_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = digit_rows(tmp_path, NUM_IMAGES)
    rows = damage(rows, [1, 17], tmp_path / "images", tmp_path / "second")
    phase = Phase(name="train", epochs=1, learning_rate=0.01)
    spec = training_spec(tmp_path / "training", rows, checkpoint_steps=1, phases=(phase,))
    # What is left after the kill is the last step, so most rejects are known from the checkpoint alone.
    train_until_killed(spec, 5, monkeypatch)
    outcome = train(spec)
    assert outcome.reject_codes == {"truncated": 2}
    assert [(one.images, one.rejects) for one in outcome.history] == [(38, 2)]
    assert outcome.rejects_key is not None
    table = pq.read_table(Path(spec.workspace) / outcome.rejects_key)
    assert table["sample_id"].to_pylist() == [rows["sample_id"][row].as_py() for row in (1, 17)]


def test_images_that_cannot_be_used_take_nothing_from_an_update(tmp_path: Path) -> None:
    rows = digit_rows(tmp_path, 8)
    rows = damage(rows, [1, 4, 6], tmp_path / "images", tmp_path / "second")
    usable = rows.filter(pa.array([row not in (1, 4, 6) for row in range(8)]))
    phase = Phase(name="train", epochs=1, learning_rate=0.05)
    weights = []
    for name, some in (("all", rows), ("usable", usable)):
        spec = training_spec(tmp_path / name, rows, val=None, phases=(phase,), batch_size=some.num_rows)
        train_rows = store_rows(LocalStore(spec.workspace), "train", some)
        spec = spec.model_copy(update={"train": train_rows})
        weights.append(weights_of(spec, train(spec)))
    # The order of the images is another, and so is that of their sums.
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_a_training_without_a_single_usable_image_is_an_error(tmp_path: Path) -> None:
    rows = digit_rows(tmp_path, 10)
    rows = damage(rows, list(range(10)), tmp_path / "images", tmp_path / "second")
    spec = training_spec(tmp_path / "training", rows, batch_size=4)
    with pytest.raises(DataError, match="none of 8 training images could be used"):
        train(spec)


def test_how_fast_an_epoch_ran_does_not_depend_on_its_validation(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = TrainingWorker._validate

    def validate_slowly(self: TrainingWorker, *args: Any) -> tuple[float | None, float | None]:
        time.sleep(0.3)
        return validate(self, *args)

    monkeypatch.setattr(TrainingWorker, "_validate", validate_slowly)
    for one in train(training_spec(tmp_path, rows)).history:
        assert one.images_per_s == pytest.approx(one.images / one.seconds, rel=0.02)
