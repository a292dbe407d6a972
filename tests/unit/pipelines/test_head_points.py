"""The points of a first head's path in a run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convoy.core.errors import ChecksumMismatch, LeaseLost
from convoy.pipelines import head_points
from convoy.pipelines.head_points import RunHeadPoints
from convoy.storage.checkpoints import training_leftovers
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import Blob
from convoy.storage.runs import RunFolder
from convoy.vision.head_path import PathPoint

POINT = PathPoint(parameters_P=np.array([0.1, -2.0, 1e-300]), num_iterations=7, converged=False, seconds=1.5)


def points_in(
    folder: RunFolder, identity: dict[str, str], check: Callable[[], None] = lambda: None
) -> RunHeadPoints:
    return RunHeadPoints(folder, identity, check)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(LocalStore(str(tmp_path)), "20260101-000000-abcdef01")


def test_a_point_comes_back_to_the_bit(folder: RunFolder) -> None:
    points_in(folder, {"of": "this"}).put("fit", 1e-3, POINT)
    found = points_in(folder, {"of": "this"}).get("fit", 1e-3)
    assert found is not None
    assert found.parameters_P.dtype == np.float64
    assert found.parameters_P.tobytes() == POINT.parameters_P.tobytes()
    assert (found.num_iterations, found.converged, found.seconds) == (7, False, 1.5)


def test_a_point_of_another_training_fit_or_c_is_not_found(folder: RunFolder) -> None:
    points = points_in(folder, {"of": "this"})
    points.put("fit", 1e-3, POINT)
    assert points_in(folder, {"of": "that"}).get("fit", 1e-3) is None
    assert points.get("another", 1e-3) is None
    assert points.get("fit", 1e-2) is None


@pytest.mark.parametrize("damage", ["cut", "emptied", "a bit"])
def test_a_damaged_point_is_fitted_again(folder: RunFolder, damage: str) -> None:
    points = points_in(folder, {})
    points.put("fit", 1.0, POINT)
    (info,) = folder.store.list_objects(folder.prefix)
    data = bytearray(folder.store.get(info.key).data)
    if damage == "a bit":
        data[data.index(POINT.parameters_P.tobytes())] ^= 1
    folder.store.put(info.key, bytes(data[: {"cut": -30, "emptied": 0, "a bit": len(data)}[damage]]))
    assert points.get("fit", 1.0) is None


class RottenStore(LocalStore):
    """As an S3 store whose object does not have its checksum any more."""

    def get(self, key: str) -> Blob:
        raise ChecksumMismatch("the bytes are not those that were written", where=self.uri(key))


def test_a_point_whose_object_rotted_is_fitted_again(tmp_path: Path) -> None:
    folder = RunFolder(RottenStore(str(tmp_path)), "20260101-000000-abcdef01")
    points = points_in(folder, {})
    points.put("fit", 1.0, POINT)
    assert points.get("fit", 1.0) is None


def test_a_point_of_other_code_is_not_found(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    points_in(folder, {}).put("fit", 1.0, POINT)
    monkeypatch.setattr(head_points, "current_versions", lambda: {"convoy-vision": "another"})
    assert points_in(folder, {}).get("fit", 1.0) is None


def test_a_driver_that_lost_its_run_keeps_nothing(folder: RunFolder) -> None:
    def check() -> None:
        raise LeaseLost("another driver has the run", where=folder.prefix)

    with pytest.raises(LeaseLost):
        points_in(folder, {}, check).put("fit", 1.0, POINT)
    assert list(folder.store.list_objects(folder.prefix)) == []


def test_points_are_among_what_a_finished_training_leaves_over(folder: RunFolder) -> None:
    points_in(folder, {}).put("fit", 1.0, POINT)
    (left,) = training_leftovers(folder)
    assert left.key.startswith(folder.key("head_points/"))


def test_points_are_removed_whatever_training_and_code_they_are_of(folder: RunFolder) -> None:
    for identity in ({"of": "this"}, {"of": "that"}):
        points_in(folder, identity).put("fit", 1.0, POINT)
    folder.store.put(folder.key("run.json"), b"{}")
    points_in(folder, {"of": "this"}).remove()
    assert [info.key for info in folder.store.list_objects(folder.prefix)] == [folder.key("run.json")]
