"""What a few backbones make of a dataset: one cached pass each, then probes, neighbours and LogME at every tap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.learning_curve import CurveSample
from convoy.core.progress import Progress
from convoy.core.records import codes_in_words
from convoy.core.statistics import Interval
from convoy.core.transferability import knn_correct, logme
from convoy.pipelines.advise_as_is import judge_as_is, own_classifier
from convoy.pipelines.advise_config import AdviseConfig, CandidateBackbone
from convoy.pipelines.advise_rate import pass_rate
from convoy.pipelines.advise_rows import choose_look_rows, missing_classes, subset_rows
from convoy.pipelines.advise_rule import JudgedProbe
from convoy.pipelines.advise_taps import probed_taps
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifiers import Classifier
from convoy.pipelines.feature_plan import FeatureRequest, holding_features
from convoy.pipelines.feature_source import count_rejects, gather_features
from convoy.pipelines.feature_summary import FeatureSummary
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.judged_heads import JudgedHead, flattery, judge_head, peak_counts
from convoy.pipelines.near_duplicates import (
    NearDuplicateReport,
    joined_taps,
    near_duplicate_taps,
    report_near_duplicates,
)
from convoy.storage.feature_cache import FeatureCache, content_id_array
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.head_config import HeadConfig
from convoy.vision.heads import TensorFeatures


class TapProbe(StrictModel):
    """One depth of one backbone: `depth` is 0 at the stem and 1 at the logits; `C` is the chosen one of the head.

    `num_correct` counts rows of equal weight, of `judged_rows`: those of which the tap has features. These are null in
    advice of before. `logme` is null where all features are the same.
    """

    tap: str
    depth: float
    num_features: int
    top1: Interval
    knn_top1: float
    logme: float | None
    num_correct: float
    judged_rows: float | None = None
    C: float
    fit_seconds: float


class BackboneProbes(StrictModel):
    """A backbone at its taps, from the stem up. `images_per_s` is that of its largest pass, over all workers.

    That pass was of `timed_images` in `timed_run`, null in advice that was given before this was told. Of 0, no pass
    tells the rate: it is what the multiply-adds suggest of two cores. `judged_rows` are as many rows of equal weight as
    those that judged every tap are worth. `peak_correct` counts those that are right where the tap was chosen by the
    other half of them; the best of several taps on the rows that chose it looks better than it is, of those below the
    top by the share `earlier_flattery`. Advice of before does not tell them.
    """

    backbone: str
    weights_digest: str
    macs: int
    num_parameters: int
    images_per_s: float
    timed_images: int | None = None
    timed_run: str | None = None
    judged_rows: float
    peak_correct: float | None = None
    earlier_flattery: float | None = None
    taps: list[TapProbe]

    @property
    def peak(self) -> JudgedProbe:
        """The best tap, and what a tap that is chosen so is worth on rows that did not choose it."""
        if self.peak_correct is None:
            return self.judged(self.best)
        return JudgedProbe(tap=self.best.tap, num_correct=self.peak_correct, num_rows=self.judged_rows)

    def judged(self, probe: TapProbe) -> JudgedProbe:
        """What the rule needs of one of the taps."""
        num_rows = self.judged_rows if probe.judged_rows is None else probe.judged_rows
        return JudgedProbe(tap=probe.tap, num_correct=probe.num_correct, num_rows=num_rows)

    @property
    def best(self) -> TapProbe:
        """The tap with the best probe; of equals the deepest."""
        return max(self.taps, key=lambda tap: (tap.top1.estimate, tap.depth))

    @property
    def top(self) -> TapProbe:
        """The deepest tap."""
        return max(self.taps, key=lambda tap: tap.depth)

    @property
    def earlier(self) -> list[TapProbe]:
        """The taps below the top."""
        return [tap for tap in self.taps if tap.depth < self.top.depth]


@dataclass(frozen=True, slots=True, eq=False)
class LabelledFeatures:
    """Features of the train rows and of the judged ones, without those that could not be read.

    Train rows of weight 0 are left out too: a training learns nothing from them. `places_M` tells the judged ones among
    all that were to judge, in their order.
    """

    train_ND: NDArray[np.float32]
    train_labels_N: NDArray[np.int64]
    train_weights_N: NDArray[np.float32]
    judged_MD: NDArray[np.float32]
    judged_labels_M: NDArray[np.int64]
    judged_weights_M: NDArray[np.float64]
    places_M: NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What one pass gave: the summary of the job, and the probes.

    `head` is that of the best probe. `as_is` is the network without any training, None where it has other classes than
    the dataset.
    """

    record: BackboneRecord
    summary: FeatureSummary
    probes: BackboneProbes
    head: JudgedHead
    as_is: JudgedProbe | None

    @property
    def earlier_run(self) -> str | None:
        """The run that told the rate, where it was over before this look; None where this look did, or none."""
        own = self.summary.run if self.summary.recomputed else None
        return None if self.probes.timed_run == own else self.probes.timed_run


class Prober:
    """Looks through backbones at one dataset's rows."""

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        config: AdviseConfig,
        progress: Progress,
        *,
        new_run: bool = False,
    ) -> None:
        self._store, self._manifest, self._config = store, manifest, config
        self._cache = FeatureCache(store)
        self._new_run = new_run
        self.progress = progress
        self.rows = choose_look_rows(manifest, config)

    def look(self, candidate: CandidateBackbone, record: BackboneRecord) -> Look:
        """One pass of a backbone, or none where the cache has it all, and what its taps are worth."""
        taps, own = probed_taps(candidate, record), self._own(candidate, record)
        self.progress.stage(f"looking through {candidate.name}")
        job = self._job(record, taps, own)
        summary = job.ensure(progress=self.progress, new_run=self._new_run)
        self.progress.stage(f"probing {candidate.name}")
        probed = sorted(
            (self._probe(record, tap, job.set_id(tap)) for tap in taps), key=lambda found: found[0].depth
        )
        rate = pass_rate(self._store, record, summary)
        num_correct, num_rows = peak_counts([head for _, head in probed])
        probes = BackboneProbes(
            backbone=self._config.name_of(candidate, record.weights_digest),
            weights_digest=record.weights_digest,
            macs=record.macs,
            num_parameters=record.num_parameters,
            images_per_s=rate.images_per_s,
            timed_images=rate.num_images,
            timed_run=rate.run or None,
            judged_rows=num_rows,
            peak_correct=num_correct,
            earlier_flattery=flattery([head for _, head in probed[:-1]]) if probed[1:] else None,
            taps=[probe for probe, _ in probed],
        )
        head = next(head for probe, head in probed if probe.tap == probes.best.tap)
        as_is = None if own is None else self._judge_as_is(own, job.set_id(own.tap))
        return Look(record=record, summary=summary, probes=probes, head=head, as_is=as_is)

    def lacks_features(self, candidate: CandidateBackbone, record: BackboneRecord) -> bool:
        """Whether a look through the backbone needs a pass."""
        job = self._job(record, probed_taps(candidate, record), self._own(candidate, record))
        return bool(job.plan().missing)

    def near_duplicates(self, look: Look) -> NearDuplicateReport:
        """Pictures that are there twice among all rows that were looked at, held-out ones included.

        Across splits are those too that lie in the training rows and in the fold that trainings are measured on.
        """
        rows = self.rows.by_use
        ids_N = content_id_array(rows["content_id"])
        parts, found_N = [], np.ones(len(ids_N), np.bool_)
        for tap in near_duplicate_taps(look.record.axis):
            features_ND, here_N = gather_features(self._cache, self.set_id(look, tap), ids_N)
            parts.append(features_ND)
            found_N &= here_N
        features_ND = joined_taps([features_ND[found_N] for features_ND in parts])
        return report_near_duplicates(features_ND, rows.filter(pa.array(found_N)), self._manifest.classes)

    def set_id(self, look: Look, tap: str) -> str:
        """The feature set of a tap."""
        return look.summary.sets[f"{tap}/0"]

    def features(self, set_id: str) -> LabelledFeatures:
        """The features of the rows to learn from and to judge by.

        DataError where none of those that judge, or none of a class to learn from, could be read.
        """
        train, judged = self.rows.learnt_by_weight, self.rows.judged_by_weight
        train_ND, found_N = gather_features(self._cache, set_id, train.content_ids_N)
        learnt_N = found_N & (train.weights_N > 0)
        self._require_readable(set_id, learnt_N)
        judged_MD, found_M = gather_features(self._cache, set_id, judged.content_ids_N)
        if not found_M.any():
            raise self._unreadable(set_id, self.rows.judged, f"none of {len(found_M)} images that judge")
        return LabelledFeatures(
            train_ND=train_ND[learnt_N],
            train_labels_N=train.labels_N[learnt_N],
            train_weights_N=train.weights_N[learnt_N],
            judged_MD=judged_MD[found_M],
            judged_labels_M=judged.labels_N[found_M],
            judged_weights_M=judged.weights_N[found_M],
            places_M=np.flatnonzero(found_M),
        )

    def judge(
        self,
        features: LabelledFeatures,
        *,
        head: HeadConfig | None = None,
        rows_N: NDArray[np.intp] | None = None,
    ) -> JudgedHead:
        """A head that learnt from some of the train rows, by default from all of them, each by its weight."""
        chosen = slice(None) if rows_N is None else rows_N
        columns = (features.train_ND, features.train_labels_N, features.train_weights_N)
        return judge_head(
            head or self._config.head,
            TensorFeatures(*(torch.from_numpy(column[chosen]) for column in columns)),
            features.judged_MD,
            features.judged_labels_M,
            features.judged_weights_M,
            features.places_M,
            num_classes=len(self._manifest.classes),
        )

    def curve(self, features: LabelledFeatures, whole_M: NDArray[np.bool_]) -> list[CurveSample]:
        """What heads on growing subsets get right; `whole_M` is of the head on all rows."""
        settings, seed = self._config.curve, self._config.look.seed
        labels_N = features.train_labels_N
        largest = int(np.bincount(labels_N).max())
        sizes = sorted({max(round(share * largest), 1) for share in settings.fractions} - {largest})
        samples = []
        for size in sizes:
            self.progress.stage(f"learning curve: {size} images a class")
            correct = [
                self.judge(features, rows_N=subset_rows(labels_N, size, seed=seed, repeat=repeat)).correct_M
                for repeat in range(settings.repeats)
            ]
            samples.append(CurveSample(float(size), np.stack(correct)))
        return [*samples, CurveSample(float(largest), whole_M[None, :])]

    def _require_readable(self, set_id: str, learnt_N: NDArray[np.bool_]) -> None:
        """DataError for a class of which none of the train rows can be learnt from."""
        train, classes = self.rows.train, self._manifest.classes
        lost = missing_classes(train.filter(pa.array(learnt_N)), classes)
        if lost:
            labels = pa.array([classes.index(name) for name in lost], pa.int32())
            rows = train.filter(pc.is_in(train["label"], labels))
            more = f" ({len(lost)} such classes)" if lost[1:] else ""
            raise self._unreadable(set_id, rows, f"no image of '{lost[0]}'{more} to learn from")

    def _unreadable(self, set_id: str, rows: pa.Table, what: str) -> DataError:
        """That none of some rows could be read, and why not."""
        splits = ", ".join(sorted(set(rows["split"].to_pylist())))
        codes = codes_in_words(count_rejects(self._cache, [set_id], rows))
        return DataError(
            f"{what} could be read, of split {splits}: {codes}",
            where=self._manifest.uri,
            next_step="look at the rejects with `convoy cache`, and freeze the dataset anew where images have moved",
        )

    def _own(self, candidate: CandidateBackbone, record: BackboneRecord) -> Classifier | None:
        return own_classifier(candidate, record, self._manifest.classes, self._config.extraction)

    def _judge_as_is(self, own: Classifier, set_id: str) -> JudgedProbe:
        features = self.features(set_id)
        return judge_as_is(
            own,
            features.judged_MD,
            features.judged_labels_M,
            features.judged_weights_M,
            self._manifest.classes,
        )

    def _job(self, record: BackboneRecord, taps: tuple[str, ...], own: Classifier | None) -> FeatureJob:
        # More taps of the same pass cost next to nothing.
        outputs = () if own is None else (own.tap,)
        taps = tuple(dict.fromkeys([*taps, *near_duplicate_taps(record.axis), *outputs]))
        request = FeatureRequest(dataset=self._config.dataset_name, backbone=record.config, taps=taps)
        extraction = holding_features(self._config.extraction, record)
        return FeatureJob(self._store, self._manifest, record, request, extraction, rows=self.rows.all)

    def _probe(self, record: BackboneRecord, tap: str, set_id: str) -> tuple[TapProbe, JudgedHead]:
        features = self.features(set_id)
        head = self.judge(features)
        neighbours_M = knn_correct(
            features.train_ND,
            features.train_labels_N,
            features.judged_MD,
            features.judged_labels_M,
            num_neighbours=self._config.num_neighbours,
            weights_N=self.rows.train_weights_K[features.train_labels_N],
        )
        judged = head.judged(tap)
        index = next(stage.index for stage in record.axis if stage.name == tap)
        probe = TapProbe(
            tap=tap,
            depth=index / max(len(record.axis) - 1, 1),
            num_features=features.train_ND.shape[1],
            top1=head.top1,
            knn_top1=float(np.average(neighbours_M, weights=features.judged_weights_M)),
            logme=logme(features.train_ND, features.train_labels_N),
            num_correct=judged.num_correct,
            judged_rows=judged.num_rows,
            C=head.C,
            fit_seconds=head.seconds,
        )
        return probe, head
