"""A worker with other libraries than the driver is refused, by both kinds of jobs, before it computes anything."""

from __future__ import annotations

import pickle
from typing import Any

import pyarrow as pa
import pytest

from convoy.cluster.library_versions import library_versions, require_versions
from convoy.cluster.pixel_statistics import _PixelWorker
from convoy.cluster.slices import SliceTask, SliceWorker
from convoy.core.errors import VersionMismatch
from convoy.vision.decode_rule import DecodeRule

OTHERS = library_versions() | {"torch": "1.13.1"}


def test_the_same_libraries_are_accepted_whatever_their_build() -> None:
    assert not any("+" in number for number in library_versions().values())
    require_versions(library_versions())


def test_other_libraries_are_named_with_both_versions() -> None:
    with pytest.raises(VersionMismatch, match=f"torch {library_versions()['torch']} instead of 1.13.1"):
        require_versions(OTHERS)


def test_a_slice_worker_with_other_libraries_answers_with_the_error_and_makes_no_operator() -> None:
    def refuse(_: str) -> Any:
        raise AssertionError("an operator was made")

    worker = SliceWorker(refuse, "{}", "token", OTHERS)
    answer = worker({"task": [SliceTask(slice="000000", outputs=()).model_dump_json()]})
    with pytest.raises(VersionMismatch):
        raise pickle.loads(answer["error"][0])


def test_a_worker_that_measures_pixels_with_other_libraries_answers_with_the_error() -> None:
    answer = _PixelWorker(DecodeRule().model_dump_json(), 1, "token", OTHERS)(pa.table({}))
    with pytest.raises(VersionMismatch):
        raise pickle.loads(answer["error"][0].as_py())
