from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from convoy.core.errors import StorageFull
from convoy.core.large_arrays import large_array, large_take


@pytest.mark.parametrize("free_bytes", [None, 10**9, 100])
def test_an_array_holds_what_it_is_filled_with_wherever_it_lies(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int | None
) -> None:
    monkeypatch.setattr("convoy.core.large_arrays.free_memory_bytes", lambda: free_bytes)
    array_NK = large_array((50, 3), np.float32)
    array_NK[:] = np.arange(150).reshape(50, 3)
    assert array_NK.dtype == np.float32
    assert array_NK.tolist() == np.arange(150.0).reshape(50, 3).tolist()
    assert isinstance(array_NK.base, np.memmap) == (free_bytes == 100)


def test_the_file_of_an_array_has_no_name_that_could_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("convoy.core.large_arrays.free_memory_bytes", lambda: 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    large_array((50,), np.float64)[:] = 1
    assert not list(tmp_path.iterdir())


def test_an_array_for_which_there_is_no_room_says_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(StorageFull, match="have no room on disk, nor in memory") as caught:
        large_array((2**60,), np.float32)
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize("free_bytes", [None, 100])
@pytest.mark.parametrize("places", [([2, 0],), ([1], [3, 0, 1]), (range(3), [0])])
def test_parts_of_an_array_are_taken_as_by_indices(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int | None, places: tuple[Sequence[int], ...]
) -> None:
    array_MVN = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    monkeypatch.setattr("convoy.core.large_arrays.free_memory_bytes", lambda: free_bytes)
    taken = large_take(array_MVN, *places)
    np.testing.assert_array_equal(taken, array_MVN[np.ix_(*[list(one) for one in places])])
    assert taken.dtype == np.float32
    assert not np.shares_memory(taken, array_MVN)


def test_all_of_an_array_is_taken_without_a_copy() -> None:
    array_MVN = np.zeros((3, 4, 5))
    assert large_take(array_MVN, range(3)) is array_MVN
    assert large_take(array_MVN, [0, 1, 2], range(4)) is array_MVN
    assert large_take(array_MVN, [0, 1]) is not array_MVN
    assert large_take(array_MVN, [0, 2, 1]) is not array_MVN
