"""Gathering what the rule needs: looks through all backbones and one untrained network, and a learning curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from convoy.core.learning_curve import AS_MEASURED, MIN_SIZES, LearningCurve, Shrink, fit_curve
from convoy.core.records import Split
from convoy.core.transferability import DomainDistance, domain_distance
from convoy.pipelines.advise_config import AdviseConfig, CandidateBackbone
from convoy.pipelines.advise_probes import Look, Prober, TapProbe
from convoy.pipelines.advise_rows import has_held_out, has_judges, images_by_class
from convoy.pipelines.advise_rule import Evidence, JudgedProbe
from convoy.pipelines.advise_taps import known_stage
from convoy.pipelines.backbone_evidence import BackboneEvidence, SvmProbe
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.feature_plan import FeatureRequest, holding_features
from convoy.pipelines.feature_source import gather_features
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.stratified_sample import evenly_spread_rows
from convoy.pipelines.training_rows import read_split, settle_balance
from convoy.storage.feature_cache import FeatureCache, content_id_array
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.head_config import HeadKind
from convoy.vision.training_config import Balance


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """All that was measured; `best` is the look with the best probe at any depth."""

    looks: tuple[Look, ...]
    best: Look
    untrained: Look
    curve: LearningCurve | None
    evidence: tuple[BackboneEvidence, ...]


class Gatherer:
    """Looks at one dataset through the candidates of a config."""

    def __init__(self, store: ObjectStore, manifest: Manifest, config: AdviseConfig, prober: Prober) -> None:
        self._store, self._manifest = store, manifest
        self._config, self._prober = config, prober

    def gather(self, records: Sequence[BackboneRecord], *, check: Callable[[], None]) -> Gathered:
        """One pass a candidate, one of the untrained network of the best, and a curve; `check` ends a lost run."""
        config = self._config
        looks = []
        for candidate, record in zip(config.candidates, records, strict=True):
            looks.append(self._prober.look(candidate, record))
            check()
        place = max(range(len(looks)), key=lambda index: looks[index].probes.best.top1.estimate)
        best = looks[place]
        untrained = self._prober.look(*self._untrained(config.candidates[place], best))
        check()
        curve = self._curve(best)
        shrink = self._shrink(curve)
        return Gathered(
            looks=tuple(looks),
            best=best,
            untrained=untrained,
            curve=curve,
            evidence=tuple(
                self._evidence(candidate, look, untrained, is_best=look is best, shrink=shrink)
                for candidate, look in zip(config.candidates, looks, strict=True)
            ),
        )

    def domain_distance(self, look: Look, reference: Manifest) -> DomainDistance:
        """From the features at the top of a look to those of as many images of the config's reference."""
        name = self._config.reference or ""
        rows = evenly_spread_rows(reference, self._prober.rows.train.num_rows)
        tap = look.probes.top.tap
        request = FeatureRequest(dataset=name, backbone=look.record.config, taps=(tap,))
        extraction = holding_features(self._config.extraction, look.record)
        job = FeatureJob(self._store, reference, look.record, request, extraction, rows=rows)
        job.ensure(progress=self._prober.progress)
        wanted = content_id_array(rows["content_id"])
        reference_ND, found_N = gather_features(FeatureCache(self._store), job.set_id(tap), wanted)
        features = self._prober.features(self._prober.set_id(look, tap))
        return domain_distance(features.train_ND, reference_ND[found_N], reference=name, tap=tap)

    def images_per_class(self) -> float:
        """The images of the median class that a training has to learn from: those of weight 0 teach nothing."""
        train = self._prober.rows.train
        labels_N, teaches_N = train["label"].to_numpy(), train["weight"].to_numpy() > 0
        shares_K = np.bincount(labels_N, teaches_N) / np.bincount(labels_N)
        return float(np.median(self._counts * shares_K)) * float(self._learnt_share)

    @property
    def _counts(self) -> list[int]:
        return images_by_class(self._manifest, self._config.rows)

    @property
    def _learnt_share(self) -> Fraction:
        """What a training learns from of its images: all, unless it is measured on a fold of them, as probes are."""
        if has_held_out(self._manifest):
            return Fraction(1)
        num_seen, num_judged = self._prober.rows.train.num_rows, self._prober.rows.judged.num_rows
        return Fraction(num_seen, num_seen + num_judged)

    @property
    def _num_learnt(self) -> int:
        # Not rounded up: batches of so many must be filled.
        return math.floor(sum(self._counts) * self._learnt_share)

    def _untrained(
        self, candidate: CandidateBackbone, best: Look
    ) -> tuple[CandidateBackbone, BackboneRecord]:
        """The same network with random weights, at the same taps and with the same preset."""
        untrained = {"weights": "random", "weights_digest": None, "preset": best.record.preset}
        backbone = candidate.backbone.model_copy(update=untrained)
        taps = tuple(tap.tap for tap in best.probes.taps)
        return CandidateBackbone(backbone=backbone, taps=taps), fetch_backbone(self._store, backbone)

    def _curve(self, best: Look) -> LearningCurve | None:
        """The learning curve of the best probe, forecast at multiples of the images that a training has."""
        prober, config = self._prober, self._config
        features = prober.features(prober.set_id(best, best.probes.best.tap))
        samples = prober.curve(features, best.head.correct_M)
        if len(samples) < MIN_SIZES:
            return None
        factors = [self._ahead * factor for factor in config.curve.factors]
        return fit_curve(
            samples, weights_N=best.head.weights_M, factors=factors, wanted_top1=config.wanted_top1
        )

    def _shrink(self, curve: LearningCurve | None) -> Shrink:
        """By what the errors of probes fall from the images that they had to all that there are."""
        return AS_MEASURED if curve is None else curve.shrink(self._ahead * curve.points[-1].images_per_class)

    @property
    def _ahead(self) -> float:
        """How many times the images that probes learnt from a training has, of every class alike."""
        num_seen: int = self._prober.rows.train.num_rows
        return self._num_learnt / num_seen

    def _evidence(
        self, candidate: CandidateBackbone, look: Look, untrained: Look, *, is_best: bool, shrink: Shrink
    ) -> BackboneEvidence:
        probes, counts = look.probes, self._counts
        num_seen = self._prober.rows.train.num_rows
        return BackboneEvidence(
            probes=probes,
            evidence=Evidence(
                images_per_class=self.images_per_class(),
                chance_top1=self._prober.rows.chance_top1,
                top=probes.judged(probes.top),
                best=probes.peak,
                untrained=untrained.probes.peak,
                shrink=shrink,
            ),
            config=candidate.backbone,
            as_is=look.as_is,
            own_classes=candidate.model_dump(
                mode="json", include={"classes", "class_map"}, exclude_none=True
            ),
            svm=self._svm(look),
            reused=self._reused(look),
            untrained_rate=untrained.probes.images_per_s if is_best else None,
            train_images=self._num_learnt,
            looked_images=num_seen,
            missing_images=self._missing(look, probes.top.tap),
            has_val=has_judges(self._manifest, self._config.look),
            has_held_out=has_held_out(self._manifest),
            learnt_share=float(self._learnt_share),
            is_unbalanced=settle_balance(Balance.AUTO, counts) is Balance.WEIGHTS,
        )

    def _svm(self, look: Look) -> SvmProbe | None:
        """A linear SVM on the best tap below the top, as CS231n's rule has it; None without one.

        It is worth less by as much as the tap's own head is on rows that did not choose the tap.
        """
        earlier = look.probes.earlier
        if not earlier:
            return None
        best = max(earlier, key=lambda probe: (probe.top1.estimate, probe.depth))
        config = self._config.head.model_copy(update={"kind": HeadKind.LINEAR_SVM})
        head = self._prober.judge(self._prober.features(self._prober.set_id(look, best.tap)), head=config)
        judged = head.judged(best.tap)
        flattered = (look.probes.earlier_flattery or 0.0) * judged.num_rows
        judged = judged.model_copy(update={"num_correct": max(judged.num_correct - flattered, 0.0)})
        return SvmProbe(
            judged=judged,
            C=head.C,
            fit_seconds=head.seconds,
            missing_images=self._missing(look, best.tap),
        )

    def _missing(self, look: Look, tap: str) -> int:
        """The training images whose features at a tap a probe's training would have to compute."""
        config, limit = self._config, self._config.rows
        rows = None if limit.max_per_class is None else read_split(self._manifest, Split.TRAIN, limit)
        request = FeatureRequest(
            dataset=config.dataset_name, splits=(Split.TRAIN,), backbone=look.record.config, taps=(tap,)
        )
        extraction = holding_features(config.extraction, look.record)
        job = FeatureJob(self._store, self._manifest, look.record, request, extraction, rows=rows)
        return job.plan().missing

    def _reused(self, look: Look) -> JudgedProbe | None:
        """The probe at the stage behind which `partial_reuse` puts its layers, or at the tap nearest to it.

        None where nothing is to be reused, and for a backbone without that stage.
        """
        reuse = self._config.network.reuse
        name = None if reuse is None else known_stage(look.record, reuse.after)
        if name is None:
            return None
        stage = look.record.axis[_index(look.record, name)]
        depth = stage.index / max(len(look.record.axis) - 1, 1)
        nearest: TapProbe = min(look.probes.taps, key=lambda probe: abs(probe.depth - depth))
        return look.probes.judged(nearest).model_copy(update={"tap": stage.name})


def _index(record: BackboneRecord, name: str) -> int:
    return next(stage.index for stage in record.axis if stage.name == name)
