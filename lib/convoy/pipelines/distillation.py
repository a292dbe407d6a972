"""The teacher of a training: which bundle, and what it says of the training rows.

The teacher, a model or an ensemble, sees each image once, as in evaluation; its predictions are a committed run,
which every training of the same rows shares. The student sees the image augmented and learns what was said of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from convoy.core.errors import ConfigError, DataError
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.pipelines.classifiers import class_indices
from convoy.pipelines.committee_predictions import CommitteeJob, CommitteePredictions
from convoy.pipelines.committees import open_committee
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.pipelines.train_config import NETWORKS, TrainConfig
from convoy.pipelines.training_rows import class_weights, read_split, weigh_classes
from convoy.storage.bundles import peek_bundle, resolve_bundle
from convoy.storage.leases import WhenHeld
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.parts import read_rejects
from convoy.storage.predictions import PREDICTIONS, list_array
from convoy.storage.registry import ALIASES
from convoy.storage.runs import OpenRun
from convoy.vision.training_config import Balance


@dataclass(frozen=True, slots=True, kw_only=True)
class TaughtRows:
    """The rows that a training learns from, and what its teacher says of each, if it has one.

    `teacher_logits_NK` are over the dataset's classes, in the order of the rows, and 0 for the likeliest class.
    `reject_codes` count the training rows that the teacher could not use, which are left out.
    """

    rows: pa.Table
    teacher_logits_NK: NDArray[np.float16] | None = None
    reject_codes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def balanced(self, balance: Balance, classes: Sequence[str]) -> TaughtRows:
        """The rows for a fit, which sees all at once: rare classes drawn more often come to the same as weights."""
        if balance is Balance.NONE:
            return self
        return self.weighted_by_class(class_weights(weigh_classes(self.rows, classes)))

    def weighted_by_class(self, weights_K: Sequence[float]) -> TaughtRows:
        """The same rows, each counting by the weight of its class beside its own."""
        rows = self.rows.combine_chunks()
        weights_N = rows["weight"].to_numpy() * np.asarray(weights_K, np.float32)[rows["label"].to_numpy()]
        place = rows.schema.get_field_index("weight")
        column = rows.schema.field(place)
        return replace(self, rows=rows.set_column(place, column, pa.array(weights_N, column.type)))


def with_pinned_teacher(store: ObjectStore, manifest: Manifest, config: TrainConfig) -> TrainConfig:
    """The config with its teacher named by digest, so that a newer bundle of the name makes it another training.

    Raises DataError for a teacher that does not exist, ConfigError for one that lacks a class of the dataset.
    """
    if config.distill is None:
        return config
    teacher = pinned_teacher(store, manifest, config.distill.teacher)
    return config.model_copy(update={"distill": config.distill.model_copy(update={"teacher": teacher})})


def with_begun_teacher(
    config: TrainConfig, open_run: OpenRun, *, new_run: bool = False
) -> tuple[TrainConfig, list[str]]:
    """The config with the teacher that its unfinished training began with, and a note.

    A bare name, or an alias, may mean another bundle by now; a digest means what it says.
    """
    distill = config.distill
    if distill is None or config.strategy not in NETWORKS or open_run.begins_anew(new_run):
        return config, []
    record = open_run.begun_with({"dataset": config.dataset})
    if record is None:
        return config, []
    begun = (record.config.get("distill") or {}).get("teacher", "")
    name, _, wanted = distill.teacher.partition("@")
    if not begun.startswith(f"{name}@") or wanted not in {"", *ALIASES}:
        return config, []
    note = (
        f"an unfinished training goes on, with its teacher {begun}; once it has ended, the same command asks the one"
        f" that {distill.teacher} means then"
    )
    return config.model_copy(update={"distill": distill.model_copy(update={"teacher": begun})}), [note]


def pinned_teacher(store: ObjectStore, manifest: Manifest, teacher: str) -> str:
    """The bundle that the name of a teacher means now, by digest; the errors are those of `with_pinned_teacher`."""
    ref = resolve_bundle(store, teacher)
    known = peek_bundle(store, ref).read_json("classes.json")
    class_indices(
        manifest.classes,
        known,
        model="the teacher",
        where="distill.teacher",
        next_step="choose a teacher that was trained on a dataset with these classes",
    )
    return str(ref)


def taught_rows(
    store: ObjectStore, manifest: Manifest, config: TrainConfig, rows: pa.Table, *, progress: Progress
) -> TaughtRows:
    """The training rows of the config, with the teacher's logits; what it has not predicted yet, it predicts now.

    Memory: 2 bytes a row and class beside the rows. Raises ConfigError for a teacher whose scores are no
    probabilities, DataError where it could use none of the rows.
    """
    if config.distill is None:
        return TaughtRows(rows=rows)
    progress.stage("asking the teacher")
    committee = open_committee(store, config.distill.teacher)
    if not committee.gives_probabilities:
        raise ConfigError(
            "the scores of the teacher are margins of a linear SVM, no probabilities",
            where="distill.teacher",
            next_step="choose a teacher with a softmax head",
        )
    request = PredictionRequest(
        committee=committee,
        dataset=config.dataset,
        splits=(Split.TRAIN,),
        extraction=config.extraction,
        # Those of all folds, so that their trainings share one run.
        rows=read_split(manifest, Split.TRAIN, config.rows.without_fold),
        local_cache=config.local_cache.options,
    )
    job = CommitteeJob(store, manifest, request)
    # A training beside this one may be asking the same.
    predictions = job.ensure(
        progress=progress, config=config.model_dump(mode="json"), when_held=WhenHeld.WAIT
    )
    ids, logits_NK = _read_logits(store, predictions, class_indices(manifest.classes, committee.classes))
    places = pc.index_in(rows["sample_id"].cast(pa.large_string()).combine_chunks(), value_set=ids)
    taught = rows.filter(places.is_valid())
    if not taught.num_rows:
        raise DataError(
            f"the teacher could use none of {rows.num_rows} training images",
            where=f"runs/{predictions.run_id}",
            next_step="see the rejects of that run",
        )
    return TaughtRows(
        rows=taught,
        teacher_logits_NK=logits_NK[places.drop_null().to_numpy()],
        reject_codes=_reject_codes(store, predictions, rows.filter(places.is_null())),
        notes=_notes(config, predictions, rows.num_rows - taught.num_rows),
    )


def _read_logits(
    store: ObjectStore, predictions: CommitteePredictions, class_of_label: list[int]
) -> tuple[pa.Array, NDArray[np.float16]]:
    """The ids of all predicted rows, and their logits over the dataset's classes."""
    ids: list[pa.Array] = []
    logits = [np.empty((0, len(class_of_label)), np.float16)]
    for record in predictions.manifest.slices:
        table = store.open_parquet(record.parts[PREDICTIONS].key).read(columns=["sample_id", "logits"])
        if table.num_rows:
            ids += table["sample_id"].cast(pa.large_string()).chunks
            logits_BK = list_array(table["logits"])[:, class_of_label]
            # Near 0, where a softmax is decided, float16 is finest.
            logits.append((logits_BK - logits_BK.max(axis=1, keepdims=True)).astype(np.float16))
    return pa.chunked_array(ids, pa.large_string()).combine_chunks(), np.concatenate(logits)


def _reject_codes(
    store: ObjectStore, predictions: CommitteePredictions, left_out: pa.Table
) -> dict[str, int]:
    rejects = read_rejects(store, predictions.manifest)
    mine = pc.is_in(rejects["sample_id"], value_set=left_out["sample_id"].combine_chunks())
    return dict(Counter(rejects.filter(mine)["code"].to_pylist()))


def _notes(config: TrainConfig, predictions: CommitteePredictions, num_left_out: int) -> tuple[str, ...]:
    if config.distill is None:
        return ()
    distill = config.distill
    how = (
        f"distilled from {distill.teacher} at temperature {distill.temperature:g}, weight {distill.weight:g}"
    )
    run = f"runs/{predictions.run_id}"
    left_out = f"{num_left_out} training images are left out: the teacher could not use them ({run})"
    return (how, left_out) if num_left_out else (how,)
