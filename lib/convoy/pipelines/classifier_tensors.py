"""The tensors of classifiers: what makes logits of features, and the files of a bundle."""

from __future__ import annotations

import torch
from torch import nn

from convoy.core.fingerprints import canonical_json
from convoy.pipelines.backbone_loading import read_backbone_state
from convoy.pipelines.classifiers import BACKBONE_PREFIX, Classifier, StoredHead, classifier_config
from convoy.storage.object_store import ObjectStore
from convoy.vision.head_config import HEAD_PREFIX
from convoy.vision.heads import Head, head_to_state, readout_of
from convoy.vision.weights import read_state_dict, state_to_safetensors


def stored_head(head: Head) -> StoredHead:
    """A head as a classifier has it."""
    state = {HEAD_PREFIX + name: tensor for name, tensor in head_to_state(head).items()}
    return StoredHead(head.spec, state_to_safetensors(state))


class Readout:
    """What makes logits of the features of a classifier's tap; `module` is None where they are the logits.

    Raises DataError where the tensors of the head do not fit it.
    """

    def __init__(self, classifier: Classifier) -> None:
        head = classifier.head
        spec, tensors = (None, None) if head is None else (head.spec, head.tensors)
        self.module: nn.Module | None = readout_of(spec, tensors, classifier.output_groups)

    def logits(self, features_BD: torch.Tensor) -> torch.Tensor:
        """Float32 logits_BK for float32 features."""
        if self.module is None:
            return features_BD
        with torch.inference_mode():
            logits_BK: torch.Tensor = self.module(features_BD)
        return logits_BK


def classifier_files(store: ObjectStore, classifier: Classifier) -> dict[str, bytes]:
    """The files of a bundle that determine predictions; the network's weights are among them."""
    state = {
        BACKBONE_PREFIX + name: tensor
        for name, tensor in read_backbone_state(store, classifier.backbone).items()
    }
    if classifier.head is not None:
        state |= read_state_dict(classifier.head.tensors)
    preprocess = {
        "decode_rule": classifier.decode_rule.model_dump(mode="json"),
        "preset": classifier.backbone.preset.model_dump(mode="json"),
        "precision": classifier.precision.value,
        "dtype": classifier.dtype.value,
    }
    return {
        "model.safetensors": state_to_safetensors(state),
        "config.json": canonical_json(classifier_config(classifier)),
        "preprocess.json": canonical_json(preprocess),
        "classes.json": canonical_json(list(classifier.classes)),
    }
