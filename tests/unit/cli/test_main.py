"""What holds for every command, whichever door it is called through."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path

import pytest

from convoy.cli.main import main


def test_a_module_is_found_in_the_folder_where_the_command_runs_after_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The console script has the folder of the script on its path, and `python -m` the working directory."""
    for name in ("networks_of_mine", "json"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        main(["--help"])
    found, installed = (importlib.util.find_spec(name) for name in ("networks_of_mine", "json"))
    assert found is not None
    assert found.origin == str(tmp_path / "networks_of_mine.py")
    assert installed is not None
    assert installed.origin != str(tmp_path / "json.py")
