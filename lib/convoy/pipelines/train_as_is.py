"""A pretrained network as it is, for a dataset whose classes it knows."""

from __future__ import annotations

from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifiers import Classifier, as_is, class_indices
from convoy.pipelines.train_config import TrainConfig
from convoy.storage.manifests import Manifest


def as_is_for(manifest: Manifest, config: TrainConfig, backbone: BackboneRecord) -> Classifier:
    """The classifier of a config with the strategy `as_is`; ConfigError where it does not know all classes."""
    classifier = as_is(backbone, config.classes, config.extraction, class_map=config.class_map)
    class_indices(
        manifest.classes,
        classifier.classes,
        model=backbone.arch,
        next_step="give its outputs the names of the dataset's classes: `classes` names all in order, `class_map` some;"
        " or train a head on its features, with the strategy linear_probe or fine_tune",
    )
    return classifier
