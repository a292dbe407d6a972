"""`convoy retrain` with images, workspace, aliases and lease on a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cache_jobs import write_digits
from command_lines import convoy_here, last_json, settings_arguments
from convoy.storage.registry import Alias, read_aliases
from convoy.storage.retrains import RetrainFolder
from convoy.storage.stores import open_store
from retrain_jobs import NAME, OPEN_GATE, SETTINGS
from train_jobs import put_images

pytestmark = pytest.mark.integration


def test_a_model_is_kept_up_to_date_on_s3(ray_on_s3: dict[str, str], s3_bucket: str, tmp_path: Path) -> None:
    assert ray_on_s3
    workspace = f"s3://{s3_bucket}/workspace"

    def retrained(date: str) -> Any:
        source = json.dumps(f"s3://{s3_bucket}/images")
        # The test server does not keep create-if-absent atomic.
        settings = settings_arguments(f"source={source}", *SETTINGS, OPEN_GATE, "writers=single")
        finished = convoy_here("retrain", "--workspace", workspace, "--date", date, *settings, "--json")
        assert finished.returncode == 0, finished.stderr
        return last_json(finished)

    def arrive(start: int, num_images: int) -> None:
        write_digits(tmp_path / str(start), num_images, start=start)
        put_images(tmp_path / str(start), s3_bucket)

    arrive(0, 200)
    first = retrained("2026-01-01")
    assert (first["decision"], first["recomputed"]) == ("promoted", 200)
    arrive(200, 100)
    second = retrained("2026-01-02")
    assert (second["decision"], second["recomputed"]) == ("promoted", 100)
    assert (second["previous"], second["holdout_rows"]) == (first["champion"], first["holdout_rows"])
    assert retrained("2026-01-02") == second
    assert retrained("2026-01-03")["decision"] == "nothing_new"

    store = open_store(workspace)
    record = read_aliases(store, NAME)
    assert record.aliases[Alias.CHAMPION] == second["champion"].partition("@")[2]
    assert [entry.run for entry in record.history] == [f"retrains/{NAME}/2026-01-0{day}" for day in (1, 2)]
    assert RetrainFolder(store, NAME).decided_dates() == ["2026-01-01", "2026-01-02", "2026-01-03"]
