"""Every block of commands in the README runs as it stands, on a bucket of an S3 server, in an order a reader follows.

There is no network here, so the weights that torchvision would download are put where it keeps its downloads; their
values are random. All else is what a reader has.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.models import ResNet18_Weights, resnet18

from fault_proxy import Conditions, FaultProxy
from image_files import encode, grey_rgb
from infra_files import ROOT
from ray_head import BIN
from readme_blocks import fenced_blocks

# The tour takes eight minutes of a busy machine.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]

README = ROOT / "README.md"
TRY_IT, TOUR, CLUSTER = "Convoy", "From a bucket to a scheduled job, in ten minutes", "On a cluster"
READ = "Read the results"
BUCKET = "my-bucket"
IMAGES_A_CLASS, NUM_NEW = 40, 12


@dataclass(frozen=True, slots=True)
class Walked:
    """A tour to its end: its folder, and what it printed."""

    folder: Path
    stdout: str


@pytest.fixture(scope="module")
def tour(
    s3_behind_proxy: FaultProxy,
    ray_behind_proxy: None,
    ray_cluster: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Walked]:
    """The tour of the README, walked in a shell against a store whose create-if-absent is atomic, as AWS's is.

    All of its jobs share a Ray, as on a cluster, which spares their starts.
    """
    folder = tmp_path_factory.mktemp("tour")
    environment = {
        **os.environ,
        **ray_cluster,
        # Ray keeps the token of its clusters there.
        "RAY_AUTH_TOKEN_PATH": str(Path.home() / ".ray" / "auth_token"),
        "HOME": str(folder),
        "TORCH_HOME": str(folder / "torch"),
    }
    put_environment(folder / ".venv")
    put_weights(folder / "torch" / "hub" / "checkpoints")
    with s3_behind_proxy.keeping(Conditions.ATOMIC):
        put_photos(s3_behind_proxy)
        (block,) = fenced_blocks(README, "sh")[TOUR]
        walked = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert walked.returncode == 0, walked.stderr[-4000:]
        yield Walked(folder, walked.stdout)


def put_environment(folder: Path) -> None:
    """What `make setup` leaves, as far as a tour goes: the script that puts the commands on the PATH."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "activate").write_text(f'export PATH="{BIN}:$PATH"\n')


def put_weights(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), folder / Path(ResNet18_Weights.DEFAULT.url).name)


def put_photos(proxy: FaultProxy) -> None:
    """Digits of three classes, as photos in class folders, and some more without a label; one is damaged."""
    client = proxy.client()
    client.create_bucket(Bucket=BUCKET)
    digits = load_digits()
    for label in range(3):
        images = digits.images[digits.target == label]
        for number, grey_HW in enumerate(images[: IMAGES_A_CLASS + NUM_NEW // 3]):
            pixels_HW = (grey_HW.repeat(8, axis=0).repeat(8, axis=1) * (255 / 16)).astype("uint8")
            is_new = number >= IMAGES_A_CLASS
            key = f"new/{label}-{number}.jpg" if is_new else f"photos/{label}/{number:03d}.jpg"
            client.put_object(Bucket=BUCKET, Key=key, Body=encode(grey_rgb(pixels_HW), "JPEG", quality=95))
    client.put_object(Bucket=BUCKET, Key="new/torn.jpg", Body=b"\xff\xd8\xff\xe0 torn")


def test_every_block_is_of_a_section_that_a_test_runs() -> None:
    assert set(fenced_blocks(README, "sh")) == {TRY_IT, TOUR, CLUSTER}  # CLUSTER's: test_submit.py
    assert set(fenced_blocks(README, "sql")) == {READ}
    assert fenced_blocks(README, "") == {}


def test_the_first_block_names_the_two_targets_of_make() -> None:
    (block,) = fenced_blocks(README, "sh")[TRY_IT]
    commands = [line.partition("#")[0].strip() for line in block.splitlines()]
    assert commands == ["make demo", "make test"]
    for command, started in zip(commands, ("jobs/demo.py", "run_pytest.py tests/unit"), strict=True):
        shown = subprocess.run(
            [*command.split(), "--dry-run", "--always-make"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert started in shown.stdout


def test_the_tour_ends_with_scores_that_are_proven_and_a_champion(tour: Walked) -> None:
    score = json.loads((tour.folder / "score.json").read_text())
    assert (score["inputs"], score["results"], score["rejects"]) == (NUM_NEW + 1, NUM_NEW, 1)
    assert (tour.folder / "tuned.html").stat().st_size > 10_000
    for word in ("probe", "tuned", "photos-daily", "champion"):
        assert word in tour.stdout


def test_the_queries_read_the_results_of_the_tour(tour: Walked, fault_proxy: FaultProxy) -> None:
    run = json.loads((tour.folder / "score.json").read_text())["run"]
    download(fault_proxy, f"convoy/runs/{run}/", tour.folder)
    (block,) = fenced_blocks(README, "sql")[READ]
    text = block.replace("WORKSPACE", str(tour.folder / "convoy")).replace("RUN", run)
    counted, rejected = (duckdb.sql(query).fetchall() for query in text.split(";") if query.strip())
    assert sum(count for _, count, _ in counted) == NUM_NEW
    ((code, count, uri),) = rejected
    assert (code, count, uri) == ("truncated", 1, f"s3://{BUCKET}/new/torn.jpg")


def download(proxy: FaultProxy, prefix: str, folder: Path) -> None:
    client = proxy.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
        for listed in page["Contents"]:
            path = folder / listed["Key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(BUCKET, listed["Key"], str(path))
