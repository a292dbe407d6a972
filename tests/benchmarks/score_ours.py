"""Convoy, as a user runs it: `convoy dataset`, then `convoy score`, in a fresh workspace."""

from __future__ import annotations

import io
import json
import secrets
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from job_processes import ProcessSampler, memory_growth, share_of_others
from measuring import WayResult, WaySettings, convoy, save_features
from our_rate import steady_rate
from score_network import ScoredNetwork

from convoy.core.config import load_config
from convoy.pipelines.feature_plan import PrecisionChoice
from convoy.storage.commits import SliceRecord, read_records
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store

_REPORTED = ("job_s", "first_row_s", "seconds", "notes", "actual")


class OursSettings(WaySettings):
    """The network, and what it computes in. The workspace lies below the URI `root`, null: in a folder of its own."""

    network: ScoredNetwork
    precision: PrecisionChoice = PrecisionChoice.AUTO
    root: str | None = None


def run_ours(settings: OursSettings) -> WayResult:
    """Freeze the images and score them, logits included.

    The steady rate is that of all slices but the first, parts written; `job_images_per_s` is the job's own, from the
    start of its first slice to the end of its last. `first_row_s` counts from the launch
    of `convoy score`, `wall_s` from that of `convoy dataset`.
    """
    with TemporaryDirectory(prefix="convoy-bench-score-") as folder:
        workspace = f"{settings.root}/workspace-{secrets.token_hex(4)}" if settings.root else folder
        config = Path(folder, "score.yaml")
        config.write_text(json.dumps(_config(settings)), encoding="utf-8")
        started_s = time.time()
        convoy("dataset", settings.images, "--name", "images", "--workspace", workspace)
        launched_unix_s = time.time()
        with ProcessSampler() as sampler:
            report = convoy("score", "--config", str(config), "--workspace", workspace)
        finished_s = time.time()
        store = open_store(workspace)
        records = read_records(RunFolder(store, report["run"]))
        _save_logits(store, records, settings.features)
    return WayResult(
        num_images=report["recomputed"],
        images_per_s=steady_rate(records),
        first_row_s=min(one.first_row_unix_s for one in records) - launched_unix_s,
        wall_s=finished_s - started_s,
        details={
            "dataset_s": launched_unix_s - started_s,
            "job_images_per_s": report["images_per_s"],
            "memory_growth": memory_growth(sampler.samples, records),
            "others_share": share_of_others(sampler.samples, records),
            "memory_s_driver_workers_mib": [
                (round(one.at_unix_s - launched_unix_s, 2), round(one.driver_mib), round(one.workers_mib))
                for one in sampler.samples
            ],
            **{name: report[name] for name in _REPORTED},
        },
    )


def _config(settings: OursSettings) -> dict[str, Any]:
    return {
        # Swift has no atomic conditional PUT.
        "writers": "many" if settings.root is None else "single",
        "dataset": "images",
        "model": settings.network.scored_model,
        "columns": {"outputs": "logits"},
        "extraction": {"batch_size": settings.batch_size, "precision": settings.precision.value},
    }


def _save_logits(store: ObjectStore, records: list[SliceRecord], path: str) -> None:
    keys = [part.key for record in records for part in record.parts.values()]
    parts = [pq.read_table(io.BytesIO(store.get(key).data), columns=["sample_id", "logits"]) for key in keys]
    rows = pa.concat_tables(parts)
    names = [Path(sample_id).name for sample_id in rows["sample_id"].to_pylist()]
    save_features(path, names, np.array(rows["logits"].to_pylist(), np.float32))


if __name__ == "__main__":
    print(run_ours(load_config(OursSettings, None, sys.argv[1:])).model_dump_json())
