"""`convoy bench strategies`: which way to use a network wins at which number of images.

    python tests/benchmarks/strategies.py workspace=W dataset=sign-digits [key=value ...]

Each config runs with every number of training images a class and every seed (of the images that are drawn, and of
the training), all measured on the same held-out rows. Progress goes to stderr; the last line on stdout is the
report as JSON. The keys are the fields of `StrategiesBench`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as pads
from machine import machine_facts
from measuring import BenchSettings, run_benchmark, say
from pydantic import Field

from convoy.cluster.session import ray_session
from convoy.core.config import StrictModel, load_config
from convoy.core.progress import Silent
from convoy.core.statistics import Interval, bootstrap_mean
from convoy.pipelines.train import run_train
from convoy.pipelines.train_config import TrainConfig

_CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
_STRATEGIES = ("linear_probe", "early_layer_probe", "partial_reuse", "fine_tune", "from_scratch")


class StrategiesBench(BenchSettings):
    """What is measured: `configs` are files of jobs/configs without `train.` and `.yaml`, or paths of others.

    `per_class` are the training images of each class, null stands for all of them. `overrides` go to every job.
    The workspace is a local folder that has the dataset.
    """

    workspace: str
    dataset: str
    configs: tuple[str, ...] = tuple(f"sign_digits_{strategy}" for strategy in _STRATEGIES)
    per_class: tuple[int | None, ...] = (20, 50, None)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    overrides: tuple[str, ...] = ()


class Cell(StrictModel):
    """One config at one number of images: top-1 of each seed, their mean, and its 95 % interval.

    The interval is a bootstrap over the held-out images, each counted with its mean over the seeds: how far
    other images would move the mean. How far other seeds would is what `top1_by_seed` shows.
    """

    config: str
    strategy: str
    arch: str
    weights: str
    per_class: int | None
    num_train_rows: int
    top1_by_seed: list[float]
    top1: Interval
    seconds: list[float]


def run_strategies(settings: StrategiesBench) -> dict[str, Any]:
    """All cells, in the order of the settings, and which config is the best at each number of images."""
    cells = []
    with ray_session():
        for per_class in settings.per_class:
            cells += [_measure(settings, config, per_class) for config in settings.configs]
    best = {
        str(per_class or "all"): max(
            (cell for cell in cells if cell.per_class == per_class), key=lambda cell: cell.top1.estimate
        ).config
        for per_class in settings.per_class
    }
    return {
        "best": best,
        "cells": [cell.model_dump(mode="json") for cell in cells],
        "machine": machine_facts(),
        "settings": settings.model_dump(mode="json"),
    }


def _measure(settings: StrategiesBench, config: str, per_class: int | None) -> Cell:
    jobs = [training(settings, config, per_class, seed) for seed in settings.seeds]
    backbone = jobs[0].backbone
    reports = [
        run_train(job, progress=Silent(), draw_curves=lambda history: b"", new_run=True) for job in jobs
    ]
    correct_SN = np.stack([_correct(settings.workspace, report.run) for report in reports])
    cell = Cell(
        config=_label(config),
        strategy=reports[0].strategy.value,
        arch=backbone.arch,
        weights=backbone.weights,
        per_class=per_class,
        num_train_rows=reports[0].num_train_rows,
        top1_by_seed=[report.top1 for report in reports],
        top1=bootstrap_mean(correct_SN.mean(axis=0)),
        seconds=[sum(epoch.seconds for epoch in report.history) for report in reports],
    )
    say(f"{cell.config}, {per_class or 'all'} a class: {cell.top1!r}")
    return cell


def _label(config: str) -> str:
    return Path(config).name.removeprefix("train.").removesuffix(".yaml")


def training(settings: StrategiesBench, config: str, per_class: int | None, seed: int) -> TrainConfig:
    """The training of a config with so many images a class and a seed."""
    name = f"{_label(config).replace('_', '-')}-{per_class or 'all'}-seed-{seed}"
    overrides = [
        f"name={name}",
        f"workspace={json.dumps(settings.workspace)}",
        f"dataset={settings.dataset}",
        f"rows.max_per_class={json.dumps(per_class)}",
        f"rows.seed={seed}",
        f"recipe.seed={seed}",
        f"augmentation.seed={seed}",
        f"backbone.seed={seed}",
        *settings.overrides,
    ]
    path = config if config.endswith(".yaml") else str(_CONFIGS / f"train.{config}.yaml")
    return load_config(TrainConfig, path, overrides)


def _correct(workspace: str, run: str) -> np.ndarray:
    """For each held-out sample, in the order of the ids, whether its prediction is right."""
    rows = pads.dataset(f"{workspace}/runs/{run}/predictions").to_table(["sample_id", "label", "pred"])
    rows = rows.sort_by("sample_id")
    return rows["label"].to_numpy() == rows["pred"].to_numpy()


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown."""
    path.write_text(_page(report), encoding="utf-8")


def _page(report: dict[str, Any]) -> str:
    lines = [f"# Strategies on {report['settings']['dataset']}", ""]
    lines += [f"- {name}: {fact}" for name, fact in report["machine"].items()]
    lines += ["", "| images a class | strategy | top-1, mean of seeds | 95 % interval | by seed |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for cell in report["cells"]:
        top1, by_seed = cell["top1"], ", ".join(f"{value:.3f}" for value in cell["top1_by_seed"])
        lines.append(
            f"| {cell['per_class'] or 'all'} | {cell['strategy']} | {top1['estimate']:.3f} |"
            f" {top1['low']:.3f} to {top1['high']:.3f} | {by_seed} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_benchmark(StrategiesBench, run_strategies, write_page)
