"""The images that an inspection looks at: rows, features from the cache, and what the model says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from convoy.core.errors import DataError
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.statistics import Interval, effective_counts, wilson_interval
from convoy.pipelines.classifier_tensors import Readout
from convoy.pipelines.classifiers import Classifier
from convoy.pipelines.feature_plan import FeatureRequest
from convoy.pipelines.feature_source import gather_features
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.inspect_config import DuplicateScope, InspectConfig
from convoy.pipelines.natural_sample import natural_weights
from convoy.pipelines.stratified_sample import labels_of, rows_by_sample_id, stratified_rows
from convoy.storage.feature_cache import FeatureCache, content_id_array
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore

_MIN_ROWS = 3
_UNKNOWN = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InspectedSample:
    """Usable images: their rows, logits_NK, and the model's class that each is labelled as, -1 for none.

    `scores_N` are the probability of the predicted class, or its margin. `is_counted_N` are those of the splits that
    the inspection is about, of which `num_rejects` could not be used; images of others were named to be shown. A sample
    has as many of each class as it goes: by `weights_N` classes have the shares that they have in the splits.
    """

    rows: pa.Table
    classes: tuple[str, ...]
    logits_NK: NDArray[np.float32]
    labels_N: NDArray[np.int64]
    scores_N: NDArray[np.float32]
    is_counted_N: NDArray[np.bool_]
    weights_N: NDArray[np.float64]
    num_rejects: int

    @property
    def predicted_N(self) -> NDArray[np.int64]:
        """The model's class of each image, of equal logits the first."""
        predicted_N: NDArray[np.int64] = self.logits_NK.argmax(axis=1)
        return predicted_N

    @property
    def wrong_N(self) -> NDArray[np.bool_]:
        """Which images have a label that the model knows and does not predict."""
        wrong_N: NDArray[np.bool_] = (self.labels_N >= 0) & (self.predicted_N != self.labels_N)
        return wrong_N

    @property
    def top1(self) -> Interval | None:
        """The share of labelled images of the splits that are predicted right, as far as these tell, at 95 %."""
        known = (self.labels_N >= 0) & self.is_counted_N & (self.weights_N > 0)
        if not known.any():
            return None
        return wilson_interval(*effective_counts(~self.wrong_N[known], self.weights_N[known]))

    def sample_ids(self) -> list[str]:
        """The id of each image."""
        ids: list[str] = self.rows["sample_id"].to_pylist()
        return ids

    def shown(self, number: int, sample_ids: Sequence[str]) -> list[int]:
        """The rows to show: those that are named, else the surest errors as half of them, then class after class."""
        if sample_ids:
            row_of = {name: row for row, name in enumerate(self.sample_ids())}
            return [row_of[name] for name in dict.fromkeys(sample_ids) if name in row_of]
        wrong = np.flatnonzero(self.wrong_N)
        surest = wrong[np.argsort(-self.scores_N[wrong], kind="stable")][: number // 2].tolist()
        others = [row for row in range(len(self.labels_N)) if row not in set(surest)]
        return [*surest, *others][:number]


class SampleReading:
    """Reads one classifier's features of some rows of a dataset, computing those that are missing."""

    def __init__(
        self, store: ObjectStore, manifest: Manifest, classifier: Classifier, config: InspectConfig
    ) -> None:
        self._store, self._manifest, self._classifier, self._config = store, manifest, classifier, config
        self._extraction = classifier.extraction_like(config.extraction)

    def rows(self) -> pa.Table:
        """The rows of the sample; those that the config names come first."""
        sample = self._config.sample
        rows = stratified_rows(
            self._manifest, sample.num_images, splits=self._config.splits, seed=sample.seed
        )
        if not sample.sample_ids:
            return rows
        named = rows_by_sample_id(self._manifest, sample.sample_ids)
        fresh = ~np.isin(rows["sample_id"].to_numpy(zero_copy_only=False), named["sample_id"].to_pylist())
        return pa.concat_tables([named, rows.filter(pa.array(fresh))]).combine_chunks()

    def duplicate_rows(self, sample_rows: pa.Table) -> pa.Table:
        """The rows among which near duplicates are looked for."""
        settings = self._config.near_duplicates
        if settings.scope is DuplicateScope.SAMPLE:
            return sample_rows
        splits = [split for split in Split if split in self._manifest.counts]
        return stratified_rows(
            self._manifest, settings.max_rows, splits=splits, seed=self._config.sample.seed
        )

    def features(
        self, rows: pa.Table, taps: Sequence[str], *, progress: Progress
    ) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_]]:
        """By tap the features_ND of those rows that have an image, and which these are."""
        taps = tuple(dict.fromkeys(taps))
        request = FeatureRequest(
            dataset=self._config.dataset, backbone=self._classifier.backbone.config, taps=taps
        )
        job = FeatureJob(
            self._store, self._manifest, self._classifier.backbone, request, self._extraction, rows=rows
        )
        job.ensure(progress=progress)
        cache, ids_N = FeatureCache(self._store), content_id_array(rows["content_id"])
        gathered = {tap: gather_features(cache, job.set_id(tap), ids_N) for tap in taps}
        found_N = np.logical_and.reduce([found for _, found in gathered.values()])
        if found_N.sum() < _MIN_ROWS:
            raise DataError(
                f"{rows.num_rows - int(found_N.sum())} of {rows.num_rows} images cannot be used: too few are left",
                where=self._manifest.uri,
                next_step="look at why with `convoy cache`, or take a larger sample",
            )
        return {tap: features_ND[found_N] for tap, (features_ND, _) in gathered.items()}, found_N

    def notes(self, rows: pa.Table, found_N: NDArray[np.bool_]) -> list[str]:
        """Which of the images that the config names are not shown, as they cannot be used."""
        named = self._config.sample.sample_ids
        lost = set(named).intersection(rows.filter(pa.array(~found_N))["sample_id"].to_pylist())
        if not lost:
            return []
        return [
            f"{len(lost)} of {len(set(named))} named images cannot be used and are not shown: {', '.join(sorted(lost))}"
        ]

    def sample(
        self, rows: pa.Table, features_ND: NDArray[np.float32], found_N: NDArray[np.bool_]
    ) -> InspectedSample:
        """What the model says of the usable rows, given the features of its tap."""
        classifier = self._classifier
        logits_NK = Readout(classifier).logits(torch.from_numpy(features_ND)).float()
        scores_NK = logits_NK.softmax(dim=1) if classifier.gives_probabilities else logits_NK
        usable = rows.filter(pa.array(found_N)).combine_chunks()
        is_counted = np.isin(rows["split"].to_pylist(), [split.value for split in self._config.splits])
        # The model may not know all classes of the dataset; the last entry stands for rows without a label.
        index_of = {name: index for index, name in enumerate(classifier.classes)}
        class_of_label = np.array(
            [index_of.get(name, _UNKNOWN) for name in self._manifest.classes] + [_UNKNOWN]
        )
        return InspectedSample(
            rows=usable,
            classes=classifier.classes,
            logits_NK=logits_NK.numpy(),
            labels_N=class_of_label[labels_of(usable)],
            scores_N=scores_NK.amax(dim=1).numpy(),
            is_counted_N=is_counted[found_N],
            weights_N=self._weights(usable, is_counted[found_N]),
            num_rejects=int((is_counted & ~found_N).sum()),
        )

    def _weights(self, rows: pa.Table, is_counted_N: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Of each labelled image that counts the weight of its class, 0 of others."""
        num_classes, counts = len(self._manifest.classes), self._manifest.counts
        labels_N = labels_of(rows)
        counts_N = is_counted_N & (labels_N >= 0)
        if not counts_N.any():
            return np.zeros(len(labels_N))
        of_splits = [counts[split].by_class for split in self._config.splits if split in counts]
        counts_K = np.array(of_splits, np.int64).sum(axis=0)
        weights_K = natural_weights(counts_K, np.bincount(labels_N[counts_N], minlength=num_classes))
        return np.where(counts_N, weights_K[labels_N], 0.0)
