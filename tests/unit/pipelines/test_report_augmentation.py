from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convoy.core.errors import ConfigError, DataError
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.pipelines.report_augmentation import (
    AugmentedJob,
    SheetSize,
    draw_augmentation,
    read_augmented_job,
)
from convoy.pipelines.stratified_sample import stratified_rows
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.contact_sheet import cell_origin
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.presets import EvalPreset
from convoy.vision.views import prepare_view
from image_files import encode, photo

LENET = "backbone={arch: lenet5, weights: random, preset: {resize_px: null, crop_px: 32}}"
PRESET = EvalPreset(resize_px=110, crop_px=100)
SIZE = SheetSize(num_images=3, num_views=2)


@pytest.fixture
def workspace(tmp_path: Path) -> str:
    """Many cats, a few dogs, one of them damaged, and one bird, all in train."""
    for name, number in (("cat", 12), ("dog", 3), ("bird", 1)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for index in range(number):
            (folder / f"{index}.png").write_bytes(encode(photo(120, 130, index + len(name)), "PNG"))
    (tmp_path / "images" / "bird" / "0.png").write_bytes(b"no bird")
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(
        store, "pets", str(tmp_path / "images"), splits=SplitOptions(val_fraction=0, test_fraction=0)
    )
    return store.root_uri


def job(workspace: str, rule: DecodeRule | None = None) -> AugmentedJob:
    return AugmentedJob(
        workspace=workspace,
        dataset="pets",
        preset=PRESET,
        policy=AugmentationPolicy.ready("standard"),
        decode_rule=rule or DecodeRule(),
    )


def test_rows_are_of_every_class_before_a_class_comes_again(workspace: str) -> None:
    manifest = open_dataset(LocalStore(workspace), "pets")
    rows = partial(stratified_rows, manifest, splits=[Split.TRAIN], purpose="contact sheet")
    labels = rows(7)["label"].to_pylist()
    assert set(labels[:3]) == {0, 1, 2}
    assert (
        set(labels[3:5]) == set(labels[5:7]) == {manifest.classes.index("cat"), manifest.classes.index("dog")}
    )
    assert rows(7) == rows(7)
    assert rows(100).num_rows == 16


def test_sheet_shows_the_eval_view_and_the_cached_views_of_readable_images(
    workspace: str, tmp_path: Path
) -> None:
    output = tmp_path / "sheet.png"
    report = draw_augmentation(job(workspace), str(output), SIZE, progress=Silent())
    assert (len(report.images), report.rejects, report.draws) == (3, 1, 2)
    assert {image.label for image in report.images} == {"cat", "dog"}
    sheet = np.asarray(Image.open(output))
    rows = {
        row["sample_id"]: row for row in open_dataset(LocalStore(workspace), "pets").read_table().to_pylist()
    }
    for index, image in enumerate(report.images):
        row = rows[image.sample_id]
        assert row["sample_id"].startswith(image.label)
        pixels_CHW = torch.from_numpy(np.array(Image.open(row["uri"]))).permute(2, 0, 1)
        for view in range(3):
            out_CHW = torch.empty(3, 100, 100, dtype=torch.uint8)
            prepare_view(
                pixels_CHW,
                PRESET,
                out_CHW,
                view=view,
                policy=job(workspace).policy,
                content_id=row["content_id"],
            )
            left_px, top_px = cell_origin(index, view, 100)
            cell = sheet[top_px : top_px + 100, left_px : left_px + 100]
            assert np.array_equal(cell, out_CHW.permute(1, 2, 0).numpy())


def test_nothing_to_show_and_nowhere_to_write_are_errors(workspace: str, tmp_path: Path) -> None:
    refusing = DecodeRule(min_side_px=1000)
    with pytest.raises(DataError, match="none of 6 images"):
        draw_augmentation(job(workspace, refusing), str(tmp_path / "a.png"), SIZE, progress=Silent())
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_augmentation(job(workspace), str(tmp_path / "no" / "a.png"), SIZE, progress=Silent())


def test_train_and_cache_configs_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    policy = "augmentation={base: cifar, rotation: {degrees: 5}}"
    common = ["dataset=pets", LENET, policy, "extraction.decode.min_side_px=7", "workspace=here"]
    train = read_augmented_job(None, [*common, "name=probe"])
    cache = read_augmented_job(None, [*common, "taps=[f6]", "views=3"], "there")
    assert train.model_copy(update={"workspace": "there"}) == cache
    assert (train.workspace, train.preset.crop_px, train.decode_rule.min_side_px) == ("here", 32, 7)
    assert cache.policy.rotation is not None
    with pytest.raises(ConfigError, match="taps: unknown key"):
        read_augmented_job(None, [*common, "name=probe", "taps=[f6]"])
