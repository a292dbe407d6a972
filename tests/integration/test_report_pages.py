"""`convoy report` of what real jobs left: a training, a scoring with rejects, model, dataset, and the index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_jobs import freeze, write_digits
from command_lines import convoy_here, last_json, settings_arguments
from convoy.vision.contact_sheet import cell_origin
from made_pages import PageParts
from train_jobs import LENET, TrainJob

pytestmark = pytest.mark.integration

FP32 = "extraction={batch_size: 32, precision: fp32}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in three splits: one damaged, one twice."""
    folder = tmp_path_factory.mktemp("images")
    for split, start, num_images in (("train", 0, 96), ("val", 96, 32), ("test", 128, 48)):
        write_digits(folder / split, num_images, start=start)
    (folder / "test" / "0" / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of an image")
    first = next((folder / "train" / "3").glob("*.jpg"))
    (folder / "test" / "3" / "again.jpg").write_bytes(first.read_bytes())
    return folder


@pytest.fixture(scope="module")
def workspace(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    workspace = str(tmp_path_factory.mktemp("reports") / "workspace")
    freeze(images, workspace)
    return workspace


@pytest.fixture(scope="module")
def training(workspace: str, ray_cluster: dict[str, str]) -> dict[str, Any]:
    settings = (
        "name=lenet", f"backbone={LENET}", "strategy=from_scratch", "epochs=2", "learning_rate=0.02",
        "recipe={batch_size: 16, precision: fp32}", "workers.cpus_per_worker=1", "augmentation=light", FP32,
    )  # fmt: skip
    return TrainJob(workspace, settings, ray_cluster).run_here()


@pytest.fixture(scope="module")
def scoring(workspace: str, training: dict[str, Any]) -> dict[str, Any]:
    """Scores of the whole dataset, after a forecast."""
    arguments = [
        "score",
        "--workspace",
        workspace,
        *settings_arguments("dataset=digits", "bundle=lenet", FP32),
    ]
    forecast = convoy_here(*arguments, "--dry-run")
    assert forecast.returncode == 0, forecast.stderr
    finished = convoy_here(*arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    return last_json(finished)


def page_of(target: str, workspace: str, output: Path) -> PageParts:
    finished = convoy_here("report", target, "--workspace", workspace, "--out", str(output), "--json")
    assert finished.returncode == 0, finished.stderr
    report = last_json(finished)
    assert report["notes"] == []
    assert report["size_bytes"] == output.stat().st_size < 1_000_000
    return PageParts(output.read_bytes())


def sections(page: PageParts) -> set[str]:
    return {attributes["id"] for tag, attributes in page.elements if tag == "section"}


def test_a_training_has_curves_augmentation_quality_and_lineage(
    workspace: str, training: dict[str, Any], tmp_path: Path
) -> None:
    page = page_of(training["train_run"], workspace, tmp_path / "report.html")
    assert {
        "curves",
        "augmentation",
        "classes-quality",
        "confusion",
        "calibration",
        "worst",
        "data",
        "lineage",
        "records",
    } <= (sections(page))
    losses = [one["train_loss"] for one in page.json_of("curve-loss")]
    assert losses == [one["train_loss"] for one in training["history"]]
    assert page.json_of("confusion-matrix")["rows_true_columns_predicted"] == training["confusion"]
    assert len(page.json_of("augmentation")["rows"]) == 6
    assert "digest of the package" in page.text


def test_contact_sheet_shows_a_configs_policy_with_the_colours_of_the_users_own_images(
    workspace: str, ray_cluster: dict[str, str], tmp_path: Path
) -> None:
    config, sheet = tmp_path / "train.yaml", tmp_path / "sheet.png"
    config.write_text(
        f"name: lenet\nstrategy: from_scratch\ndataset: digits\nbackbone: {LENET}\n"
        "augmentation: {rotation: {degrees: 20}, pca_colour: {strength: 0.5}}\n",
        encoding="utf-8",
    )
    finished = convoy_here(
        *("report", "augmentation", "--config", str(config), "--set", f"workspace={workspace}"),
        *("--out", str(sheet), "--images", "10", "--views", "3", "--json"),
    )
    assert finished.returncode == 0, finished.stderr
    report = last_json(finished)
    assert sorted(image["label"] for image in report["images"]) == [str(digit) for digit in range(10)]
    assert (report["draws"], report["rejects"]) == (3, 0)
    basis = report["policy"]["pca_colour"]["basis"]
    # Grey images have one colour, and JPEG adds next to nothing to it.
    assert basis["eigenvalues"][0] > 1000 * abs(basis["eigenvalues"][1])
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture)
    for row in range(10):
        cells = []
        for column in range(4):
            left_px, top_px = cell_origin(row, column, 96)
            cells.append(pixels[top_px : top_px + 96, left_px : left_px + 96])
        evaluation, *draws = cells
        assert evaluation.std() > 0
        assert not any(np.array_equal(evaluation, draw) for draw in draws)


def test_a_model_has_its_quality_and_leads_to_its_training(
    workspace: str, training: dict[str, Any], tmp_path: Path
) -> None:
    page = page_of("lenet", workspace, tmp_path / "report.html")
    assert {"model", "confusion", "worst", "lineage"} <= sections(page)
    assert f"run {training['train_run']}" in page.text
    assert page.json_of("model")["model"] == training["bundle"]


def test_a_scoring_has_slices_rejects_and_its_forecast(
    workspace: str, scoring: dict[str, Any], tmp_path: Path
) -> None:
    page = page_of(scoring["run"], workspace, tmp_path / "report.html")
    assert {"predictions", "rejects", "slices", "forecast", "least-sure", "lineage"} <= sections(page)
    assert page.json_of("reject-codes") == scoring["reject_codes"]
    assert sum(page.json_of("predicted").values()) == scoring["results"]
    assert sum(point["rows"] for point in page.json_of("slices")) == scoring["inputs"]
    assert page.json_of("forecast")["forecast"] == scoring["forecast"]


def test_a_dataset_has_a_card_with_its_duplicates(
    workspace: str, scoring: dict[str, Any], ray_cluster: dict[str, str], tmp_path: Path
) -> None:
    settings = settings_arguments("dataset=digits", f"backbone={LENET}", "taps=[f6]", FP32)
    assert convoy_here("cache", "--workspace", workspace, *settings).returncode == 0
    page = page_of("digits", workspace, tmp_path / "report.html")
    assert sections(page) == {"data"}
    found = page.json_of("duplicates")
    assert (found["groups"], found["samples"], found["across_splits"]) == (1, 2, 1)
    assert sum(one["test"] for one in page.json_of("classes")) == 50


def test_the_index_leads_to_the_pages(
    workspace: str, training: dict[str, Any], scoring: dict[str, Any], tmp_path: Path
) -> None:
    page_of("digits", workspace, tmp_path / "digits.html")
    page_of("lenet", workspace, tmp_path / "lenet.html")
    output = tmp_path / "index.html"
    finished = convoy_here("report", "--index", workspace, "--out", str(output), "--json")
    assert finished.returncode == 0, finished.stderr
    report = last_json(finished)
    assert (report["datasets"], report["models"], report["pages"]) == (1, 1, 2)
    page = PageParts(output.read_bytes())
    assert {run["run"] for run in page.json_of("runs")} >= {training["train_run"], scoring["run"]}
    links = [value for value in page.values_of("href") if value.startswith("./")]
    assert links == ["./digits.html", "./lenet.html"]
    top1 = {model["model"]: model["top1"] for model in page.json_of("models")}
    assert top1 == {training["bundle"]: training["top1"]}
