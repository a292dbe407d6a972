"""Whether a pretrained network has a dataset's classes already, and what it is then worth as it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from convoy.core.errors import ConfigError
from convoy.pipelines.advise_config import CandidateBackbone
from convoy.pipelines.advise_rule import JudgedProbe
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifier_tensors import Readout
from convoy.pipelines.classifiers import Classifier, as_is
from convoy.pipelines.feature_plan import ExtractionConfig


def own_classifier(
    candidate: CandidateBackbone, record: BackboneRecord, classes: Sequence[str], extraction: ExtractionConfig
) -> Classifier | None:
    """The network as it is, or None where it does not know the classes.

    Raises ConfigError where the candidate's `classes` or `class_map` were given and leave one of them out.
    """
    is_named = candidate.classes is not None or candidate.class_map is not None
    if not is_named and not record.classes:
        return None
    classifier = as_is(record, candidate.classes, extraction, class_map=candidate.class_map)
    missing = sorted(set(classes) - set(classifier.classes))
    if not missing:
        return classifier
    if is_named:
        raise ConfigError(
            f"{candidate.name} as it is has no class '{missing[0]}' ({len(missing)} of {len(classes)} missing)",
            where="candidates",
            next_step="map outputs of the network to every class of the dataset, or leave class_map and classes out",
        )
    return None


def judge_as_is(
    classifier: Classifier,
    outputs_MD: np.ndarray,
    labels_M: np.ndarray,
    weights_M: np.ndarray,
    classes: Sequence[str],
) -> JudgedProbe:
    """How many judged rows the network gets right, by its outputs; `labels_M` index the dataset's classes."""
    logits_MK = Readout(classifier).logits(torch.from_numpy(outputs_MD))
    own_M = np.array([classifier.classes.index(name) for name in classes])[labels_M]
    return JudgedProbe.of(classifier.tap, logits_MK.argmax(dim=1).numpy() == own_M, weights_M)
