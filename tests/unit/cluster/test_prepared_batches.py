"""Batches of a slice: what is noted of their images."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import torch

from convoy.cluster.deadly_slices import ImageTrials
from convoy.cluster.prepared_batches import ImagePreparer, SliceImages
from convoy.cluster.stall_watch import StallWatch
from convoy.core.errors import DataError
from convoy.core.fingerprints import digest_bytes
from convoy.core.records import RejectCode, Stage
from convoy.storage.samples import SampleReader
from convoy.vision.decode_rule import DecodeFlag, DecodeRule
from image_files import encode, orientation_exif, photo
from kept_notes import KeptNotes
from made_runs import made_manifest
from noting_watch import NotingWatch

FILES = {
    "grey": encode(photo()[..., 0], "PNG"),
    "plain": encode(photo(), "PNG"),
    "profile": encode(photo(), "PNG", icc_profile=bytes(500)),
    "profile_and_turned": encode(photo(), "PNG", icc_profile=bytes(500), exif=orientation_exif(6)),
    "cut": encode(photo(), "PNG")[:-30],
}


class WorkerEnded(BaseException):
    """Stands for the end of a process."""


def prepared(
    monkeypatch: pytest.MonkeyPatch,
    *,
    num_decode_threads: int = 1,
    digests_content: bool = False,
    watch: StallWatch | None = None,
    seconds_an_image: float = 0.0,
    trials: ImageTrials | None = None,
    deadly: str = "",
) -> SliceImages:
    """All files through a preparer, as one slice; WorkerEnded where the deadly one is read."""

    def read(_reader: SampleReader, rows: pa.Table) -> Iterator[tuple[int, bytes]]:
        for row, name in enumerate(rows["sample_id"].to_pylist()):
            time.sleep(seconds_an_image)
            if name == deadly:
                raise WorkerEnded
            yield row, FILES[name]

    monkeypatch.setattr(SampleReader, "read", read)
    preparer = ImagePreparer[str](
        DecodeRule(),
        num_fetch_threads=1,
        num_decode_threads=num_decode_threads,
        fill=lambda *_: None,
        watch=watch or StallWatch(),
        digests_content=digests_content,
    )
    images = preparer.begin(made_manifest(list(FILES)), trials)
    for _batch in preparer.batches(images, lambda: {"whole": torch.empty(2)}, 2):
        pass
    return images


def test_an_image_of_which_a_profile_is_ignored_is_counted_but_not_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = prepared(monkeypatch)
    names = images.rows["sample_id"].to_pylist()
    assert {names[row] for row in images.converted} == {"grey", "profile_and_turned"}
    assert images.flags[DecodeFlag.ICC_PROFILE_IGNORED] == 2


@pytest.mark.parametrize("num_decode_threads", [0, 1, 3])
def test_images_and_rejects_are_the_same_whoever_decodes(
    monkeypatch: pytest.MonkeyPatch, num_decode_threads: int
) -> None:
    images = prepared(monkeypatch, num_decode_threads=num_decode_threads)
    assert images.usable_N.tolist() == [name != "cut" for name in FILES]
    (reject,) = images.rejects
    assert (reject.sample_id, reject.code) == ("cut", RejectCode.TRUNCATED)
    assert images.bytes_read == sum(map(len, FILES.values()))


def test_content_is_digested_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared(monkeypatch).content_digests == {}
    images = prepared(monkeypatch, digests_content=True)
    assert images.content_digests == {
        row: digest_bytes(data) for row, (name, data) in enumerate(FILES.items()) if name != "cut"
    }


def outputs_ND(*finite: bool) -> np.ndarray:
    return np.where(np.array(finite)[:, None], [[0.0, 1.0]], [[np.inf, 1.0]])


def of_images(*usable: bool) -> SliceImages:
    images = SliceImages(made_manifest([str(row) for row in range(len(usable))]), time.time())
    images.usable_N[:] = usable
    return images


@pytest.mark.parametrize("finite", [(False, False, True, True, True), (False,) * 5])
def test_a_few_images_without_finite_outputs_are_rejects(finite: tuple[bool, ...]) -> None:
    images = of_images(True, True, False, False, True)
    images.reject_non_finite(outputs_ND(*finite), DataError("no finite numbers"))
    lost = [str(row) for row in (0, 1, 4) if not finite[row]]
    assert [one.sample_id for one in images.rejects] == lost
    assert {(one.stage, one.code, one.reason) for one in images.rejects} == {
        (Stage.FORWARD, RejectCode.NOT_FINITE, "no finite numbers")
    }
    assert images.usable_N.tolist() == [False, False, False, False, finite[4]]


def test_a_network_that_gives_no_finite_numbers_at_all_is_an_error() -> None:
    images = of_images(*[True] * 9, False)
    with pytest.raises(DataError, match="no finite numbers"):
        images.reject_non_finite(outputs_ND(*[False] * 10), DataError("no finite numbers"))
    images.reject_non_finite(outputs_ND(*np.arange(10) == 3), DataError("no finite numbers"))
    assert images.usable_N.sum() == 1


@pytest.mark.parametrize("num_decode_threads", [0, 2])
def test_the_watch_is_told_of_each_image_that_came_and_of_each_batch_that_was_taken(
    monkeypatch: pytest.MonkeyPatch, num_decode_threads: int
) -> None:
    watch = NotingWatch()
    prepared(monkeypatch, num_decode_threads=num_decode_threads, watch=watch)
    num_batches = -(-len(FILES) // 2)
    assert watch.events == ["moved"] * (len(FILES) + num_batches)


def test_the_time_that_a_slow_store_takes_is_told_apart_from_all_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = prepared(monkeypatch, seconds_an_image=0.05)
    assert images.seconds["fetch"] >= 0.05 * len(FILES)


@pytest.mark.parametrize("deadly", ["grey", "profile", "cut"])
def test_the_image_that_ends_every_worker_becomes_a_reject(
    monkeypatch: pytest.MonkeyPatch, deadly: str
) -> None:
    notes = KeptNotes()
    for _worker in range(2):
        with pytest.raises(WorkerEnded):
            prepared(monkeypatch, trials=ImageTrials(notes, "slice"), deadly=deadly)
    images = prepared(monkeypatch, trials=ImageTrials(notes, "slice"), deadly=deadly)
    assert images.usable_N.tolist() == [name not in {deadly, "cut"} for name in FILES]
    codes = {reject.sample_id: (reject.stage, reject.code) for reject in images.rejects}
    assert codes == {"cut": (Stage.DECODE, RejectCode.TRUNCATED)} | {
        deadly: (Stage.FETCH, RejectCode.ENDS_WORKERS)
    }
    # A second pass leaves it out too.
    assert images.again().deadly == images.deadly == {list(FILES).index(deadly)}


def test_images_that_are_tried_alone_and_do_no_harm_come_as_they_would_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = NotingWatch()
    images = prepared(monkeypatch, trials=ImageTrials(KeptNotes(), "slice"), watch=watch)
    assert images.usable_N.tolist() == [name != "cut" for name in FILES]
    assert images.bytes_read == sum(map(len, FILES.values()))
    # The watch has been told of the trials as well.
    assert watch.events == ["moved"] * (2 * len(FILES) + -(-len(FILES) // 2))
