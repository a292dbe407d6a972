"""Searches that are planned and not run: a workspace of digits, their config, and no pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_jobs import write_digits
from convoy.core.config import parse_config
from convoy.core.splits import SplitOptions
from convoy.pipelines.tune import TuneDrawers
from convoy.pipelines.tune_config import TuneConfig
from convoy.storage.bundles import BundleRef
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.weights import state_to_safetensors
from made_bundles import made_classifier, write_classifier

DRAW = TuneDrawers(training=lambda _: b"", space=lambda _: b"", trials=lambda _: b"", ensemble=lambda _: b"")


def store_of_digits(folder: Path) -> LocalStore:
    """A workspace with 30 images as the dataset `digits`, some for validation."""
    write_digits(folder / "images", 30)
    store = LocalStore(str(folder / "workspace"))
    freeze_dataset(store, "digits", str(folder / "images"), splits=SplitOptions(val_fraction=0.3))
    return store


def config_in(store: LocalStore, *, search: dict[str, Any] | None = None, **base: Any) -> TuneConfig:
    """Three trainings of a LeNet-5 from scratch; `base` and the `search` itself as given."""
    network = {"backbone": {"arch": "lenet5", "weights": "random"}, "strategy": "from_scratch"}
    settings = {
        "workspace": store.root_uri,
        "name": "search",
        "dataset": "digits",
        "base": {**network, **base},
        "space": {"recipe.seed": {"grid": [0, 1, 2]}},
        **(search or {}),
    }
    return parse_config(TuneConfig, settings, where="test")


def write_lenet(file: Path, seed: int, *, num_classes: int) -> None:
    """A file of a LeNet-5's random weights."""
    config = BackboneConfig(arch="lenet5", weights="random", num_classes=num_classes, seed=seed)
    file.write_bytes(state_to_safetensors(build_network(config).state_dict()))


def write_teacher(store: LocalStore, seed: int) -> BundleRef:
    """The bundle `photos`, which knows the classes of the digits."""
    classes = open_dataset(store, "digits").classes
    return write_classifier(store, "photos", made_classifier(store, seed, classes=classes))
