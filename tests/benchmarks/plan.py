"""`convoy bench plan`: what planning a run costs the driver as the manifest grows: seconds, and memory at its peak.

    python tests/benchmarks/plan.py [key=value ...]

Progress goes to stderr; the last line on stdout is the report as JSON. The keys are the fields of `PlanBench`.
It needs Linux, which accounts for the memory of a process in /proc.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from machine import machine_facts
from measuring import BenchSettings, run_benchmark, say
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.core.fingerprints import canonical_json, digest
from convoy.storage.commits import SetCommit, feature_prefix, part_key
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import (
    MANIFEST_SCHEMA,
    Manifest,
    ManifestHeader,
    count_samples,
    fingerprint_samples,
    write_manifest,
)
from convoy.storage.parts import FeatureRows, write_features
from convoy.storage.run_input import MAX_SLICE_ROWS, freeze_input, missing_rows, slice_rows_for
from convoy.storage.runs import RunFolder, slice_name

# From here on a slope is taken: below, fixed costs hide what a row costs.
SLOPE_FROM_ROWS = 10_000

# A run over a set without rows, and a run over a set that has most of them.
NEW, GROWN = "new", "grown"

_MANIFEST = "datasets/made/manifest.parquet"
_CLASSES = tuple(f"class_{index:04d}" for index in range(1000))
_BATCH_SIZE = 32
_NUM_FEATURES = 4
_EVERY_MISSING = 10

ResultT = TypeVar("ResultT")


class PlanBench(BenchSettings):
    """What is measured: manifests of 10^3, 10^4, ... samples, and of `rows`; each `repeats` times, in turn.

    `results` is a Markdown file to write.
    """

    rows: int = Field(default=1_000_000, gt=SLOPE_FROM_ROWS)
    repeats: int = Field(default=3, gt=0)
    seed: int = Field(default=0, ge=0)

    @property
    def sizes(self) -> list[int]:
        """The numbers of samples, from small to large."""
        powers = (10**exponent for exponent in range(3, len(str(self.rows))))
        return [*(size for size in powers if size < self.rows), self.rows]


class StepCost(StrictModel):
    """One step of planning: its time, that of the processor, and its peak of resident memory.

    The peak counts from the process after its imports, so all that earlier steps left behind is in it.
    """

    seconds: float
    cpu_s: float
    peak_mib: float


class StepMeter:
    """Measures the steps of this process one after another, by Linux' own account of its resident memory."""

    def __init__(self) -> None:
        self.costs: dict[str, StepCost] = {}
        self._baseline_kib = _status_kib("VmRSS")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure what runs inside; in Linux, 5 in clear_refs sets the highest size back to the current one."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        yield
        self.costs[name] = StepCost(
            seconds=time.perf_counter() - started_s,
            cpu_s=time.process_time() - started_cpu_s,
            peak_mib=(_status_kib("VmHWM") - self._baseline_kib) / 1024,
        )


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure_planning(root: str, case: str, repeat: int) -> dict[str, StepCost]:
    """The steps of `FeatureJob` from the dataset's name to a frozen input, in the same order.

    Raises ConvoyError where another number of rows is missing than was left out of the cache.
    """
    store, set_id, meter = LocalStore(root), digest(case), StepMeter()
    with meter.step("open"):
        manifest = Manifest.open(store, _MANIFEST)
    with meter.step("known"):
        known = {set_id: FeatureCache(store).known_content(set_id)}
    with meter.step("count"):
        num_missing = sum(
            rows.num_rows for _, rows in missing_rows(manifest.iter_batches(("content_id",)), known)
        )
    with meter.step("freeze"):
        groups = freeze_input(
            RunFolder(store, f"{case}-{repeat}"),
            missing_rows(manifest.iter_batches(), known),
            slice_rows=slice_rows_for(num_missing, _BATCH_SIZE),
        )
    num_expected = len(_missing_indices(manifest.num_samples)) if case == GROWN else manifest.num_samples
    num_frozen = sum(group.num_rows for group in groups)
    if not num_missing == num_frozen == num_expected:
        raise ConvoyError(
            f"{num_missing} missing and {num_frozen} frozen rows, not {num_expected}", where=case
        )
    return meter.costs


def make_workspace(root: str, num_rows: int, seed: int) -> None:
    """A manifest of made samples, and a feature set that has rows for nine of ten of them."""
    store, samples = LocalStore(root), made_samples(num_rows, seed)
    header = ManifestHeader(
        fingerprint=fingerprint_samples(samples, _CLASSES),
        num_samples=num_rows,
        classes=_CLASSES,
        counts=count_samples(samples, len(_CLASSES)),
        source="s3://images",
    )
    write_manifest(store, _MANIFEST, samples, header)
    is_cached = np.ones(num_rows, dtype=bool)
    is_cached[_missing_indices(num_rows)] = False
    commit_features(store, samples.filter(pa.array(is_cached)))


def made_samples(num_rows: int, seed: int) -> pa.Table:
    """Rows of a manifest as a bucket of JPEG files gives them: no column but the empty ones compresses to nothing."""
    random = np.random.default_rng(seed)
    labels = np.arange(num_rows) * len(_CLASSES) // num_rows
    names = [f"train/{_CLASSES[label]}/image_{index:08d}.jpg" for index, label in enumerate(labels)]
    md5s = [random.bytes(16).hex() for _ in names]
    content_ids = pa.py_buffer(random.bytes(16 * num_rows))
    columns = {
        "sample_id": pa.array(names),
        "uri": pa.array([f"s3://images/{name}" for name in names]),
        "etag": pa.array(md5s),
        "size_bytes": pa.array(random.integers(20_000, 200_000, num_rows)),
        "offset_bytes": pa.nulls(num_rows, pa.int64()),
        "row_index": pa.nulls(num_rows, pa.int64()),
        "container_field": pa.nulls(num_rows, pa.string()),
        "checksum": pa.array([f"md5:{md5}" for md5 in md5s]),
        "content_id": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), num_rows, [None, content_ids]),
        "label": pa.array(labels.astype(np.int32)),
        "split": pa.array(np.where(random.random(num_rows) < 0.1, "val", "train")),
        "weight": pa.array(np.ones(num_rows, np.float32)),
    }
    return pa.table(columns, schema=MANIFEST_SCHEMA)


def commit_features(store: LocalStore, samples: pa.Table) -> None:
    """One finished run's parts for the samples, in slices of the usual size; planning never reads the features."""
    set_id, run_id, parts = digest(GROWN), "made", []
    for number, batch in enumerate(samples.combine_chunks().to_batches(MAX_SLICE_ROWS)):
        content_ids = batch["content_id"].to_pylist()
        rows = FeatureRows(
            sample_ids=batch["sample_id"].to_pylist(),
            content_ids=content_ids,
            content_digests=content_ids,
            view=0,
            features_BD=np.zeros((batch.num_rows, _NUM_FEATURES), np.float16),
        )
        key = part_key(feature_prefix(set_id, run_id), slice_name(0, number), "a0")
        parts.append(write_features(store, key, rows, {}))
    commit = SetCommit(run_id=run_id, committed_unix_s=0.0, parts=tuple(parts), rejects=())
    store.put(f"features/{set_id}/commits/{run_id}.json", canonical_json(commit))


def _missing_indices(num_rows: int) -> range:
    return range(0, num_rows, _EVERY_MISSING)


def run_plan_bench(settings: PlanBench) -> dict[str, Any]:
    """How memory grows with a row in each case; then the steps for every size, medians of the repeats."""
    machine = machine_facts()
    cases: dict[str, dict[int, dict[str, StepCost]]] = {NEW: {}, GROWN: {}}
    for size in settings.sizes:
        say(f"{size} rows")
        for case, steps in _measure_size(size, settings).items():
            cases[case][size] = steps
    return {
        **{f"{case}_bytes_per_row": _slope(by_size) for case, by_size in cases.items()},
        "cases": {case: [_row(*item) for item in by_size.items()] for case, by_size in cases.items()},
        "machine": machine,
        "settings": settings.model_dump(mode="json"),
    }


def _measure_size(num_rows: int, settings: PlanBench) -> dict[str, dict[str, StepCost]]:
    runs: dict[str, list[dict[str, StepCost]]] = {NEW: [], GROWN: []}
    with TemporaryDirectory(prefix="convoy-bench-plan-") as root:
        _in_fresh_process(make_workspace, root, num_rows, settings.seed)
        for repeat in range(settings.repeats):
            for case, costs in runs.items():
                costs.append(_in_fresh_process(measure_planning, root, case, repeat))
                say(f"  {case}: {costs[-1]!r}")
    return {case: _medians(costs) for case, costs in runs.items()}


def _in_fresh_process(function: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """What the function returns in a process that has done nothing but imports."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _medians(runs: list[dict[str, StepCost]]) -> dict[str, StepCost]:
    return {
        step: StepCost(
            **{
                name: statistics.median(getattr(run[step], name) for run in runs)
                for name in StepCost.model_fields
            }
        )
        for step in runs[0]
    }


def _slope(by_size: dict[int, dict[str, StepCost]]) -> float:
    """Bytes by which the peak of planning grows with a row, from SLOPE_FROM_ROWS to the largest manifest."""
    largest = max(by_size)
    grown_mib = _peak_mib(by_size[largest]) - _peak_mib(by_size[SLOPE_FROM_ROWS])
    return grown_mib * 2**20 / (largest - SLOPE_FROM_ROWS)


def _peak_mib(steps: dict[str, StepCost]) -> float:
    return max(cost.peak_mib for cost in steps.values())


def _row(num_rows: int, steps: dict[str, StepCost]) -> dict[str, Any]:
    seconds = sum(cost.seconds for cost in steps.values())
    return {
        "rows": num_rows,
        "seconds": seconds,
        "rows_per_s": num_rows / seconds,
        "peak_mib": _peak_mib(steps),
        "steps": {name: cost.model_dump() for name, cost in steps.items()},
    }


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown."""
    path.write_text("\n".join(_page(report)) + "\n", encoding="utf-8")


def _page(report: dict[str, Any]) -> Iterator[str]:
    yield "# `convoy bench plan`"
    yield ""
    yield (
        "Planning a run in a fresh process, from the dataset's name to a frozen input. Each step: wall seconds / CPU "
        f"seconds / peak MiB over the process after its imports; medians of {report['settings']['repeats']} repeats."
    )
    yield ""
    for name, fact in report["machine"].items():
        yield f"- {name}: {', '.join(fact) if isinstance(fact, list) else fact}"
    titles = {NEW: "nothing is cached", GROWN: f"all but one of {_EVERY_MISSING} rows are cached"}
    for case, title in titles.items():
        grows = f"{report[f'{case}_bytes_per_row']:.1f} bytes a row from {SLOPE_FROM_ROWS} rows on"
        yield from ("", f"## {case}: {title}", "", f"Memory grows by {grows}.", "")
        yield from _table(report["cases"][case])


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    steps = rows[0]["steps"]
    yield f"| rows | {' | '.join(steps)} | rows/s | peak MiB |"
    yield f"| ---: |{' ---: |' * (len(steps) + 2)}"
    for row in rows:
        cells = [
            f"{cost['seconds']:.3f} / {cost['cpu_s']:.3f} / {cost['peak_mib']:.0f}"
            for cost in row["steps"].values()
        ]
        yield f"| {row['rows']} | {' | '.join(cells)} | {row['rows_per_s']:.0f} | {row['peak_mib']:.0f} |"


if __name__ == "__main__":
    run_benchmark(PlanBench, run_plan_bench, write_page)
