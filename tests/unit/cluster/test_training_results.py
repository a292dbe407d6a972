from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from convoy.cluster import training_board
from convoy.cluster.image_loading import RejectedRow
from convoy.cluster.training_board import Board, BoardWriter
from convoy.cluster.training_checkpoints import Position
from convoy.cluster.training_results import (
    TrainingOutcome,
    read_outcome,
    write_train_rejects,
    write_weights,
)
from convoy.core.records import RejectCode, Stage
from convoy.core.training_events import TrainingEvent
from convoy.storage.local_store import LocalStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.weights import read_state_dict
from made_training import digit_rows

EVENT = TrainingEvent(
    run_id="run",
    phase="head",
    epoch=1,
    num_epochs=2,
    step=3,
    num_steps=5,
    steps_left=7,
    images_per_s=10.0,
    seconds_left=None,
    train_loss=0.5,
)


def test_of_two_attempts_that_come_to_the_end_the_first_counts(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    assert read_outcome(store, "run") is None
    networks = [
        build_network(BackboneConfig(arch="lenet5", weights="random", seed=seed)) for seed in range(2)
    ]
    first = write_weights(store, "run", networks[0], TrainingOutcome(val_top1=0.5))
    second = write_weights(store, "run", networks[1], TrainingOutcome(val_top1=0.9))
    assert first == second == read_outcome(store, "run")
    assert first.val_top1 == 0.5
    assert first.weights_key is not None
    state = read_state_dict(store.get(first.weights_key).data)
    assert all(torch.equal(state[name], one) for name, one in networks[0].state_dict().items())


def test_rejects_name_their_samples_and_no_rejects_make_no_file(tmp_path: Path) -> None:
    rows: pa.Table = digit_rows(tmp_path, 4)
    store = LocalStore(str(tmp_path / "workspace"))
    assert write_train_rejects(store, "run", rows, []) is None
    reject = RejectedRow(row=2, stage=Stage.DECODE, code=RejectCode.CORRUPT, reason="a hole")
    key = write_train_rejects(store, "run", rows, [reject])
    assert key is not None
    (found,) = pq.read_table(Path(store.uri(key))).to_pylist()
    sample = rows.slice(2, 1).to_pylist()[0]
    assert {name: found[name] for name in ("sample_id", "uri", "etag", "content_id")} == {
        name: sample[name] for name in ("sample_id", "uri", "etag", "content_id")
    }
    assert (found["stage"], found["code"], found["reason"]) == ("decode", "corrupt", "a hole")


class LocalBoard:
    """Ray's handle of a board, with the board in this process."""

    def __init__(self) -> None:
        self.board = Board()
        self.post = self

    def remote(self, event: str) -> None:
        self.board.post(event)


def test_glimpses_are_due_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(training_board.time, "monotonic", lambda: now_s[0])
    local = LocalBoard()
    writer = BoardWriter(local)
    due: list[Any] = []
    for seconds in (0.0, 0.4, 0.5, 0.2, 3.0):
        now_s[0] += seconds
        due.append(writer.is_due())
        if due[-1]:
            writer.post(EVENT)
    assert due == [True, False, False, True, True]
    assert [TrainingEvent.model_validate_json(one) for one in local.board.take()] == [EVENT] * 3
    assert local.board.take() == []


def test_results_are_posted_whenever_they_come_and_without_a_board_nothing_is() -> None:
    local = LocalBoard()
    writer = BoardWriter(local)
    writer.post(EVENT)
    writer.post(EVENT)
    assert len(local.board.take()) == 2
    silent = BoardWriter(None)
    assert not silent.is_due()
    silent.post(EVENT)


def test_positions_know_the_beginning_of_a_phase() -> None:
    position = Position(phase=1, epoch=2)
    assert position.at_step(7) == Position(phase=1, epoch=2, step=7)
    assert position.at_step(7).next_epoch() == Position(phase=1, epoch=3)
    assert Position(phase=1).begins_phase
    assert not position.begins_phase
    assert not Position(phase=1, step=1).begins_phase
