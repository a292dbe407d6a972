"""Classification metrics from counts: add logits in chunks of any size, summarise once.

Averages of batch averages are wrong as soon as batches differ in size, so nothing is divided before the end.
Every row counts once: sample weights belong to training, and a weighted row would no longer be a count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.statistics import Interval, wilson_interval

NUM_CALIBRATION_BINS = 15
TOP_K = 5

# Logits are widened to float64 some rows at a time: 8 MB a temporary array, whatever the caller's chunk.
_VALUES_PER_SLICE = 1 << 20


class ClassMetrics(StrictModel):
    """One class against the rest; a ratio is None where it is 0/0 (no row has the class, or none got it).

    `recall_interval` is Wilson's at 95 %; reports of an older Convoy have none.
    """

    label: int
    support: int
    num_predicted: int
    precision: float | None
    recall: float | None
    f1: float | None
    recall_interval: Interval | None = None


class ReliabilityBin(StrictModel):
    """Rows whose confidence lies in (low, high]: a point of the reliability diagram; None where empty."""

    low: float
    high: float
    num_rows: int
    accuracy: float | None
    mean_confidence: float | None


class Metrics(StrictModel):
    """What an evaluation reports. Rates are in [0, 1].

    `nll` is the mean negative log-likelihood in nats; `ece` the expected calibration error over 15 bins of
    equal width (Guo et al. 2017, eq. 3); `brier` the squared distance to the one-hot label, summed over
    classes as in Brier (1950), so in [0, 2]. `top5` is 1 where there are five classes or fewer.
    """

    num_rows: int
    num_classes: int
    top1: float
    top5: float
    nll: float
    ece: float
    brier: float
    per_class: tuple[ClassMetrics, ...]
    reliability: tuple[ReliabilityBin, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowOutcomes:
    """What a bootstrap needs of each row, in the order the rows were added. The counts keep 14 bytes a row.

    `calibration_gap` is 1 or 0, for right or wrong, less the confidence; `calibration_bin` the bin that this is in.
    """

    correct1_N: NDArray[np.bool_]
    correct5_N: NDArray[np.bool_]
    nll_N: NDArray[np.float32]
    brier_N: NDArray[np.float32]
    calibration_gap_N: NDArray[np.float32]
    calibration_bin_N: NDArray[np.uint8]


class EvaluationCounts:
    """Counts of an evaluation, added up over chunks and workers.

    Ties: of equal scores the lower class index ranks first, for top-1 and for top-5 alike, so that top-1 is
    exactly NumPy's argmax and a constant classifier gains nothing from its ties.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise DataError("an evaluation needs at least one class", where=f"num_classes={num_classes}")
        self.num_classes = num_classes
        self.num_rows = 0
        # Rows are true classes, columns predicted ones.
        self.confusion_KK: NDArray[np.int64] = np.zeros((num_classes, num_classes), np.int64)
        self._num_correct5 = 0
        self._nll_sum = 0.0
        self._brier_sum = 0.0
        self._bin_rows = np.zeros(NUM_CALIBRATION_BINS, np.int64)
        self._bin_correct = np.zeros(NUM_CALIBRATION_BINS, np.int64)
        self._bin_confidence_sum = np.zeros(NUM_CALIBRATION_BINS, np.float64)
        self._hits: list[NDArray[np.uint8]] = []  # bit 0: top-1, bit 1: top-5
        self._nlls: list[NDArray[np.float32]] = []
        self._briers: list[NDArray[np.float32]] = []
        self._gaps: list[NDArray[np.float32]] = []
        self._bins: list[NDArray[np.uint8]] = []

    def add(self, logits_BK: NDArray[Any], labels_B: NDArray[Any]) -> None:
        """Count a chunk of rows.

        Raises DataError, with nothing counted, for a wrong shape, a label that is no class, or a logit that
        is not finite.
        """
        logits_BK, labels_B = np.asarray(logits_BK), np.asarray(labels_B)
        self._check(logits_BK, labels_B)
        rows_per_slice = max(1, _VALUES_PER_SLICE // self.num_classes)
        for start in range(0, len(labels_B), rows_per_slice):
            rows = slice(start, start + rows_per_slice)
            self._add_slice(logits_BK[rows].astype(np.float64), labels_B[rows].astype(np.int64))

    def summary(self) -> Metrics:
        """The metrics of all rows so far; DataError if there are none."""
        if self.num_rows == 0:
            raise DataError("an evaluation without rows has no metrics", next_step="check the split's filter")
        gaps = np.abs(self._bin_correct - self._bin_confidence_sum)
        return Metrics(
            num_rows=self.num_rows,
            num_classes=self.num_classes,
            top1=int(np.trace(self.confusion_KK)) / self.num_rows,
            top5=self._num_correct5 / self.num_rows,
            nll=self._nll_sum / self.num_rows,
            ece=float(gaps.sum()) / self.num_rows,
            brier=self._brier_sum / self.num_rows,
            per_class=tuple(self._class_metrics()),
            reliability=tuple(self._reliability()),
        )

    def row_outcomes(self) -> RowOutcomes:
        """The outcome of each row, in the order the rows were added and merged."""
        hits = np.concatenate([*self._hits, np.empty(0, np.uint8)])
        return RowOutcomes(
            correct1_N=(hits & 1).astype(np.bool_),
            correct5_N=(hits & 2).astype(np.bool_),
            nll_N=np.concatenate([*self._nlls, np.empty(0, np.float32)]),
            brier_N=np.concatenate([*self._briers, np.empty(0, np.float32)]),
            calibration_gap_N=np.concatenate([*self._gaps, np.empty(0, np.float32)]),
            calibration_bin_N=np.concatenate([*self._bins, np.empty(0, np.uint8)]),
        )

    def _check(self, logits_BK: NDArray[Any], labels_B: NDArray[Any]) -> None:
        if logits_BK.shape != (*labels_B.shape, self.num_classes) or labels_B.ndim != 1:
            raise DataError(
                f"logits {logits_BK.shape} and labels {labels_B.shape} do not fit {self.num_classes} classes",
                next_step="check that the model and the dataset have the same classes",
            )
        if not np.issubdtype(labels_B.dtype, np.integer):
            raise DataError("labels must be integers", where=f"dtype {labels_B.dtype}")
        outside = np.flatnonzero((labels_B < 0) | (labels_B >= self.num_classes))
        if outside.size:
            raise DataError(
                f"{outside.size} labels are outside 0..{self.num_classes - 1}",
                where=f"row {outside[0]} of the chunk, label {labels_B[outside[0]]}",
                next_step="evaluate labelled rows only, with the classes of the model",
            )
        broken = np.flatnonzero(~np.isfinite(logits_BK).all(axis=1))
        if broken.size:
            raise DataError(f"{broken.size} rows have logits that are not finite", where=f"row {broken[0]}")

    def _add_slice(self, logits_BK: NDArray[np.float64], labels_B: NDArray[np.int64]) -> None:
        rows_B = np.arange(len(labels_B))
        predicted_B = logits_BK.argmax(axis=1)
        top5_B = _label_ranks(logits_BK, labels_B) < TOP_K
        log_probabilities_BK = _log_softmax(logits_BK)
        nll_B = -log_probabilities_BK[rows_B, labels_B]
        probabilities_BK = np.exp(log_probabilities_BK)
        self._add_calibration(probabilities_BK[rows_B, predicted_B], predicted_B == labels_B)
        probabilities_BK[rows_B, labels_B] -= 1.0
        brier_B = np.square(probabilities_BK).sum(axis=1)
        self.num_rows += len(labels_B)
        np.add.at(self.confusion_KK, (labels_B, predicted_B), 1)
        self._num_correct5 += int(top5_B.sum())
        self._nll_sum += float(nll_B.sum())
        self._brier_sum += float(brier_B.sum())
        self._hits.append((predicted_B == labels_B).astype(np.uint8) | (top5_B.astype(np.uint8) << 1))
        self._nlls.append(nll_B.astype(np.float32))
        self._briers.append(brier_B.astype(np.float32))

    def _add_calibration(self, confidence_B: NDArray[np.float64], correct_B: NDArray[np.bool_]) -> None:
        bins_B = np.searchsorted(_bin_edges()[1:-1], confidence_B, side="left")
        self._bin_rows += np.bincount(bins_B, minlength=NUM_CALIBRATION_BINS)
        self._bin_correct += np.bincount(bins_B[correct_B], minlength=NUM_CALIBRATION_BINS)
        self._bin_confidence_sum += np.bincount(bins_B, confidence_B, minlength=NUM_CALIBRATION_BINS)
        self._gaps.append((correct_B - confidence_B).astype(np.float32))
        self._bins.append(bins_B.astype(np.uint8))

    def _class_metrics(self) -> Iterator[ClassMetrics]:
        hits_K = self.confusion_KK.diagonal().tolist()
        support_K = self.confusion_KK.sum(axis=1).tolist()
        predicted_K = self.confusion_KK.sum(axis=0).tolist()
        for label, (hits, support, predicted) in enumerate(zip(hits_K, support_K, predicted_K, strict=True)):
            yield ClassMetrics(
                label=label,
                support=support,
                num_predicted=predicted,
                precision=_ratio(hits, predicted),
                recall=_ratio(hits, support),
                f1=_ratio(2 * hits, support + predicted),
                recall_interval=wilson_interval(hits, support) if support else None,
            )

    def _reliability(self) -> Iterator[ReliabilityBin]:
        edges = _bin_edges().tolist()
        for index, num_rows in enumerate(self._bin_rows.tolist()):
            yield ReliabilityBin(
                low=edges[index],
                high=edges[index + 1],
                num_rows=num_rows,
                accuracy=_ratio(int(self._bin_correct[index]), num_rows),
                mean_confidence=_ratio(float(self._bin_confidence_sum[index]), num_rows),
            )


def _label_ranks(logits_BK: NDArray[np.float64], labels_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes rank before the label: larger scores, and equal scores of lower index."""
    own_B1 = np.take_along_axis(logits_BK, labels_B[:, None], axis=1)
    lower_index_BK = np.arange(logits_BK.shape[1]) < labels_B[:, None]
    before_BK = (logits_BK > own_B1) | ((logits_BK == own_B1) & lower_index_BK)
    return np.asarray(before_BK.sum(axis=1))


def _log_softmax(logits_BK: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted_BK = logits_BK - logits_BK.max(axis=1, keepdims=True)
    return np.asarray(shifted_BK - np.log(np.exp(shifted_BK).sum(axis=1, keepdims=True)))


def _bin_edges() -> NDArray[np.float64]:
    return np.arange(NUM_CALIBRATION_BINS + 1) / NUM_CALIBRATION_BINS


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None
