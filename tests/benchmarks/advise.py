"""`convoy bench advise`: advice against the truth of running every strategy, and forecasts against more images.

    python tests/benchmarks/advise.py [workspace=W] ['datasets=[sign-digits]'] [key=value ...]

For every dataset and number of images a class there is an advice, which never saw the held-out rows, and the top-1 on
those rows of every strategy in it, trained with several seeds by the config that the advice wrote for it. Datasets
that the workspace lacks are made or unpacked where `advise_datasets.py` knows how; those that it cannot are left out,
and the report says why. Progress goes to stderr; the last line on stdout is the report.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from advise_datasets import make_dataset, why_missing
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
_RATIOS = (
    "share_within_1_point",
    "mean_regret",
    "mean_regret_of_rule_of_thumb",
    "relative_cost",
    "relative_cost_of_one_seed",
    "share_in_interval",
)


class AdviseBench(BenchSettings):
    """What is compared: `datasets` of the workspace, with so many images a class (null: all), by this advice.

    `workspace` is a local folder, null one that goes away with the process. `data` is the folder with the archives of
    real images, null that of CONVOY_TEST_DATA, or ../shared/data. Of the advice's `config` the first candidate counts.
    `overrides` go to every training, `advice_overrides` to every advice. On `prior_datasets` trainings have set the
    numbers of the advice's formula: the report has its ratios on the others apart.
    """

    workspace: str | None = None
    data: str | None = None
    datasets: tuple[str, ...] = ("sign-digits", "cifar10", "digits", "shapes")
    per_class: tuple[int | None, ...] = (20, 50)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    config: str = _CONFIG
    prior_datasets: tuple[str, ...] = ("sign-digits", "cifar10")
    overrides: tuple[str, ...] = ()
    advice_overrides: tuple[str, ...] = ()
    forecast_sizes: tuple[int, ...] = (20, 40)
    forecast_factors: tuple[int, ...] = (2, 4)


class AdviceCase(StrictModel):
    """One advice against the truth: top-1 of every strategy as the mean of its seeds, expected and measured.

    `regret` is how far the advised strategy stays behind the best, `rule_regret` the one that the rule of thumb names,
    null where the advice has no such strategy. Seconds are those of the advice in a workspace of its own, with its
    pass and its start, and of the epochs of all trainings: passes for probes are left out there.
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
    with tempfile.TemporaryDirectory() as folder:
        return _measure(settings, Path(settings.workspace or folder).absolute())


def _measure(settings: AdviseBench, workspace: Path) -> dict[str, Any]:
    left_out = _make_missing(settings, workspace)
    for dataset, why in left_out.items():
        say(f"{dataset} is left out: {why}")
    datasets = [dataset for dataset in settings.datasets if dataset not in left_out]
    if not datasets:
        raise ConfigError("none of the datasets can be made", next_step="; ".join(left_out.values()))
    cases: list[AdviceCase] = []
    forecasts: list[ForecastCase] = []
    for dataset, per_class in product(datasets, settings.per_class):
        report = _advise(settings, dataset, per_class, workspace)
        cells = [Cell.model_validate(cell) for cell in _train_all(settings, report, per_class, workspace)]
        cases.append(judge(report, cells, per_class))
        say(f"{dataset}, {per_class or 'all'} a class: {cases[-1]!r}")
    for dataset in datasets:
        config = _advice_config(settings, dataset, None, str(workspace))
        forecasts += forecast_cases(
            config, settings.forecast_sizes, settings.forecast_factors, settings.seeds
        )
    return {
        **summary(cases, num_seeds=len(settings.seeds)),
        "elsewhere": _elsewhere(settings, cases),
        "forecast": forecast_summary(forecasts),
        "cases": [case.model_dump(mode="json") for case in cases],
        "forecasts": [case.model_dump(mode="json") for case in forecasts],
        "left_out": left_out,
        "machine": machine_facts(),
        "settings": settings.model_dump(mode="json"),
    }


def judge(report: AdviceReport, cells: Sequence[Cell], per_class: int | None) -> AdviceCase:
    """An advice on one candidate against what its strategies reached."""
    truth = {cell.strategy: float(np.mean(cell.top1_by_seed)) for cell in cells}
    best = max(truth, key=lambda name: truth[name])
    advised, rule = report.strategies[0].strategy.value, report.rule.strategy.value
    held = [one.interval.low <= truth[one.strategy.value] <= one.interval.high for one in report.strategies]
    return AdviceCase(
        dataset=report.dataset,
        per_class=per_class,
        advised=advised,
        rule=rule,
        best=best,
        regret=truth[best] - truth[advised],
        rule_regret=truth[best] - truth[rule] if rule in truth else None,
        dissimilarity=report.similarity.dissimilarity,
        expected={one.strategy.value: one.expected_top1 for one in report.strategies},
        truth=truth,
        share_in_interval=float(np.mean(held)),
        advice_s=report.seconds,
        truth_s=float(sum(sum(cell.seconds) for cell in cells)),
    )


def summary(cases: Sequence[AdviceCase], *, num_seeds: int) -> dict[str, Any]:
    """The ratios of the report, the keys first that the benchmark is for."""
    regrets = [case.regret for case in cases]
    advice_s, truth_s = sum(case.advice_s for case in cases), sum(case.truth_s for case in cases)
    return {
        "share_within_1_point": _mean([regret <= _POINT + 1e-9 for regret in regrets]),
        "mean_regret": _mean(regrets),
        "relative_cost": advice_s / max(truth_s, 1e-9),
        "mean_regret_of_rule_of_thumb": _mean(
            [case.rule_regret for case in cases if case.rule_regret is not None]
        ),
        "relative_cost_of_one_seed": advice_s / max(truth_s / num_seeds, 1e-9),
        "share_in_interval": _mean([case.share_in_interval for case in cases]),
    }


def _elsewhere(settings: AdviseBench, cases: Sequence[AdviceCase]) -> dict[str, Any]:
    """What the cases come to whose datasets the advice's prior was not set on."""
    some = [case for case in cases if case.dataset not in settings.prior_datasets]
    return {"cases": len(some), **summary(some, num_seeds=len(settings.seeds))}


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


def _train_all(
    settings: AdviseBench, report: AdviceReport, per_class: int | None, workspace: Path
) -> list[dict[str, Any]]:
    """Every strategy of an advice, by the config that it wrote."""
    bench = StrategiesBench(
        workspace=str(workspace),
        dataset=report.dataset,
        configs=tuple(one.config for one in report.strategies),
        per_class=(per_class,),
        seeds=settings.seeds,
        overrides=settings.overrides,
    )
    cells: list[dict[str, Any]] = run_strategies(bench)["cells"]
    return cells


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
    others = report["elsewhere"]
    if others["cases"]:
        lines += [
            "",
            f"Of the {others['cases']} cases on datasets that did not set the advice's prior:"
            f" {others['share_within_1_point']:.3f} within one point, mean regret {others['mean_regret']:.3f},"
            f" {others['share_in_interval']:.3f} of the strategies in their interval.",
        ]
    if report["left_out"]:
        lines += ["", *(f"- {dataset} is left out: {why}" for dataset, why in report["left_out"].items())]
    lines += [
        "",
        "Each strategy was trained by the config that the advice wrote for it; expected and measured are top-1.",
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
    lines += [
        "",
        "Forecasts of the probes' learning curves. They are judged on the rows of the curve, so of their intervals the"
        " part that stands for other rows is not tested.",
        "",
        "| images times | cases | coverage of 95 % | mean error | mean absolute error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for factor, one in report["forecast"].items():
        lines.append(
            f"| {factor} | {one['cases']} | {one['coverage']:.2f} | {one['mean_error']:+.3f} |"
            f" {one['mean_abs_error']:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_benchmark(AdviseBench, run_advise_bench, write_page)
