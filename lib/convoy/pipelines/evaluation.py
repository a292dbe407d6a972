"""The step that train and evaluate share: commit predictions, then measure from the committed rows alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from convoy.core.config import StrictModel
from convoy.core.errors import DataError, ErrorBudgetExceeded
from convoy.core.metrics import ClassMetrics, EvaluationCounts, ReliabilityBin
from convoy.core.progress import Progress
from convoy.core.records import Split, codes_in_words
from convoy.core.statistics import (
    Interval,
    bootstrap_calibration_error,
    bootstrap_mean,
    wilson_interval,
)
from convoy.pipelines.classifiers import Classifier
from convoy.pipelines.feature_plan import ExtractionConfig, FeatureRequest
from convoy.pipelines.feature_summary import slice_totals
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.predictions import PredictionJob
from convoy.pipelines.training_rows import has_labels
from convoy.storage.commits import RunManifest, finish
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import list_array, read_labelled

# Of so many classes a matrix is 2 MB of JSON, of ten times as many 200 MB, nearly all of it zeros.
_MAX_MATRIX_CLASSES = 1000


class NamedClass(ClassMetrics):
    """Per-class metrics with the class's name."""

    name: str


class Evaluation(StrictModel):
    """What a classifier is worth on some splits. Rates are in 0..1; every labelled sample counts once.

    `nll`, `brier` (0..2), `ece` and `reliability` are null for heads whose scores are no probabilities.
    `intervals` are 95 %: bootstrap percentiles, and Wilson's for top-1 beside it, which stays honest near 0 and 1.
    `confusion` has a row for each true class. Above 1,000 classes it is null, and `confusion_entries` are its entries
    above 0: true class, predicted class, rows. `rows` says in words what was measured on where a training did it, of
    which that may be one fold of a split.
    """

    run: str
    cache_run: str | None
    splits: list[str]
    model_digest: str
    samples: int
    results: int
    rejects: int
    labelled: int
    top1: float
    top5: float
    nll: float | None
    brier: float | None
    ece: float | None
    intervals: dict[str, Interval]
    per_class: list[NamedClass]
    reliability: list[ReliabilityBin] | None
    classes: list[str]
    confusion: list[list[int]] | None
    confusion_entries: list[tuple[int, int, int]] | None = None
    rows: str | None = None

    @property
    def measured_on(self) -> str:
        """The rows in words: the splits, or the fold of one."""
        return self.rows or ", ".join(self.splits)

    def confused(self) -> Iterator[tuple[int, int, int]]:
        """True class, predicted class and rows of each entry of the confusion matrix above 0."""
        if self.confusion is None:
            yield from self.confusion_entries or ()
            return
        for label, row in enumerate(self.confusion):
            yield from ((label, pred, num_rows) for pred, num_rows in enumerate(row) if num_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTask:
    """A classifier and the samples to measure it on. `config` is kept in the run record, for people.

    `rows` are labelled rows of the manifest that are measured instead of whole splits.
    """

    classifier: Classifier
    model_digest: str
    dataset: str
    splits: tuple[Split, ...]
    extraction: ExtractionConfig
    config: dict[str, Any]
    rows: pa.Table | None = None


def evaluate_classifier(
    store: ObjectStore, manifest: Manifest, task: EvaluationTask, *, progress: Progress, new_run: bool = False
) -> Evaluation:
    """Features where they are missing, predictions of every sample, and the metrics of the labelled ones."""
    require_labels(manifest, task.splits)
    classifier = task.classifier
    request = FeatureRequest(
        dataset=task.dataset,
        splits=task.splits,
        backbone=classifier.backbone.config,
        taps=(classifier.tap,),
    )
    features = FeatureJob(store, manifest, classifier.backbone, request, task.extraction, rows=task.rows)
    # Made before the features are computed: it refuses classes that do not match.
    job = PredictionJob(
        store,
        manifest,
        classifier,
        model_digest=task.model_digest,
        set_id=features.set_id(classifier.tap),
        rows=task.rows,
    )
    summary = features.ensure(progress=progress, new_run=new_run)
    progress.stage("predicting")
    folder, run_manifest, open_run = job.commit(task.dataset, task.splits, task.config, new_run=new_run)
    try:
        evaluation = measure_predictions(
            store,
            run_manifest,
            classes=classifier.classes,
            gives_probabilities=classifier.gives_probabilities,
            splits=task.splits,
            model_digest=task.model_digest,
            cache_run=summary.run,
        )
    except ErrorBudgetExceeded:
        # It would be gone on with, and say the same for ever, whatever becomes of the images.
        open_run.close(folder)
        raise
    finish(folder, evaluation.model_dump(mode="json"))
    open_run.close(folder)
    return evaluation


def require_labels(manifest: Manifest, splits: Collection[Split]) -> None:
    """Raise DataError where one of the splits is not there, or no sample of theirs has a label."""
    if absent := sorted(set(splits) - set(manifest.counts)):
        raise DataError(
            f"there is no split {', '.join(absent)}: the dataset has {', '.join(sorted(manifest.counts))}",
            where=manifest.uri,
            next_step="choose among the splits that are there with --set splits=[...]",
        )
    if not any(has_labels(manifest, split) for split in splits):
        raise DataError(
            f"no labelled sample in split {', '.join(sorted(splits))}: nothing could be measured",
            where=manifest.uri,
            next_step="label the dataset, or choose another split with --set splits=[...]",
        )


def measure_predictions(
    store: ObjectStore,
    manifest: RunManifest,
    *,
    classes: Sequence[str],
    gives_probabilities: bool,
    splits: Collection[Split],
    model_digest: str,
    cache_run: str | None = None,
) -> Evaluation:
    """The metrics of a committed run's predictions, from its parts alone.

    Raises ErrorBudgetExceeded where no labelled sample has one.
    """
    counts = EvaluationCounts(len(classes))
    for table in read_labelled(store, manifest, ["label", "logits"]):
        counts.add(list_array(table["logits"]), table["label"].to_numpy())
    if not counts.num_rows:
        codes = codes_in_words(slice_totals(manifest.slices)["reject_codes"])
        raise ErrorBudgetExceeded(
            f"no labelled image has a result, so nothing can be measured: {codes}",
            where=f"run {manifest.run_id}",
            next_step="see to the images (`convoy report RUN` shows the rejects), then run the same command again,"
            " with --new-run where it says the same",
        )
    metrics = counts.summary()
    rows = counts.row_outcomes()
    intervals = {
        "top1": bootstrap_mean(rows.correct1_N),
        "top1_wilson": wilson_interval(int(rows.correct1_N.sum()), len(rows.correct1_N)),
        "top5": bootstrap_mean(rows.correct5_N),
    }
    if gives_probabilities:
        intervals |= {
            "nll": bootstrap_mean(rows.nll_N),
            "brier": bootstrap_mean(rows.brier_N),
            "ece": bootstrap_calibration_error(rows.calibration_gap_N, rows.calibration_bin_N),
        }
    return Evaluation(
        run=manifest.run_id,
        cache_run=cache_run,
        splits=sorted(splits),
        model_digest=model_digest,
        samples=manifest.num_results + manifest.num_rejects,
        results=manifest.num_results,
        rejects=manifest.num_rejects,
        labelled=metrics.num_rows,
        top1=metrics.top1,
        top5=metrics.top5,
        nll=metrics.nll if gives_probabilities else None,
        brier=metrics.brier if gives_probabilities else None,
        ece=metrics.ece if gives_probabilities else None,
        intervals=intervals,
        per_class=[
            NamedClass(name=name, **row.model_dump())
            for name, row in zip(classes, metrics.per_class, strict=True)
            if row.support or row.num_predicted
        ],
        reliability=list(metrics.reliability) if gives_probabilities else None,
        classes=list(classes),
        **confusion_fields(counts.confusion_KK),
    )


def confusion_fields(confusion_KK: np.ndarray) -> dict[str, Any]:
    """What an evaluation keeps of a confusion matrix: all of it, or the entries above 0 where it is large."""
    if len(confusion_KK) <= _MAX_MATRIX_CLASSES:
        return {"confusion": confusion_KK.tolist()}
    places = np.nonzero(confusion_KK)
    return {
        "confusion": None,
        "confusion_entries": np.stack([*places, confusion_KK[places]], axis=1).tolist(),
    }
