"""What a committee is asked to predict: which samples, in which mode, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from convoy.cluster.slices import PlannedWork
from convoy.core.crop_policies import (
    CropPlan,
    CropPolicy,
    EvaluationMode,
    MemberOutputs,
    crop_views,
    num_slots,
)
from convoy.core.fingerprints import digest
from convoy.core.records import Split
from convoy.core.result_columns import PartitionBy, ScoreColumns
from convoy.pipelines.committees import CommitteeMember, CommitteeRecord
from convoy.pipelines.device_settings import settle_batch_size
from convoy.pipelines.feature_plan import ExtractionConfig, forward_s
from convoy.pipelines.training_rows import rows_digest
from convoy.storage.local_cache import LocalCacheOptions
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.run_input import slice_rows_for
from convoy.vision.committee_options import GateOptions
from convoy.vision.engine_options import Precision
from convoy.vision.presets import EvalPreset, dense_preset, geometry_of

EVALUATE, SCORE = "evaluate", "score"


# A pass of fewer images is hardly faster.
_LEAST_OF_A_FOLDER = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """How `convoy score` wants its rows. An unfinished run of the same `name` is gone on with, or refused.

    For the run's record are `forecast`, what a dry run said of this scoring, and `references`, the `name@digest` that
    each reference to a bundle means.
    """

    name: str
    columns: ScoreColumns
    partition_by: PartitionBy
    references: Mapping[str, str]
    forecast: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionRequest:
    """Which samples a committee predicts, and how. `rows` are rows of the manifest instead of whole splits.

    `splits` of None are all. With `scores` the result is the table of `convoy score`, else that of an evaluation.
    Workers are those of the work `planned`, of which this is a sample, or else of the rows that there are. Images that
    trainings read as well lie in their `local_cache`, and are left there for them.
    """

    committee: CommitteeRecord
    dataset: str
    splits: tuple[Split, ...] | None
    extraction: ExtractionConfig
    keep: MemberOutputs = MemberOutputs.NONE
    mode: EvaluationMode = EvaluationMode.EXACT
    rows: pa.Table | None = None
    planned: PlannedWork | None = None
    scores: ScoreRequest | None = None
    local_cache: LocalCacheOptions | None = None

    @property
    def verb(self) -> str:
        """The job that asks."""
        return EVALUATE if self.scores is None else SCORE

    @property
    def plan(self) -> CropPlan:
        """The crops that networks see: in the dense mode the whole central square and its mirror image."""
        is_dense = self.mode is EvaluationMode.DENSE
        return CropPlan(policy=CropPolicy.FLIP) if is_dense else self.committee.plan

    @property
    def gate(self) -> GateOptions | None:
        """What decides in the gated mode."""
        return self.committee.gate if self.mode is EvaluationMode.GATED else None

    @property
    def features_tap(self) -> str | None:
        """The tap whose features are a column of the scores."""
        if self.scores is None or self.scores.columns.features is None:
            return None
        (member,) = self.committee.members
        return member.classifier.backbone.resolve_tap(self.scores.columns.features)

    def preset(self, member: CommitteeMember) -> EvalPreset:
        """How a member's images are prepared."""
        preset = member.classifier.backbone.preset
        return dense_preset(preset) if self.mode is EvaluationMode.DENSE else preset

    def precision(self, member: CommitteeMember) -> Precision:
        """What a member of a settled request computes in."""
        return Precision(member.classifier.precision.value)

    def settled(self, store: ObjectStore) -> PredictionRequest:
        """The same request with the precision of every member told; its identity needs that."""
        members = tuple(
            replace(member, classifier=member.classifier.settled(store, self.dataset))
            for member in self.committee.members
        )
        return replace(self, committee=replace(self.committee, members=members))

    def in_mode(self, mode: EvaluationMode) -> PredictionRequest:
        """The same request in another mode."""
        return replace(self, mode=mode)

    def keeping(self, keep: MemberOutputs) -> PredictionRequest:
        """The same request, but for what is kept of members."""
        return replace(self, keep=keep)

    def with_forecast(self, forecast: dict[str, Any] | None) -> PredictionRequest:
        """The same scoring, with what a dry run said of it."""
        return self if self.scores is None else replace(self, scores=replace(self.scores, forecast=forecast))

    def batches(self, manifest: Manifest) -> Iterable[pa.Table | pa.RecordBatch]:
        """The rows to predict, in the order of the manifest."""
        return [self.rows] if self.rows is not None else manifest.iter_batches(splits=self.splits)

    def split_names(self, manifest: Manifest) -> tuple[Split, ...]:
        """The splits that are asked for, or all that there are."""
        return tuple(manifest.counts) if self.splits is None else self.splits

    def num_rows(self, manifest: Manifest) -> int:
        """How many these are."""
        if self.rows is not None:
            return int(self.rows.num_rows)
        counts = manifest.counts
        return sum(counts[split].num_samples for split in self.split_names(manifest) if split in counts)

    def partition_rows(self, manifest: Manifest) -> list[int]:
        """How many of them go into each folder of scores, which is cut into slices by itself."""
        by = PartitionBy.NONE if self.scores is None else self.scores.partition_by
        if by is PartitionBy.NONE:
            return [self.num_rows(manifest)]
        counts = [manifest.counts[split] for split in self.split_names(manifest) if split in manifest.counts]
        if by is PartitionBy.SPLIT:
            return [one.num_samples for one in counts]
        by_class = [one.by_class for one in counts]
        return [*map(sum, zip(*by_class, strict=True)), sum(one.num_unlabelled for one in counts)]

    def batch_size(self, store: ObjectStore, manifest: Manifest) -> int:
        """How many images a pass of a network takes: where nobody says, by the member that sees the largest ones.

        And by the folders of scores, each of which ends with a pass that is not full, and takes as long.
        """
        if self.extraction.batch_size is not None:
            return self.extraction.batch_size
        geometries = {geometry_of(self.preset(member)) for member in self.committee.members}
        crop_px = max(geometry.crop_px for geometry in geometries)
        num_crops = num_slots(self.plan) * len(geometries)
        batch_size = settle_batch_size(store, self.dataset, self.extraction, crop_px, num_crops=num_crops)
        rows = [num_rows for num_rows in self.partition_rows(manifest) if num_rows]
        mean_rows = sum(rows) // max(len(rows), 1)
        return min(batch_size, max(1 << max(mean_rows - 1, 0).bit_length(), _LEAST_OF_A_FOLDER))

    def slice_rows(self, manifest: Manifest, batch_size: int) -> int:
        """How many rows a slice has."""
        num_rows = self.num_rows(manifest)
        forward_s = self.forecast_forward_s(num_rows)
        return self.extraction.slice_rows or slice_rows_for(num_rows, batch_size, forward_s)

    def work(self, num_rows: int, num_slices: int) -> PlannedWork:
        """What predicting so many rows in so many slices asks of the workers."""
        return PlannedWork(
            num_rows,
            self.committee.weights_bytes,
            num_slices,
            self.forecast_forward_s(num_rows),
        )

    def forecast_forward_s(self, num_rows: int) -> float:
        """Forecast of the seconds in the networks for so many rows: every member on every view."""
        macs = sum(member.classifier.macs for member in self.committee.members)
        return forward_s(num_rows * len(crop_views(self.plan)) * macs)

    def identity(self, manifest: Manifest) -> dict[str, Any]:
        """What determines the predictions, and which of them are kept."""
        committee = self.committee
        return {
            "dataset": self.dataset,
            "dataset_fingerprint": manifest.fingerprint,
            "splits": "all" if self.splits is None else sorted(self.splits),
            "rows": None if self.rows is None else rows_digest(self.rows),
            "committee": committee.digest,
            # One decode serves all members, and of a pretrained network no digest knows its rule.
            "decode_rule": committee.members[0].classifier.decode_rule.model_dump(mode="json"),
            "precision": [self.precision(member).value for member in committee.members],
            "crops": self.plan.model_dump(mode="json"),
            "mode": self.mode.value,
            "gate": None if (gate := self.gate) is None else gate.model_dump(mode="json"),
            "keep": self.keep.value,
            **dict(self._score_identity()),
        }

    def target(self, manifest: Manifest) -> str:
        """What an unfinished run is found by: the name of a scoring, whatever its settings were."""
        return digest(self.identity(manifest)) if self.scores is None else self.scores.name

    def _score_identity(self) -> Iterator[tuple[str, Any]]:
        if self.scores is not None:
            yield "columns", self.scores.columns.model_dump(mode="json")
            yield "partition_by", self.scores.partition_by.value
            yield "features", [self.features_tap, self.extraction.dtype.value] if self.features_tap else None
