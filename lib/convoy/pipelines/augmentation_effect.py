"""What augmentation does on the user's own images: the gain or loss of each kind at each strength, with intervals."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Self

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from convoy.core.config import StrictModel
from convoy.core.progress import Progress
from convoy.core.statistics import Interval, wilson_interval
from convoy.pipelines.augmentation_outcomes import (
    NamedPolicy,
    PolicyEffect,
    PolicyOutcome,
    judge_outcomes,
)
from convoy.pipelines.augmentation_probes import ViewProbes
from convoy.pipelines.augmentation_trainings import FineTunings, ShortFineTuning
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.feature_plan import ExtractionConfig, ManyPolicies
from convoy.pipelines.network_training import CurveDrawer
from convoy.pipelines.pixel_statistics import resolve_augmentation
from convoy.pipelines.probe_judging import LEAST_JUDGED, ProbeRows
from convoy.pipelines.training_rows import RowLimit
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.augmentation_strengths import AugmentationKind, Strength, policy_of
from convoy.vision.head_config import HeadConfig, HeadKind

_OWN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class EffectBudget(StrEnum):
    """By what a policy is judged: a linear probe on cached views, or a short fine-tuning of the network."""

    PROBE = "probe"
    FINE_TUNE = "fine_tune"


class AugmentationEffectConfig(StrictModel):
    """Which kinds at which strengths, and by what they are judged.

    `policies` are the user's own, by names of theirs, measured beside the kinds as they are. A probe learns from the
    eval view and from `views` drawn ones of at most `rows.max_per_class` images a class, by the features of `tap`;
    it is judged on the eval view of at most `max_judged` rows of `val`, or of a fifth of `train` where `val` has fewer
    than `least_judged` rows, or rows of one class only: null are all, and in advice as many as judge the backbones.
    Fine-tunings are judged on all of them. Advice learns from no images that its own `rows` leave out, and takes
    `least_judged` from its `look`.
    """

    kinds: tuple[AugmentationKind, ...] = tuple(AugmentationKind)
    strengths: Annotated[tuple[Strength, ...], Field(min_length=1)] = tuple(Strength)
    policies: dict[str, AugmentationPolicy] = Field(default_factory=dict)
    budget: EffectBudget = EffectBudget.PROBE
    rows: RowLimit = RowLimit(max_per_class=300)
    least_judged: PositiveInt = LEAST_JUDGED
    max_judged: PositiveInt | None = None
    views: PositiveInt = 2
    tap: str | int = "pooled"
    head: HeadConfig = HeadConfig(C=(1e-4, 1e-3, 1e-2, 1e-1, 1.0), gradient_tolerance=1e-4)
    fine_tuning: ShortFineTuning = ShortFineTuning()

    @model_validator(mode="after")
    def _can_be_measured(self) -> Self:
        if self.head.kind is HeadKind.MLP:
            raise ValueError("probes are linear: choose the head softmax or linear_svm")
        if not self.kinds and not self.policies:
            raise ValueError("name a kind, or give a policy of your own: else there is nothing to measure")
        for name in self.policies:
            if not _OWN_NAME.fullmatch(name) or name in tuple(AugmentationKind):
                raise ValueError(
                    f"'{name}' cannot name a policy: take a-z, 0-9, '_' and '-', and none of the kinds' names"
                )
        return self


class AugmentationEffect(StrictModel):
    """What each policy does to a backbone on a dataset, in the order kinds, strengths, policies of the user's own.

    `without` is the top-1 of what learnt without augmentation, on the judged rows. Intervals are 95 % and speak of
    other rows like these, not of other draws of the views. `warnings` are those of the effects.
    """

    dataset: str
    arch: str
    weights_digest: str
    budget: EffectBudget
    tap: str | None
    views: int | None
    num_train_rows: int
    num_judged_rows: int
    without: Interval
    effects: list[PolicyEffect]
    warnings: list[str]
    seconds: float


def measure_augmentation(
    store: ObjectStore,
    manifest: Manifest,
    dataset: str,
    backbone: BackboneRecord,
    config: AugmentationEffectConfig,
    extraction: ExtractionConfig,
    *,
    progress: Progress,
    draw_curves: CurveDrawer,
) -> AugmentationEffect:
    """The effect of each kind and strength of the config, and of the user's own policies.

    Drawn views stay in the feature cache and trainings in the workspace, so the same call again only judges.
    `draw_curves` makes the pictures of fine-tunings. Raises DataError for a class without training images.
    """
    started_s = time.monotonic()
    by_probe = config.budget is EffectBudget.PROBE
    rows = ProbeRows.of(
        manifest,
        config.rows,
        least_judged=config.least_judged,
        max_judged=config.max_judged if by_probe else None,
    )
    policies = []
    for named in named_policies(config, crop_px=backbone.preset.crop_px):
        policy = resolve_augmentation(store, manifest, dataset, named.policy, extraction.decode, progress)
        policies.append(named.model_copy(update={"policy": policy}))
    if by_probe:
        request = ManyPolicies(
            dataset=dataset, backbone=backbone.config, taps=(config.tap,), views=config.views + 1, policies=()
        )
        probes = ViewProbes(store, manifest, rows, request, extraction, config.head)
        outcomes = probes.outcomes(backbone, policies, progress=progress)
    else:
        trainings = FineTunings(
            store, manifest, dataset, rows.limit, config.fine_tuning, extraction, draw_curves
        )
        outcomes = trainings.outcomes(backbone, policies, progress=progress)
    effects = judge_outcomes(outcomes, manifest.classes)
    return AugmentationEffect(
        dataset=dataset,
        arch=backbone.arch,
        weights_digest=backbone.weights_digest,
        budget=config.budget,
        tap=backbone.resolve_tap(config.tap) if by_probe else None,
        views=config.views if by_probe else None,
        num_train_rows=len(rows.train),
        num_judged_rows=len(rows.judged),
        without=_without(outcomes),
        effects=effects,
        warnings=[effect.warning for effect in effects if effect.warning],
        seconds=time.monotonic() - started_s,
    )


def named_policies(config: AugmentationEffectConfig, *, crop_px: int) -> list[NamedPolicy]:
    """The policies that a config asks for, for crops of that size."""
    kinds = [
        NamedPolicy(name=kind.value, strength=strength, policy=policy_of(kind, strength, crop_px=crop_px))
        for kind in config.kinds
        for strength in config.strengths
    ]
    own = [NamedPolicy(name=name, strength=None, policy=policy) for name, policy in config.policies.items()]
    return [*kinds, *own]


def _without(outcomes: Sequence[PolicyOutcome]) -> Interval:
    first = outcomes[0]
    known_N = first.without_N >= 0
    num_correct = int(np.count_nonzero(first.without_N == first.labels_N))
    return wilson_interval(num_correct, int(np.count_nonzero(known_N)))
