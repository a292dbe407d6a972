"""What every job's command makes of its report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from convoy.cli.main import app
from convoy.cli.options import load, run_job, words
from convoy.core.config import write_settings
from convoy.core.crop_policies import Averaging, CropPolicy
from convoy.core.errors import ConfigError, ErrorBudgetExceeded
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.committees import EnsembleConfig, MemberConfig
from convoy.pipelines.comparison import CompareConfig
from convoy.pipelines.evaluate import EvaluateConfig
from convoy.pipelines.score_config import ScoreConfig


class Report(BaseModel):
    unfetched: int = 0
    within_error_budget: bool = False


@pytest.mark.parametrize(("unfetched", "is_named"), [(0, False), (3, True)])
def test_an_exceeded_error_budget_names_the_repair_where_images_could_not_be_fetched(
    unfetched: int, is_named: bool
) -> None:
    with pytest.raises(ErrorBudgetExceeded) as caught:
        run_job(lambda _: Report(unfetched=unfetched), as_json=True)
    assert ("the 3 again that could not be fetched" in caught.value.next_step) == is_named
    assert ("--retry-unfetched" in caught.value.next_step) == is_named


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


def test_a_config_may_be_named_by_its_uri(tmp_path: Path) -> None:
    (tmp_path / "named one.yaml").write_text("workspace: /w\nsource: old\n")
    uri = (tmp_path / "named one.yaml").as_uri()
    assert load(Named, uri, ["source=new"], None) == Named(workspace="/w", source="new")
    with pytest.raises(ConfigError, match="the config file does not exist"):
        load(Named, f"{uri}.bak", None, None)


def test_a_dry_run_of_a_scoring_hears_new_run(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def plan_score(*_: object, new_run: bool, **__: object) -> Report:
        heard.append(new_run)
        return Report(within_error_budget=True)

    monkeypatch.setattr("convoy.pipelines.score.plan_score", plan_score)
    for options in ([], ["--new-run"]):
        app(["score", "one", "--dataset", "digits", "--dry-run", *options], standalone_mode=False)
    assert heard == [False, True]


FROM_DATASET = {"dataset": "digits"}
NIGHTLY = {"dataset": "digits", "name": "nightly"}
FROM_SOURCE = {"source": "s3://b/old", "name": "old"}


@pytest.mark.parametrize(
    ("said", "options", "settings"),
    [
        (FROM_DATASET, ["--source", "s3://b/new", "--name", "new"], (None, "s3://b/new", "new")),
        (FROM_SOURCE, ["--source", "s3://b/new", "--name", "new"], (None, "s3://b/new", "new")),
        (FROM_SOURCE, ["--dataset", "digits"], ("digits", None, None)),
        (FROM_SOURCE, ["--dataset", "digits", "--name", "again"], ("digits", None, "again")),
        (FROM_SOURCE, ["--name", "again"], (None, "s3://b/old", "again")),
        (NIGHTLY, ["--dataset", "letters"], ("letters", None, "nightly")),
    ],
)
def test_what_is_to_be_scored_on_the_command_line_takes_the_place_of_the_configs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, str],
    options: list[str],
    settings: tuple[str | None, ...],
) -> None:
    heard: list[ScoreConfig] = []

    def run_score(config: ScoreConfig, **_: object) -> Report:
        heard.append(config)
        return Report(within_error_budget=True)

    monkeypatch.setattr("convoy.pipelines.score.run_score", run_score)
    (tmp_path / "score.yaml").write_text(write_settings({"bundle": "one", **said}))
    app(["score", "--config", str(tmp_path / "score.yaml"), *options], standalone_mode=False)
    assert [(one.dataset, one.source, one.name) for one in heard] == [settings]


@pytest.mark.parametrize(
    "options", [["--dataset", "digits"], ["--set", "dataset=digits"]], ids=["options", "set"]
)
def test_a_command_line_that_names_both_a_dataset_and_a_source_is_refused(options: list[str]) -> None:
    with pytest.raises(ConfigError, match="either dataset, or source and name"):
        app(["score", "one", "--source", "s3://b/new", "--name", "new", *options], standalone_mode=False)


OLD_ENSEMBLE = {"members": [{"bundle": "old", "weight": 2.0}], "temperature": 1.5}


@pytest.mark.parametrize(
    ("said", "options", "averaging", "temperature"),
    [
        ({}, ["--set", "ensemble.averaging=logits"], Averaging.LOGITS, 1.0),
        ({"ensemble": OLD_ENSEMBLE}, [], Averaging.PROBABILITIES, 1.5),
        ({"bundle": "old"}, [], Averaging.PROBABILITIES, 1.0),
    ],
)
def test_members_on_the_command_line_are_averaged_as_the_settings_say(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, object],
    options: list[str],
    averaging: Averaging,
    temperature: float,
) -> None:
    heard: list[EvaluateConfig] = []

    def run_evaluate(config: EvaluateConfig, **_: object) -> Report:
        heard.append(config)
        return Report(within_error_budget=True)

    monkeypatch.setattr("convoy.pipelines.evaluate.run_evaluate", run_evaluate)
    path = tmp_path / "evaluate.yaml"
    path.write_text(write_settings({"dataset": "digits", **said}))
    names = ["--ensemble", "one", "--ensemble", "two"]
    app(["evaluate", *names, "--config", str(path), *options], standalone_mode=False)
    members = (MemberConfig(bundle="one"), MemberConfig(bundle="two"))
    expected = EnsembleConfig(members=members, averaging=averaging, temperature=temperature)
    assert [config.ensemble for config in heard] == [expected]


def test_settings_of_an_ensemble_beside_one_bundle_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ensemble\.members: is required"):
        app(
            ["evaluate", "one", "--dataset", "digits", "--set", "ensemble.averaging=logits"],
            standalone_mode=False,
        )


@pytest.mark.parametrize(
    "command", [["evaluate", "one"], ["evaluate", "one", "two", "--compare"], ["inspect", "one"]]
)
def test_a_dataset_that_is_missing_is_asked_for_by_its_option(command: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^dataset: is required: give --dataset \["):
        app(command, standalone_mode=False)


def test_multiscale_settings_without_its_crops_are_refused_and_beside_other_crops_wait() -> None:
    words_ = ["dataset=digits", "bundle=one", "multiscale.squares=1"]
    with pytest.raises(ConfigError, match="set crops to multiscale"):
        load(EvaluateConfig, None, words_, None)
    for crops in (CropPolicy.MULTISCALE, CropPolicy.TEN):
        assert load(EvaluateConfig, None, [*words_, f"crops={crops.value}"], None).multiscale.squares == 1


@pytest.mark.parametrize(
    "said",
    [
        {"bundle": "old"},
        {"model": {"backbone": {"arch": "lenet5"}}},
        {"ensemble": {"members": [{"bundle": "old"}, {"bundle": "older"}]}},
        {"bundles": ["old", "older"]},
    ],
    ids=lambda said: next(iter(said)),
)
def test_models_to_compare_on_the_command_line_take_the_place_of_the_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, object]
) -> None:
    heard: list[CompareConfig] = []

    def compare_bundles(config: CompareConfig, **_: object) -> Report:
        heard.append(config)
        return Report(within_error_budget=True)

    monkeypatch.setattr("convoy.pipelines.comparison.compare_bundles", compare_bundles)
    path = str(tmp_path / "evaluate.yaml")
    Path(path).write_text(write_settings({"dataset": "digits", "crops": "flip", "workspace": "/w", **said}))
    options = ["--config", path, "--dataset", "letters", "--workspace", "/here"]
    app(["evaluate", "--compare", "one", "two", *options], standalone_mode=False)
    (config,) = heard
    assert (config.bundles, config.dataset, config.workspace) == (("one", "two"), "letters", "/here")
    assert config.crops is CropPolicy.FLIP


@pytest.mark.parametrize("bundles", [[], ["one"], ["one", "two"]])
def test_a_comparison_of_an_ensemble_on_the_command_line_is_refused(bundles: list[str]) -> None:
    command = ["evaluate", *bundles, "--ensemble", "three", "--compare", "--dataset", "digits"]
    with pytest.raises(ConfigError, match="leave out --compare to measure the ensemble"):
        app(command, standalone_mode=False)


def test_a_comparison_that_names_no_models_takes_those_of_its_config_alone(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text("dataset: digits\nbundle: old\nbundles: [one, two]\n")
    with pytest.raises(ConfigError, match="bundle: unknown key"):
        app(["evaluate", "--compare", "--config", str(path)], standalone_mode=False)


@pytest.mark.parametrize(
    ("said", "num_epochs"), [("", 10), ("verify:\n", 10), ("verify: {}\n", 10), ("verify: {epochs: 2}\n", 2)]
)
def test_an_advice_verifies_where_told_to_whether_the_config_says_how_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, num_epochs: int
) -> None:
    heard: list[AdviseConfig] = []

    def run_advise(config: AdviseConfig, **_: object) -> Report:
        heard.append(config)
        return Report(within_error_budget=True)

    monkeypatch.setattr("convoy.pipelines.advise.run_advise", run_advise)
    (tmp_path / "advise.yaml").write_text(
        f"dataset: digits\ncandidates: [{{backbone: {{arch: lenet5}}}}]\n{said}"
    )
    app(["advise", "--json", "--verify", "--config", str(tmp_path / "advise.yaml")], standalone_mode=False)
    (verify,) = [config.verify for config in heard]
    assert verify is not None
    assert verify.epochs == num_epochs


@pytest.mark.parametrize("what", ["models", "runs"])
def test_a_list_of_nothing_names_the_workspace_to_people_and_is_json_to_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    workspace = str(tmp_path / "mistyped")
    app([what, "list", "--workspace", workspace], standalone_mode=False)
    assert capsys.readouterr().out == f"{what} of {workspace}: none\n"
    app([what, "list", "--workspace", workspace, "--json"], standalone_mode=False)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)[what] == []


@pytest.mark.parametrize(("days", "code"), [("0.5", 0), ("36500", 0), ("1000000", 2), ("inf", 2), ("-1", 2)])
def test_an_age_of_runs_that_no_date_has_is_a_wrong_option(tmp_path: Path, days: str, code: int) -> None:
    words = ["runs", "gc", "--older-than", days, "--workspace", str(tmp_path)]
    assert CliRunner().invoke(app, words).exit_code == code
