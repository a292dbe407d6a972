"""`convoy report TARGET` beside its subcommands."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from convoy.cli.main import app
from convoy.core.errors import ConfigError
from made_evaluations import RUN, made_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made_workspace(tmp_path_factory.mktemp("command")).root_uri


@pytest.mark.parametrize("words", [[RUN], ["page", RUN], [f"run:{RUN}"], ["pets"]])
def test_a_target_needs_no_command(workspace: str, tmp_path: Path, words: list[str]) -> None:
    output = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", *words, "--workspace", workspace, "--out", str(output)])
    assert result.exit_code == 0, result.output
    assert output.read_bytes().startswith(b"<!doctype html>")


def test_options_may_stand_before_the_target(workspace: str, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    words = ["report", "--out", str(output), "--workspace", workspace, "--json", RUN]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert output.exists()


def test_an_index_needs_no_target(workspace: str, tmp_path: Path) -> None:
    output = tmp_path / "index.html"
    result = CliRunner().invoke(app, ["report", "--index", workspace, "--out", str(output)])
    assert result.exit_code == 0, result.output
    assert RUN in output.read_text()


@pytest.mark.parametrize("words", [["--out", "x.html"], ["pets", "--index", "w"], ["pets", "--pages"]])
def test_one_thing_at_a_time(words: list[str]) -> None:
    result = CliRunner().invoke(app, ["report", *words])
    assert isinstance(result.exception, ConfigError)


def test_the_other_commands_go_on_working() -> None:
    for command in ("augmentation", "ensemble"):
        result = CliRunner().invoke(app, ["report", command, "--help"])
        assert result.exit_code == 0
        assert "--output" in result.output
    result = CliRunner().invoke(app, ["report", "--help"])
    assert result.exit_code == 0
    for word in ("augmentation", "ensemble", "page", "TARGET"):
        assert word in result.output
    result = CliRunner().invoke(app, ["report", "page", "--help"])
    assert "where its name is page" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("option", ["--out", "--output", "-o"])
@pytest.mark.parametrize("words", [["pets"], ["augmentation"], ["ensemble", "none"]])
def test_every_command_takes_the_same_names_of_its_output(
    workspace: str, tmp_path: Path, words: list[str], option: str
) -> None:
    result = CliRunner().invoke(
        app, ["report", *words, "--workspace", workspace, option, str(tmp_path / "x"), "--help"]
    )
    assert result.exit_code == 0, result.output
