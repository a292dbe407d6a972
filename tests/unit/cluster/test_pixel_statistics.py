from __future__ import annotations

import pickle
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import pyarrow as pa
import pytest

from convoy.cluster import pixel_statistics
from convoy.cluster.library_versions import library_versions
from convoy.cluster.pixel_meter import PixelMeter
from convoy.core.errors import ClusterError, StoreUnavailable
from convoy.vision.decode_rule import DecodeRule

ROWS = pa.table({"uri": ["s3://bucket/first.jpg", "s3://bucket/second.jpg"]})


def error_of(monkeypatch: pytest.MonkeyPatch, watch: type[Harmless]) -> Any:
    """The error that a worker answers for the rows."""
    monkeypatch.setattr(pixel_statistics, "DeathWatch", watch)
    worker = pixel_statistics._PixelWorker(DecodeRule().model_dump_json(), 1, "token", library_versions())
    (row,) = worker(ROWS).to_pylist()
    return pickle.loads(row["error"])


class Harmless:
    """A DeathWatch outside Ray, for which nothing is deadly."""

    def __init__(self, token: str, *, kind: str, next_step: str) -> None:
        self.kind, self.next_step = kind, next_step

    def watching(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


class Deadly(Harmless):
    """One for which everything is."""

    def watching(self, name: str) -> NoReturn:
        raise ClusterError("it ended 5 workers", where=f"{self.kind} {name}", next_step=self.next_step)


def test_an_error_of_storage_comes_out_of_a_worker_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_self: PixelMeter, _rows: pa.Table) -> NoReturn:
        raise StoreUnavailable("no answer", where="s3://bucket")

    monkeypatch.setattr(PixelMeter, "measure", failing)
    error = error_of(monkeypatch, Harmless)
    assert isinstance(error, StoreUnavailable)
    assert error.where == "s3://bucket"


def test_images_that_end_one_worker_after_another_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_of(monkeypatch, Deadly)
    assert isinstance(error, ClusterError)
    assert error.where == "slice of the 2 images from s3://bucket/first.jpg on"
