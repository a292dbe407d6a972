"""Which model a job looks with, and how it looks at an image: what evaluations and scorings are told alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from convoy.storage.bundles import resolve_bundle
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import OpenRun
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.committee_options import GateOptions

# What a run's settings remember the meaning of its config's references under.
REFERENCES = "references"
_WHICH = {"bundle", "model", "ensemble"}


class PretrainedModel(StrictModel):
    """A pretrained network as it is.

    `classes` names its outputs in order, where its weights do not; `class_map` gives other names for them, or leaves
    some out.
    """

    backbone: BackboneConfig
    classes: tuple[str, ...] | None = None
    class_map: dict[str, str] | None = None


class ViewSettings(StrictModel):
    """How an image is looked at.

    `crops` are those that every network sees of an image (null: an ensemble's own, else the centre), `multiscale`
    those of that policy. `gate` takes the place of an ensemble's own in the mode `gated`.
    """

    crops: CropPolicy | None = None
    multiscale: MultiscaleCrops = MultiscaleCrops()
    mode: EvaluationMode = EvaluationMode.EXACT
    gate: GateOptions | None = None

    @model_validator(mode="after")
    def _multiscale_is_chosen(self) -> Self:
        # Beside other crops it may stand in a config whose `crops` were replaced on the command line.
        if self.crops is None and self.multiscale != MultiscaleCrops():
            raise ValueError(
                "multiscale says nothing without `crops`: set crops to multiscale, or leave it out"
            )
        return self


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

    @property
    def in_words(self) -> str:
        """What an error calls the model."""
        if self.model is not None:
            return self.model.backbone.arch
        return "the ensemble" if self.bundle is None else f"the bundle {self.bundle}"

    def references_for(
        self, store: ObjectStore, open_run: OpenRun, *, new_run: bool = False
    ) -> tuple[dict[str, str], list[str]]:
        """What each reference to a bundle means, as `name@digest`, and a note where that is not what it names now.

        An unfinished run that the same choice began is ended with the bundles that it has: an alias may have moved
        since. Else, and with `new_run`, references mean what they name now.
        """
        now = {reference: str(resolve_bundle(store, reference)) for reference in self._references()}
        begun = {} if open_run.begins_anew(new_run) else self._begun_references(open_run)
        notes = [
            f"an unfinished run goes on, with {meant} for {reference}; once it has ended, the same command takes"
            f" {now[reference]}"
            for reference, meant in begun.items()
            if meant != now[reference]
        ]
        return begun or now, notes

    def naming(self, meant: Mapping[str, str]) -> Self:
        """The same choice, its bundles named by what `references_for` said of them."""
        changes: dict[str, object] = {}
        if self.bundle is not None:
            changes["bundle"] = meant[self.bundle]
        if self.ensemble is not None:
            members = tuple(
                member
                if member.bundle is None
                else member.model_copy(update={"bundle": meant[member.bundle]})
                for member in self.ensemble.members
            )
            changes["ensemble"] = self.ensemble.model_copy(update={"members": members})
        return self.model_copy(update=changes)

    def _references(self) -> Iterator[str]:
        if self.bundle is not None:
            yield self.bundle
        if self.ensemble is not None:
            yield from (member.bundle for member in self.ensemble.members if member.bundle is not None)

    def _begun_references(self, open_run: OpenRun) -> dict[str, str]:
        record = open_run.begun_with(self.model_dump(mode="json", include=_WHICH))
        references: dict[str, str] = {} if record is None else record.settings.get(REFERENCES, {})
        return references


def chosen_committee(
    store: ObjectStore, choice: ModelChoice, looks: ViewSettings, extraction: ExtractionConfig
) -> CommitteeRecord:
    """The chosen model as a committee over the chosen crops, behind the chosen gate."""
    if choice.ensemble is not None:
        committee = configured_committee(store, choice.ensemble, extraction)
    elif choice.model is not None:
        backbone = fetch_backbone(store, choice.model.backbone)
        classifier = as_is(backbone, choice.model.classes, extraction, class_map=choice.model.class_map)
        committee = single_committee(classifier, name=backbone.arch, digest=classifier_digest(classifier))
    else:
        committee = open_committee(store, choice.bundle or "")
    if looks.crops is not None:
        committee = committee.with_plan(CropPlan(policy=looks.crops, multiscale=looks.multiscale))
    return committee if looks.gate is None else committee.with_gate(looks.gate)
