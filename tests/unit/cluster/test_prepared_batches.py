"""Batches of a slice: what is noted of their images."""

from __future__ import annotations

import time

import pyarrow as pa
import pytest
import torch

from convoy.cluster.prepared_batches import ImagePreparer, SliceImages
from convoy.storage.samples import SampleReader
from convoy.vision.decode_rule import DecodeFlag, DecodeRule
from image_files import encode, orientation_exif, photo
from made_runs import made_manifest

FILES = {
    "grey": encode(photo()[..., 0], "PNG"),
    "plain": encode(photo(), "PNG"),
    "profile": encode(photo(), "PNG", icc_profile=bytes(500)),
    "profile_and_turned": encode(photo(), "PNG", icc_profile=bytes(500), exif=orientation_exif(6)),
}


def prepared(monkeypatch: pytest.MonkeyPatch) -> SliceImages:
    """All files through a preparer, as one slice."""

    def read(_reader: SampleReader, rows: pa.Table) -> enumerate[bytes]:
        return enumerate(FILES[name] for name in rows["sample_id"].to_pylist())

    monkeypatch.setattr(SampleReader, "read", read)
    images = SliceImages(made_manifest(list(FILES)), time.time())
    preparer = ImagePreparer[str](
        DecodeRule(), num_fetch_threads=1, num_decode_threads=1, fill=lambda *_: None
    )
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
