"""A pretrained network is judged as it is where it has the dataset's classes, by name or by a map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from convoy.core.errors import ConfigError
from convoy.pipelines.advise_as_is import judge_as_is, own_classifier
from convoy.pipelines.advise_config import CandidateBackbone
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifiers import Classifier
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.models import fetch_backbone
from convoy.storage.local_store import LocalStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.presets import EvalPreset

NAMES = ("cat", "dog", "plane")


def candidate(**settings: Any) -> CandidateBackbone:
    preset = EvalPreset(resize_px=None, crop_px=32)
    backbone = BackboneConfig(arch="lenet5", weights="random", num_classes=len(NAMES), preset=preset)
    return CandidateBackbone(backbone=backbone, **settings)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> BackboneRecord:
    return fetch_backbone(LocalStore(str(tmp_path_factory.mktemp("workspace"))), candidate().backbone)


def own(record: BackboneRecord, wanted: tuple[str, ...], **settings: Any) -> Classifier | None:
    return own_classifier(candidate(**settings), record, wanted, ExtractionConfig())


def test_weights_that_do_not_say_their_classes_are_no_classifier(record: BackboneRecord) -> None:
    assert own(record, NAMES) is None
    # As torchvision has it of weights that are meant for features.
    assert own(record.model_copy(update={"classes": ()}), NAMES) is None


def test_weights_that_say_other_classes_are_none_either(record: BackboneRecord) -> None:
    knowing = record.model_copy(update={"classes": NAMES})
    assert own(knowing, ("cat", "ship")) is None
    assert own(knowing, ("cat", "plane")) is not None


def test_a_map_that_leaves_a_class_out_is_refused(record: BackboneRecord) -> None:
    with pytest.raises(ConfigError, match="no class 'animal'"):
        own(record, ("animal", "vehicle"), classes=NAMES, class_map={"plane": "vehicle"})


def test_outputs_are_judged_by_the_names_of_the_dataset(record: BackboneRecord) -> None:
    classes = ("vehicle", "animal")
    found = own(
        record, classes, classes=NAMES, class_map={"cat": "animal", "dog": "animal", "plane": "vehicle"}
    )
    assert found is not None
    # Two animals share what a plane has alone: their sum decides.
    outputs_MK = np.array([[2.0, 2.0, 2.3], [0, 0, 5.0], [4, 0, 1.0], [0, 0, 3.0]], np.float32)
    judged = judge_as_is(found, outputs_MK, np.array([1, 0, 1, 1]), np.ones(4), classes)
    assert (judged.num_correct, judged.num_rows) == (3, 4)
    assert judged.tap == record.resolve_tap("logits")
