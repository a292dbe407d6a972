"""What a training leaves in its run folder: weights, rejects, and one record that makes the weights count."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import pyarrow as pa
from pydantic import Field
from torch import nn

from convoy.cluster.image_loading import RejectedRow
from convoy.core.config import StrictModel
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.errors import PreconditionFailed
from convoy.core.fingerprints import canonical_json
from convoy.core.records import Reject
from convoy.core.training_events import EpochResult
from convoy.storage.documents import read_model
from convoy.storage.object_store import ObjectStore, put_looking_first
from convoy.storage.parts import write_rejects
from convoy.storage.runs import RunFolder
from convoy.vision.weights import state_to_safetensors

TRAINED_FILE = "trained.json"


class StepTaken(StrictModel):
    """A step of a training as its progress names it: all numbers count from 1, `epoch` over all phases."""

    phase: str
    epoch: int
    num_epochs: int
    step: int
    num_steps: int


class TrainingOutcome(StrictModel):
    """The end of a training. With `diverged`, the step behind which something was no number, there are no weights.

    `val_nll` and `val_top1` are those of the weights that were kept, `val_rejects` the validation images that could
    not be used, `reject_codes` those to train on. Reject tables that no outcome names are
    those of attempts that came second or were killed.
    """

    weights_key: str | None = None
    rejects_key: str | None = None
    diverged: StepTaken | None = None
    history: tuple[EpochResult, ...] = ()
    val_nll: float | None = None
    val_top1: float | None = None
    val_rejects: int = 0
    reject_codes: dict[str, int] = Field(default_factory=dict)


def read_outcome(store: ObjectStore, run_id: str) -> TrainingOutcome | None:
    """The outcome of a run whose training has ended, or None."""
    return read_model(TrainingOutcome, store, RunFolder(store, run_id).key(TRAINED_FILE))


def write_weights(
    store: ObjectStore, run_id: str, network: nn.Module, outcome: TrainingOutcome
) -> TrainingOutcome:
    """Write the weights, then the record; of two attempts that both came to the end, the first counts."""
    folder = RunFolder(store, run_id)
    key = folder.key(f"trained-{secrets.token_hex(4)}.safetensors")
    store.put(key, state_to_safetensors(network.state_dict()))
    crash_point(CrashPoint.WEIGHTS_WRITTEN)
    outcome = outcome.model_copy(update={"weights_key": key})
    try:
        put_looking_first(store, folder.key(TRAINED_FILE), canonical_json(outcome))
    except PreconditionFailed:
        return read_outcome(store, run_id) or outcome
    crash_point(CrashPoint.TRAINING_RECORDED)
    return outcome


def write_train_rejects(
    store: ObjectStore, run_id: str, train: pa.Table, rejects: Iterable[RejectedRow]
) -> str | None:
    """Write the rows of the training split that could not be used, and return the key; None if all could."""
    rows = []
    for one in rejects:
        columns = ["sample_id", "uri", "etag", "content_id"]
        (sample,) = train.slice(one.row, 1).select(columns).to_pylist()
        rows.append(Reject(**sample, stage=one.stage, code=one.code, reason=one.reason))
    if not rows:
        return None
    attempt = secrets.token_hex(4)
    key = RunFolder(store, run_id).key(f"rejects/train-{attempt}.parquet")
    write_rejects(store, key, rows, attempt, run_id)
    return key
