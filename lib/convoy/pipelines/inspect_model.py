"""The model that an inspection looks into: a bundle of the workspace, or a pretrained network as it is."""

from __future__ import annotations

from dataclasses import dataclass

from convoy.pipelines.classifiers import Classifier, as_is, classifier_digest, read_classifier
from convoy.pipelines.inspect_config import InspectConfig
from convoy.pipelines.models import fetch_backbone
from convoy.storage.bundles import open_bundle
from convoy.storage.object_store import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedModel:
    """A classifier, its name and digest."""

    name: str
    digest: str
    classifier: Classifier


def open_model(store: ObjectStore, config: InspectConfig) -> InspectedModel:
    """The model of a config. Raises ConfigError for an ensemble: its members are looked into one by one."""
    if config.model is not None:
        backbone = fetch_backbone(store, config.model.backbone)
        classifier = as_is(
            backbone, config.model.classes, config.extraction, class_map=config.model.class_map
        )
        return InspectedModel(name=backbone.arch, digest=classifier_digest(classifier), classifier=classifier)
    bundle = open_bundle(store, config.bundle or "")
    classifier = read_classifier(store, bundle)
    return InspectedModel(name=str(bundle.ref), digest=bundle.ref.digest, classifier=classifier)
