"""`convoy bench advise`: advice against the truth of running every strategy, and forecasts against more images.

    python tests/benchmarks/advise.py workspace=W 'datasets=[sign-digits]' [key=value ...]

For every dataset and number of images a class there is an advice, which never saw the held-out rows, and the top-1 of
every strategy on those rows, as `convoy bench strategies` measures it, with several seeds. `truth` names reports of
finished runs of that benchmark: what they measured is not measured again. Datasets that are missing in the workspace
are made if their name is one of `advise_datasets.MADE`. Progress goes to stderr; the last line on stdout is the report.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from advise_datasets import MADE, make_dataset
from advise_forecasts import ForecastCase, forecast_cases
from machine import machine_facts
from measuring import BenchSettings, run_benchmark, say
from pydantic import Field
from strategies import Cell, StrategiesBench, run_strategies

from convoy.core.config import StrictModel, load_config
from convoy.core.errors import ConfigError
from convoy.core.progress import Silent
from convoy.pipelines.advise import run_advise
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.advise_report import AdviceReport
from convoy.pipelines.dataset import DatasetConfig, freeze
from convoy.storage.datasets import list_datasets
from convoy.storage.stores import open_store

_CONFIG = str(Path(__file__).parents[2] / "jobs" / "configs" / "advise.sign_digits.yaml")
_POINT = 0.01


class AdviseBench(BenchSettings):
    """What is compared: `datasets` of the workspace, with so many images a class (null: all), by these configs.

    `configs` are those of `convoy bench strategies`, and `config` the advice's: both by one backbone, the first
    candidate, so that strategies match. `overrides` go to every training, `advice_overrides` to every advice.
    """

    workspace: str
    datasets: tuple[str, ...] = ("sign-digits", "digits", "shapes")
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

    `regret` is how far the advised strategy stays behind the best, `rule_regret` the one that the rule of thumb names.
    Seconds are those of the advice, with its pass, and of the epochs of all trainings.
    """

    dataset: str
    per_class: int | None
    advised: str
    rule: str
    best: str
    regret: float
    rule_regret: float | None
    dissimilarity: float
    expected: dict[str, float]
    truth: dict[str, float]
    share_in_interval: float
    advice_s: float
    truth_s: float


def run_advise_bench(settings: AdviseBench) -> dict[str, Any]:
    """The cases, and what they come to."""
    kept = _kept_truth(settings.truth)
    _make_missing(settings)
    cases, forecasts = [], []
    for dataset in settings.datasets:
        for per_class in settings.per_class:
            report = _advise(settings, dataset, per_class)
            cells = _truth(settings, kept, dataset, per_class)
            cases.append(judge(report, cells, per_class))
            say(f"{dataset}, {per_class or 'all'} a class: {cases[-1]!r}")
        config = _advice_config(settings, dataset, None)
        forecasts += forecast_cases(
            config, settings.forecast_sizes, settings.forecast_factors, settings.seeds
        )
    return {
        **summary(cases),
        "forecast": forecast_summary(forecasts),
        "cases": [case.model_dump(mode="json") for case in cases],
        "forecasts": [case.model_dump(mode="json") for case in forecasts],
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
    advised, rule = listed[0].strategy.value, report.rule.strategy.value
    held = [one.interval.low <= truth[one.strategy.value] <= one.interval.high for one in listed]
    return AdviceCase(
        dataset=report.dataset,
        per_class=per_class,
        advised=advised,
        rule=rule,
        best=best,
        regret=truth[best] - truth[advised],
        rule_regret=truth[best] - truth[rule] if rule in truth else None,
        dissimilarity=report.similarity.dissimilarity,
        expected={one.strategy.value: one.expected_top1 for one in listed},
        truth=truth,
        share_in_interval=float(np.mean(held)),
        advice_s=report.seconds,
        truth_s=float(sum(sum(cell.seconds) for cell in cells)),
    )


def summary(cases: Sequence[AdviceCase]) -> dict[str, Any]:
    """The ratios of the report, the keys first that the benchmark is for."""
    rules = [case.rule_regret for case in cases if case.rule_regret is not None]
    return {
        "share_within_1_point": float(np.mean([case.regret <= _POINT + 1e-9 for case in cases])),
        "mean_regret": float(np.mean([case.regret for case in cases])),
        "relative_cost": sum(case.advice_s for case in cases)
        / max(sum(case.truth_s for case in cases), 1e-9),
        "mean_regret_of_rule_of_thumb": float(np.mean(rules)) if rules else None,
        "share_in_interval": float(np.mean([case.share_in_interval for case in cases])),
    }


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


def _advice_config(settings: AdviseBench, dataset: str, per_class: int | None) -> AdviseConfig:
    config = load_config(AdviseConfig, settings.config, [f"dataset={dataset}", *settings.advice_overrides])
    return config.model_copy(
        update={
            "workspace": settings.workspace,
            "candidates": config.candidates[:1],
            "rows": config.rows.model_copy(update={"max_per_class": per_class}),
        }
    )


def _advise(settings: AdviseBench, dataset: str, per_class: int | None) -> AdviceReport:
    config = _advice_config(settings, dataset, per_class)
    return run_advise(config, progress=Silent(), draw_curves=lambda history: b"")


def _truth(
    settings: AdviseBench, kept: dict[str, list[Cell]], dataset: str, per_class: int | None
) -> list[Cell]:
    """The cells of a dataset and number of images: kept ones, and those that no kept report has."""
    known = [cell for cell in kept.get(dataset, []) if cell.per_class == per_class]
    have = {cell.strategy for cell in known}
    lacking = tuple(name for name in settings.configs if not any(name.endswith(one) for one in have))
    if not lacking:
        return known
    bench = StrategiesBench(
        workspace=settings.workspace,
        dataset=dataset,
        configs=lacking,
        per_class=(per_class,),
        seeds=settings.seeds,
        overrides=settings.overrides,
    )
    report = run_strategies(bench)
    return [*known, *(Cell.model_validate(cell) for cell in report["cells"])]


def _kept_truth(paths: Sequence[str]) -> dict[str, list[Cell]]:
    """The cells of finished reports of `convoy bench strategies`, by dataset."""
    kept: dict[str, list[Cell]] = {}
    for path in paths:
        report = json.loads(Path(path).read_text(encoding="utf-8").splitlines()[-1])
        cells = [Cell.model_validate(cell) for cell in report["cells"]]
        kept.setdefault(report["settings"]["dataset"], []).extend(cells)
    return kept


def _make_missing(settings: AdviseBench) -> None:
    known = list_datasets(open_store(settings.workspace))
    for name in settings.datasets:
        if name in known or name not in MADE:
            continue
        folder = Path(settings.workspace, "made", name)
        make_dataset(name, folder)
        freeze(DatasetConfig(workspace=settings.workspace, name=name, source=str(folder)))


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown."""
    path.write_text(page(report), encoding="utf-8")


def page(report: dict[str, Any]) -> str:
    """The report as Markdown: the ratios, a row a case, and the forecasts."""
    lines = ["# Advice against running every strategy", ""]
    lines += [f"- {name}: {fact}" for name, fact in report["machine"].items()]
    lines += ["", "| measure | value |", "| --- | --- |"]
    for name in ("share_within_1_point", "mean_regret", "mean_regret_of_rule_of_thumb", "relative_cost"):
        value = report[name]
        lines.append(f"| {name} | {'' if value is None else f'{value:.3f}'} |")
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
            f" {case['best']} | {case['regret']:.3f} | {pairs} |"
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
