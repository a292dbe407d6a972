"""Pictures of rows that could not be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from convoy.core.records import Reject, RejectCode, Stage
from convoy.pipelines.report_rejects import RejectSummary, summarise_rejects
from convoy.storage.commits import RunManifest, SliceRecord
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.parts import write_rejects
from convoy.storage.predictions import PREDICTIONS
from convoy.storage.run_input import freeze_input, missing_rows
from convoy.storage.runs import INPUT, RunFolder, RunRecord
from image_files import encode, photo
from made_runs import NOTHING

RUN = "20260101-000000-0123abcd"


def rejected_run(folder: Path, codes: Mapping[str, RejectCode]) -> tuple[RunFolder, RunManifest]:
    """A run that rejected these files of `folder`, two rows a slice."""
    store = LocalStore(str(folder / "workspace"))
    freeze_dataset(store, "made", str(folder / "images"))
    rows = open_dataset(store, "made").read_table()
    run = RunFolder(store, RUN)
    record = RunRecord.new(
        RUN,
        verb="cache",
        identity={},
        config={},
        outputs={},
        groups=freeze_input(run, missing_rows([rows], {PREDICTIONS: NOTHING}), slice_rows=2),
    )
    run.write_record(record)
    slices = []
    for number in range(record.num_slices):
        name = f"0-{number:06d}"
        rejects = [
            Reject(
                sample_id=row["sample_id"],
                uri=row["uri"],
                etag=row["etag"],
                content_id=row["content_id"],
                stage=Stage.DECODE,
                code=codes[Path(row["sample_id"]).name],
                reason="made",
            )
            for row in run.read_slice(name).to_pylist()
        ]
        part = write_rejects(store, run.key(f"rejects/{name}.parquet"), rejects, "a0", RUN)
        counts = Counter(reject.code.value for reject in rejects)
        slices.append(
            SliceRecord.model_construct(
                slice=name, rejects=part, reject_codes=counts, num_rejects=len(rejects)
            )
        )
    return run, RunManifest.model_construct(slices=slices)


def write_image(folder: Path, name: str, data: bytes) -> None:
    path = folder / "images" / "train" / "cat" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def drawn(found: RejectSummary) -> dict[str, str]:
    """Names and codes of what has a picture."""
    return {Path(one.image.sample_id).name: one.code for one in found.drawn}


def test_rejects_that_decode_are_drawn_and_the_others_are_named(tmp_path: Path) -> None:
    sound = encode(photo(24, 32, seed=0), "JPEG")
    codes = {
        "large.jpg": RejectCode.TOO_LARGE,
        "small.png": RejectCode.TOO_SMALL,
        "not_finite.jpg": RejectCode.NOT_FINITE,
        "cut.jpg": RejectCode.TRUNCATED,
        # What ends workers would end the process that draws it.
        "deadly.jpg": RejectCode.ENDS_WORKERS,
    }
    for name in codes:
        write_image(tmp_path, name, sound)
    write_image(tmp_path, "small.png", encode(photo(1, 1, seed=0), "PNG"))
    found = summarise_rejects(*rejected_run(tmp_path, codes))
    assert drawn(found) == {
        "large.jpg": "too_large",
        "small.png": "too_small",
        "not_finite.jpg": "not_finite",
    }
    assert all(one.image.jpeg.startswith(b"\xff\xd8") for one in found.drawn)
    assert {Path(one.sample_id).name for one in found.shown} == codes.keys()


def test_what_is_beyond_the_usual_limits_is_not_decoded(tmp_path: Path) -> None:
    """A few kilobytes that are 64 million pixels, and a file of more bytes than one picture may take."""
    sound = encode(photo(24, 32, seed=0), "JPEG")
    write_image(tmp_path, "bomb.png", encode(Image.fromarray(np.zeros((8000, 8000), np.uint8)), "PNG"))
    write_image(tmp_path, "long.jpg", sound + bytes(17 << 20))
    write_image(tmp_path, "sound.jpg", sound)
    codes = dict.fromkeys(["bomb.png", "long.jpg", "sound.jpg"], RejectCode.TOO_LARGE)
    assert drawn(summarise_rejects(*rejected_run(tmp_path, codes))) == {"sound.jpg": "too_large"}


def test_of_many_rejects_of_a_reason_a_few_are_drawn(tmp_path: Path) -> None:
    codes = {f"{number}.jpg": RejectCode.TOO_SMALL for number in range(9)}
    for name in codes:
        write_image(tmp_path, name, encode(photo(24, 32, seed=0), "JPEG"))
    assert len(summarise_rejects(*rejected_run(tmp_path, codes)).drawn) == 6


def test_a_lost_input_costs_the_pictures_of_rejects_only(tmp_path: Path) -> None:
    write_image(tmp_path, "a.jpg", encode(photo(24, 32, seed=0), "JPEG"))
    run, manifest = rejected_run(tmp_path, {"a.jpg": RejectCode.NOT_FINITE})
    run.store.delete([info.key for info in run.store.list_objects(run.key(INPUT))])
    found = summarise_rejects(run, manifest)
    assert (len(found.shown), found.drawn) == (1, [])
