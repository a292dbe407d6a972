"""Every command in the pages for people is one that the command line knows, with options that it takes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from convoy.cli.main import app
from convoy.core.config import load_config, parse_config
from convoy.pipelines.inspect_config import InspectConfig
from convoy.pipelines.tune_config import TuneConfig
from infra_files import ROOT
from readme_blocks import fenced_blocks

PAGES = ("README.md", "jobs/README.md")


def commands_of(page: Path) -> list[str]:
    blocks = [*fenced_blocks(page, "").values(), *fenced_blocks(page, "sh").values()]
    lines = "\n".join(text for texts in blocks for text in texts).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("convoy ")]


def parse(command: Any, arguments: list[str]) -> None:
    """Parse as the command line does, down to the command that would run."""
    context = command.make_context(command.name, arguments)
    if hasattr(command, "commands"):
        # Click keeps the first word apart, under a name that changed.
        words = [*getattr(context, "_protected_args", ()), *context.args]
        _, inner, rest = command.resolve_command(context, words)
        parse(inner, rest)


@pytest.mark.parametrize(
    ("page", "line"), [(page, line) for page in PAGES for line in commands_of(ROOT / page)]
)
def test_the_command_line_takes_every_command_of_a_page(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    parse(typer.main.get_command(app), words[1 : words.index("|")] if "|" in words else words[1:])


def test_make_chaos_runs_every_test_that_the_table_of_faults_names() -> None:
    table = (ROOT / "tests/chaos/README.md").read_text()
    named = set(re.findall(r"`(?:(?:unit|integration|contract)/[\w/]*)?test_[\w*]+\.py`", table))
    elsewhere = {name.strip("`") for name in named if "/" in name}
    assert elsewhere
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^chaos:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert {name for name in elsewhere if f"tests/{name}" not in recipe} == set()
    inside = {name.strip("`") for name in named if "/" not in name}
    assert {name for name in inside if not (ROOT / "tests/chaos" / name).exists()} == set()
    # pytest runs nothing at all where one test that is asked for is not there.
    single = re.findall(r"(tests/[\w/]+\.py)::(\w+)", recipe)
    assert single
    assert [name for file, name in single if f"\ndef {name}(" not in (ROOT / file).read_text()] == []


def test_what_the_readme_scores_on_a_cluster_was_made_by_its_tour() -> None:
    blocks = fenced_blocks(ROOT / "README.md", "sh")
    (tour,), (cluster,) = blocks["From a bucket to a scheduled job, in ten minutes"], blocks["On a cluster"]
    made = set(re.findall(r"(?:--name |--set name=)([\w-]+)", tour))
    scored = set(re.findall(r"--set (?:bundle|dataset)=([\w-]+)", cluster))
    assert scored
    assert scored <= made
    (variable,) = re.findall(r"^export (\w+)=s3://", tour, re.MULTILINE)
    assert f'--workspace "${variable}"' in cluster


def test_the_search_of_the_page_is_one() -> None:
    (text,) = fenced_blocks(ROOT / "jobs/README.md", "yaml")["Search, and average what helps"]
    config = parse_config(TuneConfig, yaml.safe_load(text), where="jobs/README.md")
    assert [training.name for training in config.examples()]


def test_the_inspection_of_the_page_is_one() -> None:
    config = load_config(InspectConfig, str(ROOT / "jobs" / "configs" / "inspect.cifar.yaml"), [])
    assert config.model is not None
    assert len(config.model.classes or ()) == 10


# The settings of a benchmark are a class of its script, which has the scripts beside it on its path.
PARSE_SETTINGS = """
import importlib, json, sys
from convoy.core.config import load_config
from measuring import BenchSettings
for name, settings in json.loads(sys.argv[1]):
    module = importlib.import_module(name)
    (model,) = [
        one for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, BenchSettings) and one.__module__ == name
    ]
    load_config(model, None, settings)
print(len(json.loads(sys.argv[1])))
"""


def test_the_benchmarks_take_the_settings_of_their_page() -> None:
    lines = [shlex.split(line, comments=True) for line in commands_of(ROOT / "tests/benchmarks/README.md")]
    asked = [
        (words[2], [value for option, value in pairwise(words) if option == "--set"])
        for words in lines
        if words[1] == "bench"
    ]
    assert len(asked) > 10
    paths = os.pathsep.join(str(ROOT / one) for one in ("tests/benchmarks", "tests"))
    finished = subprocess.run(
        [sys.executable, "-c", PARSE_SETTINGS, json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.split() == [str(len(asked))], finished.stderr


# What `convoy bench advise` judges, without a training.
JUDGE_ADVICE = """
import sys
from pathlib import Path
from advise import AdviseBench, judge, summary
from advise_datasets import make_dataset, why_missing
from strategies import Cell, StrategiesBench, training
from made_advice import made_advice, interval

def cell(strategy, top1):
    return Cell(config=strategy, strategy=strategy, arch="cifar_resnet20", weights="random", per_class=20,
                num_train_rows=9, top1_by_seed=[top1], top1=interval(top1), seconds=[1.0])

AdviseBench()
report = made_advice()
advised, *others = [one.strategy.value for one in report.strategies]
won = judge(report, [cell(advised, 0.9), *(cell(one, 0.8) for one in others)], 20)
lost = judge(report, [cell(advised, 0.6), *(cell(one, 0.8) for one in others)], 20)
assert (won.regret, won.best) == (0, advised)
assert abs(lost.regret - 0.2) < 1e-9 and lost.best in others
ratios = summary([won, lost], num_seeds=3)
assert ratios["share_within_1_point"] == 0.5 and abs(ratios["mean_regret"] - 0.1) < 1e-9
assert abs(ratios["relative_cost_of_one_seed"] - 3 * ratios["relative_cost"]) < 1e-9

Path("train.own.yaml").write_text(
    "{name: own, dataset: d, strategy: from_scratch, backbone: {arch: lenet5},"
    " rows: {fold: {index: 1, count: 3}}}"
)
bench = StrategiesBench(workspace="w", dataset="digits", configs=("train.own.yaml",))
job = training(bench, bench.configs[0], 20, 1)
assert (job.name, job.dataset, job.backbone.seed) == ("own-20-seed-1", "digits", 1)
assert (job.rows.max_per_class, job.rows.seed, job.rows.fold.count) == (20, 1, 3)

assert "there is no cifar10-jpeg.tar.gz" in why_missing("cifar10", sys.argv[1])
make_dataset("sign-digits", Path(sys.argv[2]), sys.argv[1])
print("judged")
"""


def test_the_benchmark_of_advice_judges_it_by_what_its_strategies_reached(tmp_path: Path) -> None:
    data, images = tmp_path / "data", tmp_path / "images"
    data.mkdir()
    with tarfile.open(data / "sign-digits-jpeg.tar.gz", "w:gz") as tar:
        for name in ("LICENSE", "Dataset/3/a.JPG", "Dataset/4/b.JPG"):
            tar.addfile(tarfile.TarInfo(name))
    paths = os.pathsep.join(str(ROOT / one) for one in ("tests/benchmarks", "tests", "lib"))
    finished = subprocess.run(
        [sys.executable, "-c", JUDGE_ADVICE, str(data), str(images)],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.split() == ["judged"], finished.stderr
    assert sorted(path.relative_to(images).as_posix() for path in images.rglob("*.JPG")) == [
        "3/a.JPG",
        "4/b.JPG",
    ]


def test_the_pages_have_commands() -> None:
    assert [bool(commands_of(ROOT / page)) for page in PAGES] == [True, True]
