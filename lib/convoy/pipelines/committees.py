"""Committees as values: which networks vote with which weights over which crops; read from bundles, written to them.

An ensemble is a bundle of bundles: it names its members by digest, and holds no tensors of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from pydantic import Field, PositiveFloat, model_validator

from convoy.core.config import StrictModel
from convoy.core.crop_policies import Averaging, CropPlan
from convoy.core.errors import ConfigError, DataError
from convoy.core.fingerprints import canonical_json, digest
from convoy.pipelines.classifiers import Classifier, as_is, classifier_digest, read_classifier
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.models import fetch_backbone
from convoy.storage.bundles import ENSEMBLE_FILE, Bundle, BundleRef, open_bundle, write_bundle
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.committee_options import GateOptions

ENSEMBLE_FORMAT_VERSION = 1
# Weights that were scaled to sum 1 do so but for this much.
_ROUNDING = 1e-9


class MemberConfig(StrictModel):
    """A member by the name of a bundle, or a pretrained `backbone` as it is.

    Of a backbone `classes` names the outputs in order, where its weights do not, and `class_map` gives other names for
    them, or leaves some out. Weights count relative to each other.
    """

    bundle: str | None = None
    backbone: BackboneConfig | None = None
    classes: tuple[str, ...] | None = None
    class_map: dict[str, str] | None = None
    weight: PositiveFloat = 1.0
    temperature: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _one_network(self) -> Self:
        if (self.bundle is None) == (self.backbone is None):
            raise ValueError("give either bundle or backbone")
        if self.bundle is not None and (self.classes, self.class_map) != (None, None):
            raise ValueError("classes and class_map are for a backbone: a bundle has its own")
        return self


class EnsembleConfig(StrictModel):
    """Members that are averaged as they are named here, without a bundle of their own."""

    members: tuple[MemberConfig, ...] = Field(min_length=1)
    averaging: Averaging = Averaging.PROBABILITIES
    temperature: PositiveFloat = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitteeMember:
    """A classifier of a committee. `digest` is its bundle's, `bundle` the reference, where it has one."""

    name: str
    digest: str
    bundle: BundleRef | None
    classifier: Classifier
    weight: float
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitteeRecord:
    """Members whose weights sum to 1, the crops that each of them sees, and how all that is averaged.

    `gate` is the calibrated first look of the gated mode. Classes are those of the first member, in its order.
    """

    members: tuple[CommitteeMember, ...]
    plan: CropPlan = field(default_factory=CropPlan)
    averaging: Averaging = Averaging.PROBABILITIES
    temperature: float = 1.0
    gate: GateOptions | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the joint output."""
        return self.members[0].classifier.classes

    @property
    def gives_probabilities(self) -> bool:
        """Whether the softmax of the joint logits is a probability."""
        return all(member.classifier.gives_probabilities for member in self.members)

    @property
    def weights_bytes(self) -> int:
        """What the parameters of all members take in float32."""
        return sum(member.classifier.backbone.weights_bytes for member in self.members)

    @property
    def digest(self) -> str:
        """A digest of everything that determines predictions in the exact mode."""
        members = [[member.digest, member.weight, member.temperature] for member in self.members]
        return digest([members, self.plan, self.averaging, self.temperature])

    def with_plan(self, plan: CropPlan) -> CommitteeRecord:
        """The same members over other crops. A gate was calibrated for its own crops, and goes."""
        return self if plan == self.plan else replace(self, plan=plan, gate=None)

    def with_gate(self, gate: GateOptions) -> CommitteeRecord:
        """The same committee behind another gate."""
        return replace(self, gate=gate)


def committee_of(
    members: Sequence[CommitteeMember],
    *,
    plan: CropPlan | None = None,
    averaging: Averaging = Averaging.PROBABILITIES,
    temperature: float = 1.0,
    gate: GateOptions | None = None,
) -> CommitteeRecord:
    """A committee whose weights are scaled to sum 1.

    Raises ConfigError for members that do not have the same classes, that decode images by other rules, or whose
    scores are no probabilities where such are averaged.
    """
    total = sum(member.weight for member in members)
    # Scaled again, weights that were stored would differ in their last bits, and be another committee.
    divisor = 1.0 if abs(total - 1) < _ROUNDING else total
    scaled = tuple(replace(member, weight=member.weight / divisor) for member in members)
    first = scaled[0]
    for member in scaled[1:]:
        _require_same_classes(first, member)
        if member.classifier.decode_rule != first.classifier.decode_rule:
            raise ConfigError(
                f"{member.name} decodes images by another rule than {first.name}: one decode cannot serve both",
                where="ensemble.members",
                next_step="train them with the same extraction.decode",
            )
    if averaging is Averaging.PROBABILITIES:
        for member in scaled:
            if not member.classifier.gives_probabilities:
                raise ConfigError(
                    f"the scores of {member.name} are margins of a linear SVM: they cannot be averaged as"
                    " probabilities",
                    where="ensemble.averaging",
                    next_step="give it a softmax head, or average logits",
                )
    return CommitteeRecord(
        members=scaled,
        plan=plan or CropPlan(),
        averaging=averaging,
        temperature=temperature,
        gate=gate,
    )


def configured_committee(
    store: ObjectStore, config: EnsembleConfig, extraction: ExtractionConfig
) -> CommitteeRecord:
    """The committee that a config spells out."""
    members = [_configured_member(store, member, extraction) for member in config.members]
    return committee_of(members, averaging=config.averaging, temperature=config.temperature)


def single_committee(
    classifier: Classifier, *, name: str, digest: str, bundle: BundleRef | None = None
) -> CommitteeRecord:
    """A committee of one, whose crops are averaged as probabilities, or its margins as they are."""
    member = CommitteeMember(name=name, digest=digest, bundle=bundle, classifier=classifier, weight=1.0)
    averaging = Averaging.PROBABILITIES if classifier.gives_probabilities else Averaging.LOGITS
    return committee_of([member], averaging=averaging)


def open_committee(store: ObjectStore, reference: str) -> CommitteeRecord:
    """The committee of a bundle: of one for a single model, with its crops and gate for an ensemble."""
    bundle = open_bundle(store, reference)
    if not is_ensemble(bundle):
        classifier = read_classifier(store, bundle)
        return single_committee(classifier, name=str(bundle.ref), digest=bundle.ref.digest, bundle=bundle.ref)
    written = bundle.read_json(ENSEMBLE_FILE)
    if written.get("format_version") != ENSEMBLE_FORMAT_VERSION:
        raise DataError(
            f"the ensemble has format {written.get('format_version')}",
            where=bundle.ref.uri,
            next_step="upgrade Convoy, or build the ensemble again",
        )
    gate = written["gate"]
    return committee_of(
        [_written_member(store, bundle, member) for member in written["members"]],
        plan=CropPlan.model_validate(written["crops"]),
        averaging=Averaging(written["averaging"]),
        temperature=written["temperature"],
        gate=None if gate is None else GateOptions.model_validate(gate),
    )


def is_ensemble(bundle: Bundle) -> bool:
    """Whether a bundle is one of bundles."""
    return ENSEMBLE_FILE in bundle.files


def ensemble_files(committee: CommitteeRecord) -> dict[str, bytes]:
    """The files of an ensemble's bundle that determine predictions.

    Raises ConfigError for a member that is no bundle: its weights would not be kept.
    """
    members = []
    for member in committee.members:
        if member.bundle is None:
            raise ConfigError(
                f"{member.name} is no bundle, so an ensemble could not find it again",
                where="ensemble.members",
                next_step="make one of it: convoy train with strategy as_is",
            )
        members.append(
            {"bundle": str(member.bundle), "weight": member.weight, "temperature": member.temperature}
        )
    written = {
        "format_version": ENSEMBLE_FORMAT_VERSION,
        "members": members,
        "averaging": committee.averaging,
        "crops": committee.plan,
        "temperature": committee.temperature,
        "gate": committee.gate,
    }
    first = committee.members[0].classifier
    presets = {
        str(member.bundle): member.classifier.backbone.preset.model_dump(mode="json")
        for member in committee.members
    }
    return {
        ENSEMBLE_FILE: canonical_json(written),
        "config.json": canonical_json({"kind": "ensemble", "format_version": ENSEMBLE_FORMAT_VERSION}),
        "preprocess.json": canonical_json(
            {"decode_rule": first.decode_rule.model_dump(mode="json"), "presets": presets}
        ),
        "classes.json": canonical_json(list(committee.classes)),
    }


def write_ensemble(
    store: ObjectStore, name: str, committee: CommitteeRecord, *, metrics: Mapping[str, Any], card: str
) -> BundleRef:
    """Store a committee as a bundle; `metrics` and the `card` in Markdown describe it."""
    files = ensemble_files(committee)
    files["metrics.json"] = json.dumps(metrics, indent=2, sort_keys=True).encode()
    files["README.md"] = card.encode()
    return write_bundle(store, name, files)


def _configured_member(
    store: ObjectStore, config: MemberConfig, extraction: ExtractionConfig
) -> CommitteeMember:
    if config.backbone is not None:
        backbone = fetch_backbone(store, config.backbone)
        classifier = as_is(backbone, config.classes, extraction, class_map=config.class_map)
        return CommitteeMember(
            name=backbone.arch,
            digest=classifier_digest(classifier),
            bundle=None,
            classifier=classifier,
            weight=config.weight,
            temperature=config.temperature,
        )
    bundle = open_bundle(store, config.bundle or "")
    return _bundled_member(store, bundle, weight=config.weight, temperature=config.temperature)


def _written_member(store: ObjectStore, ensemble: Bundle, written: Mapping[str, Any]) -> CommitteeMember:
    try:
        bundle = open_bundle(store, written["bundle"])
    except DataError as error:
        raise DataError(
            f"a member of the ensemble cannot be opened: {error}",
            where=ensemble.ref.uri,
            next_step=f"bring {written['bundle']} back into the workspace, or build the ensemble again",
        ) from error
    return _bundled_member(store, bundle, weight=written["weight"], temperature=written["temperature"])


def _bundled_member(
    store: ObjectStore, bundle: Bundle, *, weight: float, temperature: float
) -> CommitteeMember:
    if is_ensemble(bundle):
        raise ConfigError(
            "an ensemble cannot be a member of another one",
            where=str(bundle.ref),
            next_step="name its members instead",
        )
    return CommitteeMember(
        name=str(bundle.ref),
        digest=bundle.ref.digest,
        bundle=bundle.ref,
        classifier=read_classifier(store, bundle),
        weight=weight,
        temperature=temperature,
    )


def _require_same_classes(first: CommitteeMember, member: CommitteeMember) -> None:
    mine, others = set(first.classifier.classes), set(member.classifier.classes)
    if mine == others:
        return
    named = [f"{first.name} alone knows {', '.join(sorted(mine - others)[:3])}"] if mine - others else []
    named += [f"{member.name} alone knows {', '.join(sorted(others - mine)[:3])}"] if others - mine else []
    raise ConfigError(
        f"members of an ensemble need the same classes: {'; '.join(named)}",
        where="ensemble.members",
        next_step="train them on the same classes, or give the outputs of a backbone other names with its class_map",
    )
