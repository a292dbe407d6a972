"""Searches that are planned and not run: a workspace of digits, their config, and no pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_jobs import write_digits
from convoy.core.config import parse_config
from convoy.core.splits import SplitOptions
from convoy.pipelines.tune import TuneDrawers
from convoy.pipelines.tune_config import TuneConfig
from convoy.storage.datasets import freeze_dataset
from convoy.storage.local_store import LocalStore

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
