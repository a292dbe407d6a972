"""`convoy evaluate --compare`: two bundles on the same rows, and what their difference is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.metrics import EvaluationCounts
from convoy.core.progress import Progress
from convoy.core.statistics import (
    Interval,
    McNemarResult,
    bootstrap_difference,
    mcnemar_test,
    paired_rate_difference,
)
from convoy.pipelines.evaluate import EvaluateConfig, EvaluateReport, EvaluationSettings, open_evaluation
from convoy.pipelines.workspace import open_workspace
from convoy.storage.bundles import resolve_bundle
from convoy.storage.commits import read_manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import list_array, read_labelled
from convoy.storage.runs import RunFolder, require_run


class CompareConfig(EvaluationSettings):
    """Two bundles of the workspace, and the rows that both are measured on."""

    bundles: tuple[str, ...] = Field(min_length=2, max_length=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedRun:
    """A committed evaluation run: the model's classes in the order of its logits, and what its scores are."""

    run: str
    classes: Sequence[str]
    gives_probabilities: bool


class PairedComparison(StrictModel):
    """Two models on the labelled rows that both predicted; differences are the first's value less the second's.

    `only_first` and `only_second` count labelled rows that only one of them predicted: the other one's rejects.
    `agreement` is the share of pairs with the same predicted class, right or wrong. The NLLs are null unless
    both models give probabilities. Intervals are of 95 %: of the top-1 `paired_rate_difference`,
    of the NLL those of a paired bootstrap.
    """

    pairs: int
    only_first: int
    only_second: int
    top1: tuple[float, float]
    nll: tuple[float, float] | None
    agreement: float
    top1_difference: Interval
    nll_difference: Interval | None
    mcnemar: McNemarResult


class ComparedModel(StrictModel):
    """One side of a comparison; its rates are over all of its own rows, as its evaluation reports them."""

    bundle: str
    run: str
    samples: int
    rejects: int
    labelled: int
    top1: float
    nll: float | None


class Comparison(PairedComparison):
    """The paired comparison of two bundles, and the evaluations that it is made from.

    `unfetched` and `notes` are those of both together.
    """

    dataset: str
    splits: list[str]
    models: tuple[ComparedModel, ComparedModel]
    unfetched: int = 0
    notes: list[str] = Field(default_factory=list)
    within_error_budget: bool


def compare_bundles(config: CompareConfig, *, progress: Progress, new_run: bool = False) -> Comparison:
    """Evaluate both bundles, each by a run of its own, and compare their committed predictions row by row."""
    store = open_workspace(config.workspace, config.writers)
    # Resolved once: `latest` may move while the first one is evaluated.
    first, second = (str(resolve_bundle(store, reference)) for reference in config.bundles)
    shared = config.model_dump(exclude={"bundles"})
    # Both, before the first one computes for an hour.
    opened = [open_evaluation(EvaluateConfig(**shared, bundle=bundle)) for bundle in (first, second)]
    reports = [evaluation.run(progress=progress, new_run=new_run) for evaluation in opened]
    progress.stage("comparing")
    paired = compare_runs(store, _predicted_run(reports[0]), _predicted_run(reports[1]))
    return Comparison(
        **paired.model_dump(),
        dataset=config.dataset,
        splits=sorted(config.splits),
        models=(_compared_model(first, reports[0]), _compared_model(second, reports[1])),
        unfetched=sum(report.unfetched for report in reports),
        notes=list(dict.fromkeys(note for report in reports for note in report.notes)),
        within_error_budget=all(report.within_error_budget for report in reports),
    )


def compare_runs(store: ObjectStore, first: PredictedRun, second: PredictedRun) -> PairedComparison:
    """Pair the labelled predictions of two runs by sample id, classes by name.

    Holds a few columns of all rows in memory: the ids and some 14 bytes a row and run. Raises DataError for runs
    over other versions of a dataset, for a run that never published its predictions, and where no row can be
    paired.
    """
    _require_same_rows(store, first, second)
    index_of = {name: index for index, name in enumerate(dict.fromkeys([*first.classes, *second.classes]))}
    ids_first, all_first = _read_outcomes(store, first, index_of)
    ids_second, all_second = _read_outcomes(store, second, index_of)
    positions = pc.index_in(ids_first, value_set=ids_second)
    is_paired_N = positions.is_valid().to_numpy(zero_copy_only=False)
    num_pairs = int(is_paired_N.sum())
    if not num_pairs:
        raise DataError(
            "no labelled row was predicted by both models: there is nothing to compare",
            where=f"runs {first.run} and {second.run}",
            next_step="look at the rejects of both runs",
        )
    return _compare(
        all_first.take(is_paired_N),
        all_second.take(positions.drop_null().to_numpy()),
        only_first=len(ids_first) - num_pairs,
        only_second=len(ids_second) - num_pairs,
        gives_probabilities=first.gives_probabilities and second.gives_probabilities,
    )


def top1_difference(store: ObjectStore, first_run: str, second_run: str) -> Interval | None:
    """Top-1 of the first run less that of the second, on the labelled rows that both predicted; None without such.

    Each run's labels are in its own classes, so that the models may have others. Holds the ids of all rows in memory.
    """
    first, second = (_is_right_by_id(store, run) for run in (first_run, second_run))
    shared = [sample_id for sample_id in first if sample_id in second]
    if not shared:
        return None
    return paired_rate_difference(
        np.array([first[sample_id] for sample_id in shared]),
        np.array([second[sample_id] for sample_id in shared]),
    )


def _is_right_by_id(store: ObjectStore, run_id: str) -> dict[str, bool]:
    return {
        sample_id: label == predicted
        for table in labelled_parts(store, run_id, ["sample_id", "label", "pred"])
        for sample_id, label, predicted in zip(*(column.to_pylist() for column in table.columns), strict=True)
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Outcomes:
    """What became of some rows: predicted classes as indices that both runs share."""

    predicted_N: NDArray[np.int32]
    correct_N: NDArray[np.bool_]
    nll_N: NDArray[np.float32]

    def take(self, rows: NDArray[Any]) -> _Outcomes:
        """Some of the rows, chosen by a mask or in the order of indices."""
        return _Outcomes(self.predicted_N[rows], self.correct_N[rows], self.nll_N[rows])


def _compare(
    first: _Outcomes, second: _Outcomes, *, only_first: int, only_second: int, gives_probabilities: bool
) -> PairedComparison:
    """The comparison of the same rows in the same order."""
    nlls = (first.nll_N.mean(dtype=np.float64), second.nll_N.mean(dtype=np.float64))
    return PairedComparison(
        pairs=len(first.correct_N),
        only_first=only_first,
        only_second=only_second,
        top1=(float(first.correct_N.mean()), float(second.correct_N.mean())),
        nll=(float(nlls[0]), float(nlls[1])) if gives_probabilities else None,
        agreement=float((first.predicted_N == second.predicted_N).mean()),
        top1_difference=paired_rate_difference(first.correct_N, second.correct_N),
        nll_difference=bootstrap_difference(first.nll_N, second.nll_N) if gives_probabilities else None,
        mcnemar=mcnemar_test(first.correct_N, second.correct_N),
    )


def _read_outcomes(
    store: ObjectStore, run: PredictedRun, index_of: dict[str, int]
) -> tuple[pa.Array, _Outcomes]:
    """The ids and outcomes of the labelled rows; logits are in memory for one part at a time."""
    shared_index_K = np.array([index_of[name] for name in run.classes], np.int32)
    counts = EvaluationCounts(len(run.classes))
    # Large strings: the ids of all rows may be more than 2 GiB.
    ids = [pa.array([], pa.large_string())]
    predicted = [np.empty(0, np.int32)]
    for table in labelled_parts(store, run.run, ["sample_id", "label", "pred", "logits"]):
        counts.add(list_array(table["logits"]), table["label"].to_numpy())
        ids += table["sample_id"].cast(pa.large_string()).chunks
        predicted.append(shared_index_K[table["pred"].to_numpy()])
    rows = counts.row_outcomes()
    return pa.concat_arrays(ids), _Outcomes(np.concatenate(predicted), rows.correct1_N, rows.nll_N)


def labelled_parts(store: ObjectStore, run_id: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The labelled predictions of a run, a part at a time; DataError where it never published them."""
    manifest = read_manifest(RunFolder(store, run_id))
    if manifest is None:
        raise DataError(
            "the run has no published predictions",
            where=run_id,
            next_step="finish it: the same evaluation again",
        )
    return read_labelled(store, manifest, columns)


def _require_same_rows(store: ObjectStore, first: PredictedRun, second: PredictedRun) -> None:
    """Equal fingerprints mean equal ids, contents and labels."""
    versions = [
        {name: record.identity[name] for name in ("dataset_fingerprint", "splits")}
        for _, record in (require_run(store, run.run) for run in (first, second))
    ]
    if versions[0] != versions[1]:
        raise DataError(
            "the two models were not measured on the same rows",
            where=f"run {first.run} on {versions[0]}, run {second.run} on {versions[1]}",
            next_step="evaluate both again on the dataset as it is now",
        )


def _predicted_run(report: EvaluateReport) -> PredictedRun:
    return PredictedRun(run=report.run, classes=report.classes, gives_probabilities=report.nll is not None)


def _compared_model(bundle: str, report: EvaluateReport) -> ComparedModel:
    return ComparedModel(
        bundle=bundle,
        run=report.run,
        samples=report.samples,
        rejects=report.rejects,
        labelled=report.labelled,
        top1=report.top1,
        nll=report.nll,
    )
