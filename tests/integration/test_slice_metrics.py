"""What a job tells Ray's own metrics, read where Prometheus reads them."""

from __future__ import annotations

import logging
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from cache_jobs import CacheJob, made_job
from convoy.core.config import load_config
from convoy.core.progress import Silent
from convoy.pipelines.cache import CacheConfig, run_cache
from convoy.storage.commits import read_manifest
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store

pytestmark = pytest.mark.integration

_REPORTED_WITHIN_S = 30.0


@pytest.fixture
def metrics_url() -> Iterator[str]:
    """A Ray in this process that reports its metrics twice a second, and where they are read."""
    fast = {"metrics_report_interval_ms": 500}
    ray.init("local", include_dashboard=False, logging_level=logging.ERROR, _system_config=fast)
    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def read_samples(url: str, run: str) -> dict[str, float]:
    """The samples of a run, by their names, with the reject code behind it where there is one."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        ":".join(filter(None, [sample.name, sample.labels.get("code")])): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("run") == run and sample.labels.get("verb") == "cache"
    }


def test_prometheus_reads_images_rejects_bytes_and_slices_of_a_run(metrics_url: str, tmp_path: Path) -> None:
    job: CacheJob = made_job(tmp_path)
    config = load_config(CacheConfig, None, [f"workspace={job.workspace}", *job.settings])
    report = run_cache(config, progress=Silent())
    assert report.run is not None
    manifest = read_manifest(RunFolder(open_store(job.workspace), report.run))
    assert manifest is not None
    ((code, number),) = report.reject_codes.items()
    expected = {
        "ray_convoy_images_total": job.num_images,
        f"ray_convoy_rejects_total:{code}": number,
        "ray_convoy_bytes_read_total": sum(one.bytes_read for one in manifest.slices),
        "ray_convoy_bytes_written_total": sum(
            file.size_bytes for one in manifest.slices for file in one.files
        ),
        "ray_convoy_slice_seconds_count": len(manifest.slices),
        "ray_convoy_slices_left": 0,
    }
    images = Path(tmp_path, "images").rglob("*.jpg")
    assert expected["ray_convoy_bytes_read_total"] == sum(path.stat().st_size for path in images)
    deadline_s = time.monotonic() + _REPORTED_WITHIN_S
    found: dict[str, float] = {}
    while time.monotonic() < deadline_s and not expected.items() <= found.items():
        time.sleep(0.5)
        found = read_samples(metrics_url, report.run)
    assert {name: found.get(name) for name in expected} == expected
