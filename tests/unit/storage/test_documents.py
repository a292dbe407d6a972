from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from convoy.core.errors import DataError
from convoy.storage.documents import parse_model, read_json, read_model
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import SliceGroup


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{"])
def test_a_damaged_document_is_named(tmp_path: Path, data: bytes) -> None:
    store = LocalStore(str(tmp_path))
    store.put("runs/one/run.json", data)
    for read in (read_json, partial(read_model, SliceGroup)):
        with pytest.raises(DataError, match="damaged") as caught:
            read(store, "runs/one/run.json")
        assert caught.value.where == f"{tmp_path}/runs/one/run.json"


def test_a_document_that_is_not_there_is_none(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    assert read_json(store, "runs/one/run.json") is None
    assert read_model(SliceGroup, store, "runs/one/run.json") is None


def test_a_document_of_another_version_is_named_with_what_is_wrong() -> None:
    with pytest.raises(DataError, match=r"does not say what it should: invented: Extra inputs") as caught:
        parse_model(
            SliceGroup,
            b'{"outputs": [], "num_rows": 1, "num_slices": 1, "invented": 1}',
            where="runs/one/run.json",
        )
    assert caught.value.where == "runs/one/run.json"
    assert caught.value.next_step is not None
    assert "upgrade Convoy" in caught.value.next_step
