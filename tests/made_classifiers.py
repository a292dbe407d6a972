"""Small real classifiers of random weights, and bundles of them."""

from __future__ import annotations

from convoy.pipelines.backbone_loading import load_backbone
from convoy.pipelines.classifiers import Classifier, Strategy, classifier_files
from convoy.pipelines.feature_plan import FeatureDtype, PrecisionChoice
from convoy.storage.bundles import BundleRef, write_bundle
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.presets import EvalPreset

DIGITS = tuple("0123456789")


def made_classifier(store: ObjectStore, *, seed: int = 0, classes: tuple[str, ...] = DIGITS) -> Classifier:
    """A LeNet-5 with its own ten outputs, whose weights are in the workspace."""
    preset = EvalPreset(resize_px=None, crop_px=32)
    config = BackboneConfig(arch="lenet5", weights="random", seed=seed, preset=preset)
    backbone = load_backbone(store, config)
    return Classifier(
        strategy=Strategy.AS_IS,
        backbone=backbone,
        tap=backbone.resolve_tap("logits"),
        head=None,
        classes=classes,
        decode_rule=DecodeRule(),
        precision=PrecisionChoice.FP32,
        dtype=FeatureDtype.FLOAT32,
    )


def made_bundle(store: ObjectStore, name: str, *, seed: int, classes: tuple[str, ...] = DIGITS) -> BundleRef:
    """A bundle of such a classifier."""
    files = classifier_files(store, made_classifier(store, seed=seed, classes=classes))
    return write_bundle(store, name, files | {"metrics.json": b"{}", "README.md": b"made"})
