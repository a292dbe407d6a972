"""The facts of a dataset are of all that was looked at, whichever job looked at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from convoy.core.config import load_config
from convoy.core.errors import SourceMissing
from convoy.core.progress import Silent
from convoy.core.records import RejectCode, SampleRejected, Split, Stage
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.advise_data import data_facts, measure_resolution
from convoy.pipelines.advise_probes import Look, Prober
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.feature_summary import FeatureSummary
from convoy.storage.commits import publish, read_records
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder
from convoy.storage.samples import SampleReader
from image_files import encode, photo
from made_advice import made_near_duplicates, made_probes
from made_advice_rows import frozen_rows
from made_runs import SET_ID, finish_slice, new_run

CONFIG = load_config(AdviseConfig, None, ["candidates=[{backbone: {arch: resnet18}}]", "dataset=parts"])


def test_images_that_another_job_could_not_read_are_named_by_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (10, 10), Split.VAL: (30, 30)}, ("good", "defect"))
    store = LocalStore(str(tmp_path))
    names = manifest.read_table(["sample_id"])["sample_id"].to_pylist()
    record = new_run(store, names, slice_rows=len(names))
    finish_slice(store, record, "0-000000", rejected=names[:3])
    publish(RunFolder(store, record.run_id), record, read_records(RunFolder(store, record.run_id)))
    monkeypatch.setattr(Prober, "near_duplicates", lambda *_: made_near_duplicates())
    # All was cached, so this job itself met no reject.
    summary = FeatureSummary.model_construct(
        samples=80, rows=77, rejects=3, reject_codes={}, sets={"pooled/0": SET_ID}
    )
    look = Look(
        BackboneRecord.model_construct(), summary, made_probes("resnet20", 0.0), np.ones(0, np.bool_), None
    )
    facts = data_facts(store, manifest, CONFIG, Prober(store, manifest, CONFIG, Silent()), look)
    assert facts.reject_codes == {"corrupt": 3}
    assert "3 of 80 images cannot be used: {'corrupt': 3}" in facts.warnings


@pytest.mark.parametrize("num_read", [0, 2])
def test_images_that_are_gone_by_now_leave_sizes_unknown_and_end_no_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_read: int
) -> None:
    rows = frozen_rows(tmp_path, {Split.TRAIN: (3, 3)}, ("good", "defect")).read_table()

    def read(*_: object) -> Iterator[tuple[int, bytes | SampleRejected]]:
        yield 0, SampleRejected(RejectCode.EMPTY, Stage.DECODE, "no bytes")
        for row in range(num_read):
            yield 1 + row, encode(photo(48, 64), "PNG")
        raise SourceMissing("not one image is where it was")

    monkeypatch.setattr(SampleReader, "read", read)
    found, problems = measure_resolution(rows, CONFIG.extraction.decode)
    assert problems == [f"sizes are known of {num_read} of 6 images only: not one image is where it was"]
    assert (found is None) is (num_read == 0)
    if found is not None:
        assert (found.images, found.median_width_px, found.median_height_px) == (2, 64, 48)
