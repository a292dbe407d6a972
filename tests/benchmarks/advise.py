"""`convoy bench advise`: advice against the truth of running every strategy, and forecasts against more images.

    python tests/benchmarks/advise.py [workspace=W] ['datasets=[sign-digits]'] [key=value ...]

For every dataset and number of images a class there is an advice, which never saw the held-out rows, and the top-1 of
every strategy on those rows, as `convoy bench strategies` measures it, with several seeds. `truth` names reports of
finished runs of that benchmark: what they measured is not measured again. Datasets that the workspace lacks are made
or unpacked where `advise_datasets.py` knows how; those that it cannot are left out, and the report says why. Progress
goes to stderr; the last line on stdout is the report.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from advise_datasets import make_dataset, why_missing
from advise_forecasts import ForecastCase, forecast_cases
from machine import machine_facts
from measuring import BenchSettings, run_benchmark, say
from pydantic import Field
from strategies import Cell, StrategiesBench, run_strategies, training

from convoy.core.config import StrictModel, load_config
from convoy.core.errors import ConfigError
from convoy.core.progress import Silent
from convoy.pipelines.advise import run_advise
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.advise_report import AdviceReport
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.dataset import DatasetConfig, freeze
from convoy.storage.datasets import list_datasets
from convoy.storage.stores import open_store
from convoy.vision.backbone_config import BackboneConfig

_CONFIG = str(Path(__file__).parents[2] / "jobs" / "configs" / "advise.sign_digits.yaml")
_POINT = 0.01
_RATIOS = ("share_within_1_point", "mean_regret", "mean_regret_of_rule_of_thumb", "relative_cost")


class AdviseBench(BenchSettings):
    """What is compared: `datasets` of the workspace, with so many images a class (null: all), by these configs.

    `workspace` is a local folder, null one that goes away with the process. `data` is the folder with the archives of
    real images, null that of CONVOY_TEST_DATA, or ../shared/data. `configs` are those of `convoy bench strategies`,
    and `config` the advice's: both by one backbone, the first candidate, so that strategies match. `overrides` go to
    every training, `advice_overrides` to every advice.
    """

    workspace: str | None = None
    data: str | None = None
    datasets: tuple[str, ...] = ("sign-digits", "cifar10", "digits", "shapes")
    per_class: tuple[int | None, ...] = (20, 50)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    config: str = _CONFIG
    configs: tuple[str, ...] = StrategiesBench.model_fields["configs"].default
    truth: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    advice_overrides: tuple[str, ...] = ()
    forecast_sizes: tuple[int, ...] = (20, 40)
    forecast_factors: tuple[int, ...] = (2, 4)


class AdviceCase(StrictModel):
    """One advice against the truth: top-1 of every strategy as the mean of its seeds, expected and measured.

    `regret` is how far the advised strategy stays behind the best, `rule_regret` the one that the rule of thumb names,
    null where the truth has no such strategy. Seconds are those of the advice in a workspace of its own, with its
    pass and its start, and of the epochs of all trainings: passes for probes are left out there.
    """

    dataset: str
    per_class: int | None
    advised: str
    rule: str
    best: str
    regret: float | None
    rule_regret: float | None
    dissimilarity: float
    expected: dict[str, float]
    truth: dict[str, float]
    share_in_interval: float
    advice_s: float
    truth_s: float


class KeptTruth(NamedTuple):
    """A cell of a finished report, and the dataset that it was measured on."""

    dataset: str
    cell: Cell


class CasePlan(NamedTuple):
    """A dataset and a number of images a class, and the configs of the strategies that are yet to be measured."""

    dataset: str
    per_class: int | None
    lacking: tuple[str, ...]


def plan(settings: AdviseBench, kept: Sequence[KeptTruth]) -> list[CasePlan]:
    """What is measured, each config checked as its training would; ConfigError where backbones differ."""
    backbone = _advice_config(settings, settings.datasets[0], None, "").candidates[0].backbone
    planned = []
    for dataset in settings.datasets:
        for per_class in settings.per_class:
            known = _known(kept, dataset, per_class)
            have = {cell.strategy for cell in known}
            lacking = tuple(name for name in settings.configs if not any(name.endswith(one) for one in have))
            for cell in known:
                _require_backbone(backbone, cell.arch, cell.weights, cell.strategy, where=cell.config)
            bench = _strategies(settings, dataset, per_class, lacking, workspace="")
            for config in lacking:
                job = training(bench, config, per_class, settings.seeds[0])
                own = job.backbone
                _require_backbone(backbone, own.arch, own.weights, job.strategy.value, where=config)
            planned.append(CasePlan(dataset, per_class, lacking))
    return planned


def run_advise_bench(settings: AdviseBench) -> dict[str, Any]:
    """The cases, and what they come to."""
    kept = _kept_truth(settings.truth, settings.seeds)
    with tempfile.TemporaryDirectory() as folder:
        return _measure(settings, kept, Path(settings.workspace or folder).absolute())


def _measure(settings: AdviseBench, kept: Sequence[KeptTruth], workspace: Path) -> dict[str, Any]:
    planned = plan(settings, kept)
    left_out = _make_missing(settings, workspace)
    for dataset, why in left_out.items():
        say(f"{dataset} is left out: {why}")
    cases: list[AdviceCase] = []
    forecasts: list[ForecastCase] = []
    for dataset, per_class, lacking in planned:
        if dataset in left_out:
            continue
        report = _advise(settings, dataset, per_class, workspace)
        bench = _strategies(settings, dataset, per_class, lacking, workspace=str(workspace))
        measured = run_strategies(bench)["cells"] if lacking else []
        cells = [*_known(kept, dataset, per_class), *(Cell.model_validate(cell) for cell in measured)]
        cases.append(judge(report, cells, per_class))
        say(f"{dataset}, {per_class or 'all'} a class: {cases[-1]!r}")
    for dataset in dict.fromkeys(case.dataset for case in cases):
        config = _advice_config(settings, dataset, None, str(workspace))
        forecasts += forecast_cases(
            config, settings.forecast_sizes, settings.forecast_factors, settings.seeds
        )
    if not cases:
        raise ConfigError("none of the datasets can be made", next_step="; ".join(left_out.values()))
    return {
        **summary(cases),
        "forecast": forecast_summary(forecasts),
        "cases": [case.model_dump(mode="json") for case in cases],
        "forecasts": [case.model_dump(mode="json") for case in forecasts],
        "left_out": left_out,
        "machine": machine_facts(),
        "settings": settings.model_dump(mode="json"),
    }


def judge(report: AdviceReport, cells: Sequence[Cell], per_class: int | None) -> AdviceCase:
    """An advice on the first candidate against what its strategies reached."""
    truth = {cell.strategy: float(np.mean(cell.top1_by_seed)) for cell in cells}
    listed = [one for one in report.strategies if one.strategy.value in truth]
    if not listed:
        raise ConfigError("the advice and the truth have no strategy in common", where=report.dataset)
    best = max(truth, key=lambda name: truth[name])
    advised, rule = report.strategies[0].strategy.value, report.rule.strategy.value
    held = [one.interval.low <= truth[one.strategy.value] <= one.interval.high for one in listed]
    return AdviceCase(
        dataset=report.dataset,
        per_class=per_class,
        advised=advised,
        rule=rule,
        best=best,
        regret=truth[best] - truth[advised] if advised in truth else None,
        rule_regret=truth[best] - truth[rule] if rule in truth else None,
        dissimilarity=report.similarity.dissimilarity,
        expected={one.strategy.value: one.expected_top1 for one in listed},
        truth=truth,
        share_in_interval=float(np.mean(held)),
        advice_s=report.seconds,
        truth_s=float(sum(sum(cell.seconds) for cell in cells)),
    )


def summary(cases: Sequence[AdviceCase]) -> dict[str, Any]:
    """The ratios of the report, the keys first that the benchmark is for.

    Cases whose advised strategy the truth lacks have no regret: `unscored_cases` counts them.
    """
    regrets = [case.regret for case in cases if case.regret is not None]
    rules = [case.rule_regret for case in cases if case.rule_regret is not None]
    return {
        "share_within_1_point": _mean([regret <= _POINT + 1e-9 for regret in regrets]),
        "mean_regret": _mean(regrets),
        "relative_cost": sum(case.advice_s for case in cases)
        / max(sum(case.truth_s for case in cases), 1e-9),
        "mean_regret_of_rule_of_thumb": _mean(rules),
        "share_in_interval": _mean([case.share_in_interval for case in cases]),
        "scored_cases": len(regrets),
        "unscored_cases": len(cases) - len(regrets),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def forecast_summary(forecasts: Sequence[ForecastCase]) -> dict[str, Any]:
    """By factor: how many cases, how often the interval holds the truth, and how far the forecast is off."""
    result = {}
    for factor in sorted({case.factor for case in forecasts}):
        some = [case for case in forecasts if case.factor == factor]
        errors = [case.forecast.estimate - case.truth for case in some]
        result[str(factor)] = {
            "cases": len(some),
            "coverage": float(np.mean([case.is_held for case in some])),
            "mean_abs_error": float(np.mean(np.abs(errors))),
            "mean_error": float(np.mean(errors)),
            "mean_width": float(np.mean([case.forecast.high - case.forecast.low for case in some])),
        }
    return result


def _kept_truth(paths: Sequence[str], seeds: Sequence[int]) -> list[KeptTruth]:
    """The cells of finished reports of `convoy bench strategies`; ConfigError for a report with other seeds."""
    kept = []
    for path in paths:
        report = json.loads(Path(path).read_text(encoding="utf-8").splitlines()[-1])
        if list(report["settings"]["seeds"]) != list(seeds):
            raise ConfigError(
                f"the kept truth has the seeds {report['settings']['seeds']}, not {list(seeds)}",
                where=path,
                next_step="name the seeds of the report by seeds=[...], or leave it out",
            )
        cells = [Cell.model_validate(cell) for cell in report["cells"]]
        kept += [KeptTruth(report["settings"]["dataset"], cell) for cell in cells]
    return kept


def _known(kept: Sequence[KeptTruth], dataset: str, per_class: int | None) -> list[Cell]:
    return [one.cell for one in kept if one.dataset == dataset and one.cell.per_class == per_class]


def _require_backbone(advised: BackboneConfig, arch: str, weights: str, strategy: str, *, where: str) -> None:
    """ConfigError where a strategy was, or would be, measured with another network than the advice looks through."""
    starts_alike = strategy == Strategy.FROM_SCRATCH.value or weights == advised.weights
    if arch != advised.arch or not starts_alike:
        raise ConfigError(
            f"{strategy} has {arch} with {weights}, the advice {advised.arch} with {advised.weights}",
            where=where,
            next_step="name configs, kept truth and an advice of one backbone",
        )


def _advice_config(
    settings: AdviseBench, dataset: str, per_class: int | None, workspace: str
) -> AdviseConfig:
    config = load_config(AdviseConfig, settings.config, [f"dataset={dataset}", *settings.advice_overrides])
    return config.model_copy(
        update={
            "workspace": workspace,
            "candidates": config.candidates[:1],
            "rows": config.rows.model_copy(update={"max_per_class": per_class}),
        }
    )


def _advise(settings: AdviseBench, dataset: str, per_class: int | None, workspace: Path) -> AdviceReport:
    """The advice in a workspace that has the dataset and nothing else: its seconds are those of all that it needs."""
    own = workspace / "advised" / f"{dataset}-{per_class or 'all'}"
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(workspace / "datasets" / dataset, own / "datasets" / dataset)
    config = _advice_config(settings, dataset, per_class, str(own))
    return run_advise(config, progress=Silent(), draw_curves=lambda history: b"")


def _strategies(
    settings: AdviseBench, dataset: str, per_class: int | None, configs: tuple[str, ...], *, workspace: str
) -> StrategiesBench:
    return StrategiesBench(
        workspace=workspace,
        dataset=dataset,
        configs=configs,
        per_class=(per_class,),
        seeds=settings.seeds,
        overrides=settings.overrides,
    )


def _make_missing(settings: AdviseBench, workspace: Path) -> dict[str, str]:
    """Make the datasets that the workspace lacks; those that cannot be made, and why."""
    known = list_datasets(open_store(str(workspace)))
    left_out = {}
    for name in settings.datasets:
        if name in known:
            continue
        if (why := why_missing(name, settings.data)) is not None:
            left_out[name] = why
            continue
        folder = workspace / "made" / name
        make_dataset(name, folder, settings.data)
        freeze(DatasetConfig(workspace=str(workspace), name=name, source=str(folder)))
    return left_out


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown."""
    path.write_text(page(report), encoding="utf-8")


def page(report: dict[str, Any]) -> str:
    """The report as Markdown: the ratios, a row a case, and the forecasts."""
    lines = ["# Advice against running every strategy", ""]
    lines += [f"- {name}: {fact}" for name, fact in report["machine"].items()]
    lines += ["", "| measure | value |", "| --- | --- |"]
    for name in _RATIOS:
        value = report[name]
        lines.append(f"| {name} | {'' if value is None else f'{value:.3f}'} |")
    lines += ["", f"- cases whose advised strategy the truth lacks: {report['unscored_cases']}"]
    lines += [f"- {dataset} is left out: {why}" for dataset, why in report["left_out"].items()]
    lines += [
        "",
        "| dataset | images a class | dissimilarity | advised | best | regret | expected, measured |",
    ]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for case in report["cases"]:
        pairs = ", ".join(
            f"{name} {case['expected'].get(name, float('nan')):.3f} {truth:.3f}"
            for name, truth in sorted(case["truth"].items(), key=lambda item: -item[1])
        )
        lines.append(
            f"| {case['dataset']} | {case['per_class'] or 'all'} | {case['dissimilarity']:.2f} | {case['advised']} |"
            f" {case['best']} | {'' if case['regret'] is None else format(case['regret'], '.3f')} | {pairs} |"
        )
    lines += ["", "| images times | cases | coverage of 95 % | mean error | mean absolute error |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for factor, one in report["forecast"].items():
        lines.append(
            f"| {factor} | {one['cases']} | {one['coverage']:.2f} | {one['mean_error']:+.3f} |"
            f" {one['mean_abs_error']:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_benchmark(AdviseBench, run_advise_bench, write_page)
