"""A search in the hands of one driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache_jobs import write_digits
from convoy.core.config import parse_config
from convoy.core.errors import LeaseHeld
from convoy.core.fingerprints import digest
from convoy.core.progress import Silent
from convoy.core.splits import SplitOptions
from convoy.pipelines.tune import TuneDrawers, run_tune
from convoy.pipelines.tune_config import TuneConfig
from convoy.storage.datasets import freeze_dataset
from convoy.storage.leases import hold_run
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import OpenRun

DRAW = TuneDrawers(
    training=lambda history: b"",
    space=lambda records: b"",
    trials=lambda records: b"",
    ensemble=lambda report: b"",
)


def test_a_search_that_is_at_work_is_refused_to_a_second_driver(tmp_path: Path) -> None:
    write_digits(tmp_path / "images", 30)
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(store, "digits", str(tmp_path / "images"), splits=SplitOptions(val_fraction=0.3))
    settings = {
        "workspace": store.root_uri,
        "name": "search",
        "dataset": "digits",
        "base": {"backbone": {"arch": "lenet5", "weights": "random"}, "strategy": "from_scratch"},
        "space": {"recipe.seed": {"grid": [0, 1, 2]}},
    }
    config = parse_config(TuneConfig, settings, where="test")
    folder = OpenRun(store, verb="tune", target=digest([config.name])).start()
    with (
        hold_run(folder, ttl_s=1.5),
        pytest.raises(LeaseHeld, match="another driver works on this run: process "),
    ):
        run_tune(config, progress=Silent(), draw=DRAW)
    assert folder.record() is None
