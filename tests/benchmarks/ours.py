"""Convoy, as a user runs it: `convoy dataset`, then `convoy cache`, in a fresh workspace."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from job_processes import ProcessSampler, share_of_others
from measuring import WayResult, WaySettings, convoy, save_features
from our_rate import steady_rate

from convoy.core.config import load_config
from convoy.pipelines.feature_plan import FeatureDtype, PrecisionChoice
from convoy.storage.commits import read_records
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.feature_reading import features_array
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store

# Of the job's own report; there, `first_row_s` counts from the start of the job, after all imports.
_REPORTED = ("job_s", "first_row_s", "seconds", "precision", "precision_effect", "notes")


class OursSettings(WaySettings):
    """How features are computed and stored; the defaults are those of `convoy cache`."""

    precision: PrecisionChoice = PrecisionChoice.AUTO
    dtype: FeatureDtype = FeatureDtype.FLOAT16


def run_ours(settings: OursSettings) -> WayResult:
    """Freeze the images and cache their pooled features.

    The steady rate is that of all slices but the first, parts written; `job_images_per_s` is the job's own, from the
    start of its first slice to the end of its last. `first_row_s` counts from the launch
    of `convoy cache`, `wall_s` from that of `convoy dataset`.
    """
    with TemporaryDirectory(prefix="convoy-bench-workspace-") as workspace:
        started_s = time.time()
        convoy("dataset", settings.images, "--name", "images", "--workspace", workspace)
        launched_unix_s = time.time()
        with ProcessSampler() as sampler:
            report = convoy("cache", "--workspace", workspace, *_cache_overrides(settings))
        finished_s = time.time()
        store = open_store(workspace)
        _save_features(store, report, settings.features)
        records = read_records(RunFolder(store, report["run"]))
    return WayResult(
        num_images=report["recomputed"],
        images_per_s=steady_rate(records),
        first_row_s=min(one.first_row_unix_s for one in records) - launched_unix_s,
        wall_s=finished_s - started_s,
        details={
            "dataset_s": launched_unix_s - started_s,
            "job_images_per_s": report["images_per_s"],
            "others_share": share_of_others(sampler.samples, records),
            **{name: report[name] for name in _REPORTED},
        },
    )


def _cache_overrides(settings: OursSettings) -> list[str]:
    overrides = {
        "dataset": "images",
        "backbone.arch": "torchvision:resnet18",
        "backbone.weights": "random",
        "extraction.batch_size": settings.batch_size,
        "extraction.precision": settings.precision.value,
        "extraction.dtype": settings.dtype.value,
    }
    return [argument for key, value in overrides.items() for argument in ("--set", f"{key}={value}")]


def _save_features(store: ObjectStore, report: dict[str, Any], path: str) -> None:
    (set_id,) = report["sets"].values()
    tables = list(FeatureCache(store).iter_parts(set_id, ["sample_id", "features"]))
    names = [Path(sample_id).name for table in tables for sample_id in table["sample_id"].to_pylist()]
    features_BD = np.concatenate([features_array(table["features"]) for table in tables])
    save_features(path, names, features_BD.astype(np.float32))


if __name__ == "__main__":
    print(run_ours(load_config(OursSettings, None, sys.argv[1:])).model_dump_json())
