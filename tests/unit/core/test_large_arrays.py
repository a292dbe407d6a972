from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convoy.core.errors import StorageFull
from convoy.core.large_arrays import large_array


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
