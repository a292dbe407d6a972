"""Models on rows of a manifest, from cached features: no run of their own, and nothing computed that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from convoy.core.crop_policies import CropPolicy
from convoy.core.errors import ConfigError
from convoy.core.metrics import EvaluationCounts
from convoy.core.progress import Progress
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifier_tensors import Readout
from convoy.pipelines.classifiers import Classifier
from convoy.pipelines.committees import CommitteeRecord
from convoy.pipelines.feature_plan import ExtractionConfig, FeatureRequest
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.retrain_gate import ModelScores
from convoy.storage.feature_cache import FeatureCache, KnownContent, content_id_array
from convoy.storage.feature_reading import iter_wanted
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.ensembling import Floats, joint_logits, member_values


@dataclass(frozen=True, slots=True, eq=False)
class NamedRows:
    """Rows to measure: their content, and the names of their classes."""

    content_ids_N: NDArray[np.bytes_]
    names_N: Sequence[str]

    def __len__(self) -> int:
        return len(self.names_N)

    @classmethod
    def of(cls, content_ids: pa.ChunkedArray | pa.Array, names: Sequence[str]) -> NamedRows:
        """Rows from a column of content ids."""
        return cls(content_id_array(content_ids), names)


def can_be_compared(committee: CommitteeRecord) -> bool:
    """Whether a model looks at the central crop only: that of the cached features."""
    return committee.plan.policy is CropPolicy.CENTER


class CachedScorer:
    """Sees to it that features of a dataset's version exist, and reads models' outputs from them.

    `note_missing` is told what a set lacks before that is computed.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        dataset: str,
        extraction: ExtractionConfig,
        *,
        note_missing: Callable[[str, int], None],
        progress: Progress,
    ) -> None:
        self.cache = FeatureCache(store)
        self._store = store
        self._manifest = manifest
        self._dataset = dataset
        self._extraction = extraction
        self._note_missing = note_missing
        self._progress = progress
        self._ready: set[str] = set()

    def ensure_set(self, backbone: BackboneRecord, tap: str, extraction: ExtractionConfig) -> str:
        """The id of a feature set that has every sample of the version that can be used."""
        request = FeatureRequest(dataset=self._dataset, backbone=backbone.config, taps=(tap,))
        job = FeatureJob(self._store, self._manifest, backbone, request, extraction)
        set_id = job.set_id(tap)
        if set_id not in self._ready:
            job.ensure(progress=self._progress, note_missing=partial(self._note_missing, set_id))
            self._ready.add(set_id)
        return set_id

    def ensure_features(self, classifier: Classifier) -> str:
        """The id of the feature set that a classifier reads."""
        extraction = classifier.extraction_like(self._extraction)
        return self.ensure_set(classifier.backbone, classifier.tap, extraction)

    def known_content(self, set_id: str) -> KnownContent:
        """What a set has, and what it knows to be unusable."""
        return self.cache.known_content(set_id)

    def member_values(self, committee: CommitteeRecord, rows: NamedRows) -> tuple[Floats, NDArray[np.bool_]]:
        """What the averaging rule averages, values_MNK in the committee's classes, and found_N."""
        if not can_be_compared(committee):
            raise ConfigError(
                f"a retraining compares models at the central crop, and this ensemble looks at {committee.plan.policy}",
                next_step="promote a version of the ensemble with the crop policy center",
            )
        found_N = np.ones(len(rows), np.bool_)
        values = []
        for member in committee.members:
            logits_NK, seen_N = self._logits(member.classifier, rows)
            found_N &= seen_N
            # Members may have the same classes in another order.
            if order := member.classifier.order_of(committee.classes):
                logits_NK = logits_NK[:, order]
            one_view = logits_NK[None, None]
            values.append(member_values(one_view, [0], committee.averaging, [member.temperature])[0])
        return np.stack(values), found_N

    def scores(self, committee: CommitteeRecord, rows: NamedRows, classes: Sequence[str]) -> ModelScores:
        """A model on some rows; `classes` index the labels that all models share."""
        values_MNK, found_N = self.member_values(committee, rows)
        weights_M = [member.weight for member in committee.members]
        logits_NK = joint_logits(values_MNK, weights_M, committee.averaging, committee.temperature)
        own_index = {name: index for index, name in enumerate(committee.classes)}
        own_N = np.array([own_index.get(name, -1) for name in rows.names_N], np.int64)
        shared_index = {name: index for index, name in enumerate(classes)}
        counted_N = found_N & (own_N >= 0)
        return ModelScores(
            labels_N=np.array([shared_index[name] for name in rows.names_N], np.int64),
            correct_N=logits_NK.argmax(axis=1) == own_N,
            found_N=found_N,
            ece=_ece(logits_NK[counted_N], own_N[counted_N]) if committee.gives_probabilities else None,
            macs=sum(member.classifier.macs for member in committee.members),
        )

    def _logits(
        self, classifier: Classifier, rows: NamedRows
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits_NK of a classifier, and a mask of the rows that have features; the others stay zero."""
        set_id, readout = self.ensure_features(classifier), Readout(classifier)
        logits_NK = np.zeros((len(rows), len(classifier.classes)), np.float32)
        found_N = np.zeros(len(rows), np.bool_)
        for chunk in iter_wanted(self.cache, set_id, rows.content_ids_N):
            features_BD = torch.from_numpy(chunk.features_BD).float()
            logits_NK[chunk.rows_B] = readout.logits(features_BD).numpy()
            found_N[chunk.rows_B] = True
        return logits_NK, found_N


def _ece(logits_NK: Floats, labels_N: NDArray[np.int64]) -> float | None:
    if not len(labels_N):
        return None
    counts = EvaluationCounts(logits_NK.shape[1])
    counts.add(logits_NK, labels_N)
    return counts.summary().ece
