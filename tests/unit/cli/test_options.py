"""What every job's command makes of its report."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import BaseModel

from convoy.cli.main import app
from convoy.cli.options import load, run_job, words
from convoy.core.errors import ErrorBudgetExceeded


class Report(BaseModel):
    unfetched: int = 0
    within_error_budget: bool = False


@pytest.mark.parametrize(("unfetched", "is_named"), [(0, False), (3, True)])
def test_an_exceeded_error_budget_names_new_run_where_images_could_not_be_fetched(
    unfetched: int, is_named: bool
) -> None:
    with pytest.raises(ErrorBudgetExceeded) as caught:
        run_job(lambda _: Report(unfetched=unfetched), as_json=True)
    assert ("3 that could not be fetched" in caught.value.next_step) == is_named
    assert ("--new-run" in caught.value.next_step) == is_named


class Measured(BaseModel):
    top1: float
    logme: float


def test_a_number_that_is_not_finite_is_null_in_the_report_for_machines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_job(lambda _: Measured(top1=0.5, logme=math.nan), as_json=True)
    assert capsys.readouterr().out == '{"top1": 0.5, "logme": null}\n'


class Named(BaseModel):
    workspace: str
    source: str


def test_names_on_the_command_line_may_have_any_character() -> None:
    """JSON writes those beyond U+FFFF as two halves, which YAML takes for two characters."""
    place = "/data/\U00020bb7"
    assert load(Named, None, words(source=place), place) == Named(workspace=place, source=place)


def test_a_dry_run_of_a_scoring_hears_new_run(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def plan_score(*_: object, new_run: bool, **__: object) -> Report:
        heard.append(new_run)
        return Report(within_error_budget=True)

    monkeypatch.setattr("convoy.pipelines.score.plan_score", plan_score)
    for options in ([], ["--new-run"]):
        app(["score", "one", "--dataset", "digits", "--dry-run", *options], standalone_mode=False)
    assert heard == [False, True]


@pytest.mark.parametrize("what", ["models", "runs"])
def test_a_list_of_nothing_names_the_workspace_to_people_and_is_json_to_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    workspace = str(tmp_path / "mistyped")
    app([what, "list", "--workspace", workspace], standalone_mode=False)
    assert capsys.readouterr().out == f"{what} of {workspace}: none\n"
    app([what, "list", "--workspace", workspace, "--json"], standalone_mode=False)
    assert capsys.readouterr().out == f'{{"{what}": []}}\n'
