"""The configs that we ship for real photos of hands, from the command line, at a budget of seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cache_jobs import freeze
from cifar_images import DATA, ROOT, WEIGHTS, unpack
from command_lines import convoy_json, settings_arguments

pytestmark = pytest.mark.integration

ARCHIVE = DATA / "sign-digits-jpeg.tar.gz"
NETWORKS = ("partial_reuse", "fine_tune", "from_scratch")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> str:
    for path in (ARCHIVE, WEIGHTS):
        if not path.exists():
            pytest.skip(f"no {path}; set CONVOY_TEST_DATA to the folder that has it")
    folder = tmp_path_factory.mktemp("sign-digits")
    unpack(folder, "Dataset/", archive=ARCHIVE)
    workspace = str(folder / "workspace")
    freeze(folder / "Dataset", workspace, name="sign-digits")
    return workspace


def run_shipped(
    verb: str, name: str, workspace: str, ray: Mapping[str, str], *settings: str
) -> dict[str, Any]:
    """A config of ours as it is, but for where the weights lie and for what is set."""
    text = (ROOT / "jobs" / "configs" / f"{verb}.{name}.yaml").read_text(encoding="utf-8")
    config = Path(workspace).parent / f"{verb}.{name}.yaml"
    config.write_text(text.replace("../shared/data", str(DATA)), encoding="utf-8")
    arguments = ("--config", str(config), "--workspace", workspace, *settings_arguments(*settings))
    return convoy_json(verb, *arguments, environment=ray)


@pytest.mark.parametrize("strategy", ["linear_probe", "early_layer_probe", *NETWORKS])
def test_every_strategy_makes_a_model_of_photos_of_hands(
    strategy: str, workspace: str, ray_cluster: dict[str, str]
) -> None:
    few = ["rows.max_per_class=10", *(["epochs=1"] if strategy in NETWORKS else [])]
    report = run_shipped("train", f"sign_digits_{strategy}", workspace, ray_cluster, *few)
    assert (report["strategy"], report["num_train_rows"]) == (strategy, 100)
    assert report["bundle"].startswith(f"sign-digits-{strategy.replace('_', '-')}@")
    # Heads on features learn something of ten images; an epoch of four updates is only sure to end.
    assert report["top1"] > (0.3 if strategy not in NETWORKS else 0)


def test_advice_ranks_all_strategies_for_photos_of_hands(workspace: str, ray_cluster: dict[str, str]) -> None:
    look = "look={images_per_class: 20, judged_per_class: 10}"
    report = run_shipped("advise", "sign_digits", workspace, ray_cluster, look)
    assert {one["strategy"] for one in report["strategies"]} >= {"linear_probe", *NETWORKS}
    assert {one["backbone"].partition("/")[0] for one in report["strategies"]} == {
        "cifar_resnet20",
        "cifar_resnet56",
    }
    for one in report["strategies"]:
        assert one["interval"]["low"] <= one["expected_top1"] <= one["interval"]["high"]
        assert one["cost"]["low_s"] <= one["cost"]["seconds"] <= one["cost"]["high_s"]
    assert report["more_data"]["wanted_top1"] == 0.99
    # Planes and frogs say less of hands than of planes and frogs.
    assert report["similarity"]["dissimilarity"] > 0.2
