"""A small workspace with real images, and a made evaluation of them: everything that a page reads, without a job."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from convoy.core.records import Reject, RejectCode, Stage
from convoy.pipelines.evaluation import measure_predictions
from convoy.storage.commits import SliceRecord, finish, part_key, publish, read_records, write_record
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.parts import write_rejects
from convoy.storage.predictions import PREDICTIONS, predictions_table, write_predictions
from convoy.storage.run_input import freeze_input, missing_rows
from convoy.storage.runs import RunFolder, RunRecord
from image_files import encode, photo
from made_runs import NOTHING

RUN = "20260101-000000-0123abcd"
DATASET = "pets"
MODEL_DIGEST = "d" * 32
CLASSES = ("<script>window.hacked=1<!--", "cat \u202egpj", "do\"g'")


def write_images(folder: Path, num_images: int) -> None:
    """Photographs in the class folders of `test`, some in `train`."""
    for number in range(num_images):
        for split in ("test", "train") if number % 3 == 0 else ("test",):
            path = folder / split / CLASSES[number % len(CLASSES)] / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            height_px, width_px = (24 + number % 5, 32) if number % 2 else (96, 96)
            path.write_bytes(encode(photo(height_px, width_px, seed=number), "JPEG"))


def made_workspace(folder: Path, *, num_images: int = 30, slice_rows: int = 8) -> LocalStore:
    """A workspace with the dataset `pets`, and a finished evaluation of its test split; the last row is a reject."""
    write_images(folder / "images", num_images)
    store = LocalStore(str(folder / "workspace"))
    freeze_dataset(store, DATASET, str(folder / "images"))
    manifest = open_dataset(store, DATASET)
    run, record = _begin(store, manifest, slice_rows)
    for number in range(record.num_slices):
        _finish_slice(store, manifest, record, f"0-{number:06d}", is_last=number == record.num_slices - 1)
    published = publish(run, record, read_records(run))
    evaluation = measure_predictions(
        store,
        published,
        classes=manifest.classes,
        gives_probabilities=True,
        splits=["test"],
        model_digest=MODEL_DIGEST,
    )
    finish(run, evaluation.model_dump(mode="json"))
    return store


def made_logits(sample_ids: list[str], labels_N: np.ndarray) -> np.ndarray:
    """Logits by the numbers in the names: every fifth row is wrong, the surer the higher its number."""
    numbers_N = np.array([int(Path(one).stem) for one in sample_ids])
    wrong_N = numbers_N % 5 == 4
    pred_N = np.where(wrong_N, (labels_N + 1) % len(CLASSES), labels_N)
    return ((1.0 + numbers_N / 50)[:, None] * np.eye(len(CLASSES))[pred_N]).astype(np.float32)


def _begin(store: LocalStore, manifest: Manifest, slice_rows: int) -> tuple[RunFolder, RunRecord]:
    run = RunFolder(store, RUN)
    rows = manifest.read_table(splits=["test"])
    wanted = missing_rows([rows], {PREDICTIONS: NOTHING})
    record = RunRecord.new(
        RUN,
        verb="evaluate",
        identity={
            "dataset": DATASET,
            "dataset_fingerprint": manifest.fingerprint,
            "splits": ["test"],
            "model_digest": MODEL_DIGEST,
        },
        config={"dataset": DATASET, "name": "<img src=x onerror=window.hacked=1>"},
        outputs={PREDICTIONS: run.key("predictions/")},
        groups=freeze_input(run, wanted, slice_rows=slice_rows),
    )
    run.write_record(record)
    return run, record


def _finish_slice(
    store: LocalStore, manifest: Manifest, record: RunRecord, name: str, *, is_last: bool
) -> None:
    run = RunFolder(store, record.run_id)
    rows = run.read_slice(name)
    samples = rows.slice(0, rows.num_rows - is_last)
    labels_N = samples["label"].to_numpy()
    logits_NK = made_logits(samples["sample_id"].to_pylist(), labels_N)
    scores_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(axis=1, keepdims=True)
    table = predictions_table(
        samples,
        labels=pa.array(labels_N, pa.int32()),
        logits_BK=logits_NK,
        scores_BK=scores_NK,
        classes=manifest.classes,
    )
    key = part_key(record.outputs[PREDICTIONS], name, "a0")
    part = write_predictions(store, key, table, model_digest=MODEL_DIGEST, run_id=RUN, metadata={})
    rejects = [_reject(row) for row in rows.slice(samples.num_rows).to_pylist()]
    start_s = 1000.0 + 2 * int(name[2:])
    write_record(
        store,
        SliceRecord(
            run_id=RUN,
            slice=name,
            attempt="a0",
            parts={PREDICTIONS: part},
            rejects=write_rejects(store, run.key(f"rejects/{name}-a0.parquet"), rejects, "a0", RUN)
            if rejects
            else None,
            num_results=samples.num_rows,
            num_rejects=len(rejects),
            reject_codes={"corrupt": len(rejects)} if rejects else {},
            flags={},
            seconds={"decode": 0.5, "forward": 1.0},
            started_unix_s=start_s,
            first_row_unix_s=start_s + 0.5,
            finished_unix_s=start_s + 2,
            precision_effect={},
            bytes_read=1000,
        ),
    )


def _reject(row: dict[str, object]) -> Reject:
    return Reject(
        sample_id=str(row["sample_id"]),
        uri=str(row["uri"]),
        etag=str(row["etag"]),
        content_id=bytes(row["content_id"]),  # type: ignore[arg-type]
        stage=Stage.DECODE,
        code=RejectCode.CORRUPT,
        reason="made <b>bad</b>",
    )
