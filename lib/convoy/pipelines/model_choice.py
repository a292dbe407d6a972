"""Which model a job looks with, and how it looks at an image: what evaluations and scorings are told alike."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from convoy.core.config import StrictModel
from convoy.core.crop_policies import CropPlan, CropPolicy, EvaluationMode, MultiscaleCrops
from convoy.pipelines.classifiers import as_is, classifier_digest
from convoy.pipelines.committees import (
    CommitteeRecord,
    EnsembleConfig,
    configured_committee,
    open_committee,
    single_committee,
)
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.models import fetch_backbone
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.committee_options import GateOptions


class PretrainedModel(StrictModel):
    """A pretrained network as it is. `classes` names its outputs in order, where its weights do not."""

    backbone: BackboneConfig
    classes: tuple[str, ...] | None = None


class LookSettings(StrictModel):
    """How an image is looked at.

    `crops` are those that every network sees of an image (null: an ensemble's own, else the centre), `multiscale`
    those of that policy. `gate` takes the place of an ensemble's own in the mode `gated`.
    """

    crops: CropPolicy | None = None
    multiscale: MultiscaleCrops = MultiscaleCrops()
    mode: EvaluationMode = EvaluationMode.EXACT
    gate: GateOptions | None = None


class ModelChoice(StrictModel):
    """Exactly one of a `bundle` of the workspace, a pretrained `model`, or an `ensemble` of such.

    A bundle's bare name is the one written last, also a held candidate; `name@champion` is the one that passed.
    """

    bundle: str | None = None
    model: PretrainedModel | None = None
    ensemble: EnsembleConfig | None = None

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if sum(given is not None for given in (self.bundle, self.model, self.ensemble)) != 1:
            raise ValueError("give either bundle, model or ensemble")
        return self


def chosen_committee(
    store: ObjectStore, choice: ModelChoice, looks: LookSettings, extraction: ExtractionConfig
) -> CommitteeRecord:
    """The chosen model as a committee over the chosen crops, behind the chosen gate."""
    if choice.ensemble is not None:
        committee = configured_committee(store, choice.ensemble, extraction)
    elif choice.model is not None:
        backbone = fetch_backbone(store, choice.model.backbone)
        classifier = as_is(backbone, choice.model.classes, extraction)
        committee = single_committee(classifier, name=backbone.arch, digest=classifier_digest(classifier))
    else:
        committee = open_committee(store, choice.bundle or "")
    if looks.crops is not None:
        committee = committee.with_plan(CropPlan(policy=looks.crops, multiscale=looks.multiscale))
    return committee if looks.gate is None else committee.with_gate(looks.gate)
