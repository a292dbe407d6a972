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


# What `convoy bench advise` judges, and what it refuses, without a training.
PLAN_ADVICE = """
import sys
from pathlib import Path
from advise import AdviseBench, KeptTruth, judge, plan, summary
from advise_datasets import make_dataset, why_missing
from strategies import Cell
from convoy.core.errors import ConfigError
from convoy.pipelines.classifiers import Strategy
from made_advice import made_advice, made_strategy, interval

def cell(strategy, top1, weights="random"):
    return Cell(config=strategy, strategy=strategy, arch="cifar_resnet20", weights=weights, per_class=20,
                num_train_rows=9, top1_by_seed=[top1], top1=interval(top1), seconds=[1.0])

settings = AdviseBench()
planned = plan(settings, [])
assert len(planned) >= 6 and all(len(case.lacking) == 5 for case in planned)
assert len(plan(settings, [KeptTruth("digits", cell("from_scratch", 0.5))])[4].lacking) == 4
try:
    plan(settings, [KeptTruth("digits", cell("fine_tune", 0.5))])
    sys.exit("other weights were taken for the advice's")
except ConfigError as error:
    assert "fine_tune has cifar_resnet20 with random" in str(error)

report = made_advice()
cells = [cell("fine_tune", 0.9), cell("linear_probe", 0.8)]
scored = judge(report, cells, 20)
assert scored.regret == 0
as_is = report.model_copy(update={"strategies": [made_strategy(1, Strategy.AS_IS, 0.95, 0.0), *report.strategies]})
unscored = judge(as_is, cells, 20)
assert (unscored.advised, unscored.regret) == ("as_is", None)
assert summary([scored, unscored])["unscored_cases"] == 1

assert "there is no cifar10-jpeg.tar.gz" in why_missing("cifar10", sys.argv[1])
make_dataset("sign-digits", Path(sys.argv[2]), sys.argv[1])
print("planned")
"""


def test_the_benchmark_of_advice_plans_with_bare_settings(tmp_path: Path) -> None:
    data, images = tmp_path / "data", tmp_path / "images"
    data.mkdir()
    with tarfile.open(data / "sign-digits-jpeg.tar.gz", "w:gz") as tar:
        for name in ("LICENSE", "Dataset/3/a.JPG", "Dataset/4/b.JPG"):
            tar.addfile(tarfile.TarInfo(name))
    paths = os.pathsep.join(str(ROOT / one) for one in ("tests/benchmarks", "tests", "lib"))
    finished = subprocess.run(
        [sys.executable, "-c", PLAN_ADVICE, str(data), str(images)],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.split() == ["planned"], finished.stderr
    assert sorted(path.relative_to(images).as_posix() for path in images.rglob("*.JPG")) == [
        "3/a.JPG",
        "4/b.JPG",
    ]


def test_the_pages_have_commands() -> None:
    assert [bool(commands_of(ROOT / page)) for page in PAGES] == [True, True]
