"""Features that the test's own process computes, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from convoy.cluster.extraction import FeatureExtractor
from convoy.cluster.extraction_spec import ExtractionSpec
from convoy.cluster.slices import SliceTask, WorkerPool
from convoy.pipelines import features
from convoy.storage.commits import SliceRecord
from convoy.storage.runs import RunFolder, RunRecord


def compute_features_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on jobs that need features compute their slices in the thread that asks."""

    def do_slices(_: RunFolder, record: RunRecord, run: Any, **_options: Any) -> list[SliceRecord]:
        tasks = [SliceTask(slice=name, outputs=record.outputs_of(name)) for name in record.slice_names()]
        return list(run(tasks, WorkerPool(num_workers=1, num_cpus=1, num_gpus=0, num_threads=1)))

    def extract(spec: ExtractionSpec, tasks: Sequence[SliceTask], _: WorkerPool) -> Iterator[SliceRecord]:
        return map(FeatureExtractor(spec), tasks)

    monkeypatch.setattr(features, "do_slices", do_slices)
    monkeypatch.setattr(features, "extract_slices", extract)
