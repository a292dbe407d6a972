"""Bundles of small random networks, as trainings would leave them, and a job that evaluates them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cache_jobs import CacheJob, made_job
from convoy.pipelines.classifier_tensors import classifier_files, stored_head
from convoy.pipelines.classifiers import Classifier, Strategy, as_is
from convoy.pipelines.feature_plan import ExtractionConfig, PrecisionChoice
from convoy.pipelines.models import fetch_backbone
from convoy.storage.bundles import BundleRef, write_bundle
from convoy.storage.object_store import ObjectStore
from convoy.storage.stores import open_store
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.head_config import HeadKind, HeadSpec
from convoy.vision.heads import Head
from convoy.vision.presets import EvalPreset

DIGITS = tuple(str(digit) for digit in range(10))
FP32 = ExtractionConfig(precision=PrecisionChoice.FP32)
LENET_FEATURES = 84


def made_classifier(
    store: ObjectStore,
    seed: int,
    *,
    classes: Sequence[str] = DIGITS,
    head: HeadKind | None = None,
    extraction: ExtractionConfig = FP32,
) -> Classifier:
    """A LeNet-5 of random weights as it is, or under a head of random weights."""
    preset = EvalPreset(resize_px=None, crop_px=32)
    config = BackboneConfig(
        arch="lenet5", weights="random", seed=seed, num_classes=len(classes), preset=preset
    )
    backbone = fetch_backbone(store, config)
    if head is None:
        return as_is(backbone, tuple(classes), extraction)
    torch.manual_seed(seed)
    spec = HeadSpec(kind=head, num_features=LENET_FEATURES, num_classes=len(classes))
    return Classifier(
        strategy=Strategy.LINEAR_PROBE,
        backbone=backbone,
        tap=backbone.resolve_tap("f6"),
        head=stored_head(Head(spec)),
        classes=tuple(classes),
        decode_rule=extraction.decode,
        precision=extraction.precision,
        dtype=extraction.dtype,
    )


def write_classifier(store: ObjectStore, name: str, classifier: Classifier) -> BundleRef:
    """The classifier as a bundle, with metrics that nobody measured."""
    described = {"metrics.json": b'{"top1":0.5,"splits":["test"]}', "README.md": b"# made\n"}
    return write_bundle(store, name, {**classifier_files(store, classifier), **described})


def made_committee_job(folder: Path) -> CacheJob:
    """The evaluation of two networks over two crops of 96 digits in 6 slices, one of which is a reject."""
    job = made_job(folder)
    store = open_store(job.workspace)
    for seed, name in enumerate(("one", "two")):
        write_classifier(store, name, made_classifier(store, seed))
    settings = (
        "dataset=digits",
        "splits=[train, val, test]",
        "ensemble={members: [{bundle: one}, {bundle: two, weight: 2}]}",
        "crops=flip",
        "extraction={batch_size: 16, slice_rows: 16}",
    )
    return replace(job, verb="evaluate", settings=settings)
