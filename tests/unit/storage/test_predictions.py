"""The columns of predictions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from convoy.core.errors import ConfigError
from convoy.storage.predictions import float_lists, list_array, list_offsets


def test_rows_of_an_array_come_back_from_a_column_of_lists() -> None:
    values_BK = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert np.array_equal(list_array(pa.chunked_array([float_lists(values_BK)])), values_BK)


def test_lists_begin_one_after_the_other_up_to_the_last_value_that_can_be_counted() -> None:
    assert list_offsets(3, 2).to_pylist() == [0, 2, 4, 6]
    assert list_offsets(0, 5).to_pylist() == [0]
    assert list_offsets(3, 2**29).to_pylist() == [0, 2**29, 2**30, 3 * 2**29]
    assert list_offsets(1, 2**31 - 1).to_pylist() == [0, 2**31 - 1]


@pytest.mark.parametrize("shape", [(1, 2**31), (4, 2**29), (2_150_000, 1000)])
def test_more_values_than_a_column_of_lists_can_hold_name_the_setting(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="more than") as caught:
        list_offsets(*shape)
    assert caught.value.where == "extraction.slice_rows"
