"""The demo deletes what an earlier demo wrote, and nothing else."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from infra_files import ROOT


@pytest.fixture(scope="module")
def begin_anew() -> Callable[[Path], None]:
    function: Callable[[Path], None] = runpy.run_path(str(ROOT / "jobs/demo.py"))["begin_anew"]
    return function


def test_the_demo_leaves_a_folder_alone_that_it_did_not_make(
    begin_anew: Callable[[Path], None], tmp_path: Path
) -> None:
    photo = tmp_path / "images" / "cats" / "holiday.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"mine")
    with pytest.raises(SystemExit, match="choose another --folder"):
        begin_anew(tmp_path)
    assert photo.read_bytes() == b"mine"


def test_the_demo_refuses_a_folder_that_is_a_file(begin_anew: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(SystemExit, match="choose another --folder"):
        begin_anew(file)
    assert file.read_text() == "mine"


def test_the_demo_runs_in_its_own_folder_again(begin_anew: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demo"
    for _ in range(2):
        begin_anew(folder)
        assert [path.name for path in folder.iterdir()] == [".convoy-demo"]
        (folder / "images").mkdir()
