"""A driver that was sent to a cluster is a folder of Convoy's files: the image may know no distribution of it."""

from __future__ import annotations

import importlib.metadata
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import pytest

from convoy.core.version import VERSION
from convoy.report.page import draw_page
from convoy.storage.runs import RunRecord
from made_pages import made_page

ROOT = Path(__file__).parents[3]


def test_runs_and_pages_name_the_version_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Distribution.from_name

    def others(name: str) -> Distribution:
        if name == "convoy-vision":
            raise PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(Distribution, "from_name", others)
    with pytest.raises(PackageNotFoundError):
        importlib.metadata.version("convoy-vision")
    record = RunRecord.new("r", verb="cache", identity={}, config={}, outputs={}, groups=())
    assert record.versions["convoy-vision"] == VERSION
    assert f"Convoy {VERSION}" in draw_page(made_page()).decode()


def test_the_distribution_takes_its_version_from_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in settings["project"]["dynamic"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "convoy.core.version.VERSION"}
