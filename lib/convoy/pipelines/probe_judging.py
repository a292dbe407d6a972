"""Linear probes as a measuring instrument: fitted on cached features, judged on rows that did not choose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from convoy.core.errors import DataError
from convoy.core.records import Split
from convoy.pipelines.feature_source import LabelledRows, gather_features, open_features
from convoy.pipelines.natural_sample import natural_rows
from convoy.pipelines.training_rows import (
    Fold,
    RowLimit,
    count_classes,
    read_split,
    validation_rows,
)
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.manifests import Manifest
from convoy.vision.head_config import HeadConfig, Selection
from convoy.vision.head_fitting import choose_head, fit_path
from convoy.vision.heads import Head, TensorFeatures

# A fifth of the training rows judges where the split `val` cannot.
JUDGING_FOLD = Fold(index=0, count=5)
# Fewer rows tell no difference.
LEAST_JUDGED = 50
# What is said of a row that could not be read.
UNKNOWN = -1


def can_judge(manifest: Manifest, least_judged: int) -> bool:
    """Whether the split `val` has enough labelled rows to judge by, and of more than one class."""
    val = manifest.counts.get(Split.VAL)
    by_class = [] if val is None else val.by_class
    return sum(by_class) >= least_judged and sum(count > 0 for count in by_class) > 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProbeRows:
    """The rows that probes learn from, and those that judge them, also as tables for a FeatureJob."""

    limit: RowLimit
    train: LabelledRows
    judged: LabelledRows
    train_table: pa.Table
    judged_table: pa.Table

    @property
    def table(self) -> pa.Table:
        """All of them, in the order of the manifest."""
        return pa.concat_tables([self.train_table, self.judged_table]).sort_by("sample_id")

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        limit: RowLimit,
        *,
        least_judged: int = LEAST_JUDGED,
        max_judged: int | None = None,
    ) -> ProbeRows:
        """The training rows of a limit, and those of its fold, or of a `val` that can judge, or of a fold made here.

        At most `max_judged` of these judge, among which classes have their shares. Raises DataError where a class has
        no training row.
        """
        if limit.fold is None and not can_judge(manifest, least_judged):
            limit = limit.model_copy(update={"fold": JUDGING_FOLD})
        train, validating = read_split(manifest, Split.TRAIN, limit), validation_rows(manifest, limit)
        count_classes(train, manifest.classes)
        judged = train.slice(0, 0) if validating is None else validating
        if max_judged is not None:
            num_classes = len(manifest.classes)
            judged = natural_rows(judged, max_judged, num_classes=num_classes, seed=limit.seed)
        return cls(
            limit=limit,
            train=LabelledRows.of(train),
            judged=LabelledRows.of(judged),
            train_table=train,
            judged_table=judged,
        )


@dataclass(frozen=True, slots=True, eq=False)
class CrossFittedProbe:
    """Two heads on the same training rows: each was chosen by every second judged row, and speaks of the others.

    So every judged row is predicted by a head that it did not choose.
    """

    heads: tuple[Head, Head]

    @classmethod
    def choose(
        cls,
        heads: Sequence[Head],
        features_ND: NDArray[np.float32],
        found_N: NDArray[np.bool_],
        labels_N: NDArray[np.int64],
        selection: Selection,
    ) -> CrossFittedProbe:
        """Of the heads of a path the best by each half of the judged rows; the first where a half has no row."""
        chosen = []
        for parity in (0, 1):
            choosing = np.flatnonzero(found_N[1 - parity :: 2]) * 2 + 1 - parity
            val = TensorFeatures(
                torch.from_numpy(features_ND[choosing]), torch.from_numpy(labels_N[choosing])
            )
            chosen.append(choose_head(heads, val, selection) if val.num_rows else heads[0])
        return cls((chosen[0], chosen[1]))

    def predict(self, features_ND: NDArray[np.float32], found_N: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The class of each judged row, from its features in the order of the judged rows; UNKNOWN without."""
        predicted_N = np.full(len(features_ND), UNKNOWN, np.int64)
        for parity, head in enumerate(self.heads):
            with torch.inference_mode():
                logits_BK = head(torch.from_numpy(features_ND[parity::2]))
            predicted_N[parity::2] = logits_BK.argmax(dim=1).numpy()
        predicted_N[~found_N] = UNKNOWN
        return predicted_N


def best_by_other_half(correct_TM: NDArray[np.bool_], weights_M: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows are right by the best of T probes, of equals the last, each row's being chosen by the other half.

    Halves are every second row, as for `CrossFittedProbe`. The best one on the rows that choose it flatters itself.
    """
    correct_M = np.zeros(len(weights_M), np.bool_)
    for parity in (0, 1):
        right_T = correct_TM[:, 1 - parity :: 2] @ weights_M[1 - parity :: 2]
        best = len(right_T) - 1 - int(right_T[::-1].argmax())
        correct_M[parity::2] = correct_TM[best, parity::2]
    return correct_M


class ProbeBench:
    """Fits probes on feature sets of one dataset's rows."""

    def __init__(self, cache: FeatureCache, rows: ProbeRows, head: HeadConfig, *, num_classes: int) -> None:
        self._cache, self._rows, self._head = cache, rows, head
        self._num_classes = num_classes

    def fit(self, train_sets: Sequence[str], judged_set: str) -> CrossFittedProbe:
        """The probe that learns from the sets, each a view of the training rows; `judged_set` chooses its C.

        The views of an image count together as much as one image: views that show the same change nothing.
        """
        rows = replace(self._rows.train, weights_N=self._rows.train.weights_N / np.float32(len(train_sets)))
        train = open_features(self._cache, train_sets, rows)
        heads = fit_path(self._head, train, num_classes=self._num_classes)
        features_ND, found_N = self.judged_features(judged_set)
        if not found_N.any():
            raise DataError(
                f"none of {len(found_N)} images that judge could be read",
                next_step="look at the rejects with `convoy cache`",
            )
        labels_N = self._rows.judged.labels_N
        return CrossFittedProbe.choose(heads, features_ND, found_N, labels_N, self._head.selection)

    def judged_features(self, set_id: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The features of the judged rows in a set, and which of them are there."""
        return gather_features(self._cache, set_id, self._rows.judged.content_ids_N)

    def predict(self, probe: CrossFittedProbe, set_id: str) -> NDArray[np.int64]:
        """What a probe says of each judged row as a set shows it."""
        return probe.predict(*self.judged_features(set_id))
