"""The config of advice: what fits together, and the example of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from convoy.core.config import load_config
from convoy.core.errors import ConfigError
from convoy.pipelines.advise import _refuse_equal_networks
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.advise_strategies import config_name
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifiers import Strategy

CONFIG = Path(__file__).parents[3] / "jobs" / "configs" / "advise.sign_digits.yaml"
LENET = "candidates=[{backbone: {arch: lenet5, weights: random}}]"


def test_the_example_of_the_repository_loads() -> None:
    config = load_config(AdviseConfig, str(CONFIG))
    assert config.dataset_name == "sign-digits"
    assert [candidate.name for candidate in config.candidates] == [
        "cifar_resnet20/resnet20-12fca82f",
        "cifar_resnet56/resnet56-4bfd9763",
    ]


def test_a_source_becomes_the_dataset_of_its_name() -> None:
    config = load_config(AdviseConfig, None, [LENET, "source=/photos", "name=photos"])
    assert config.dataset_name == "photos"


def test_a_source_and_a_name_are_enough() -> None:
    config = load_config(AdviseConfig, None, ["source=/photos", "name=photos"])
    assert [one.name for one in config.candidates] == [
        "torchvision:resnet18/DEFAULT",
        "torchvision:resnet50/DEFAULT",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dataset=a", "source=b", "name=c"], "either dataset"),
        ([], "either dataset"),
        (["source=b"], "needs a name"),
        (["dataset=a", "rows={fold: {index: 0, count: 5}}"], "leave rows.fold out"),
        (["dataset=a", "head={kind: linear_svm}"], "leave head.kind out"),
        (["dataset=a", "head={kind: mlp}"], "leave head.kind out"),
        (["dataset=a", "look={images_per_class: 3}"], "greater than or equal to 4"),
        (["dataset=a", "curve={fractions: [0.5, 1]}"], "name two fractions below 1, or more"),
        (["dataset=a", "curve={fractions: [0.5, 0.5]}"], "name two fractions below 1, or more"),
    ],
)
def test_what_does_not_fit_together_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(AdviseConfig, None, [LENET, *settings])


def test_all_images_are_a_size_of_the_curve_without_being_named() -> None:
    config = load_config(AdviseConfig, None, [LENET, "dataset=a", "curve={fractions: [0.25, 0.5]}"])
    assert config.curve.fractions == (0.25, 0.5)


def candidates_of(*weights: str) -> AdviseConfig:
    backbones = ", ".join(f"{{backbone: {{arch: lenet5, weights: {one}}}}}" for one in weights)
    return load_config(AdviseConfig, None, ["dataset=a", f"candidates=[{backbones}]"])


@pytest.mark.parametrize(
    "weights", [("/one/best.pt", "/two/best.pt"), ("net.v1.safetensors", "net-v1.safetensors")]
)
def test_checkpoints_of_like_names_are_told_apart_by_their_weights(weights: tuple[str, str]) -> None:
    config = candidates_of(*weights)
    names = [config.name_of(one, digit * 32) for one, digit in zip(config.candidates, "ab", strict=True)]
    configs = {config_name("a", Strategy.FINE_TUNE, name) for name in names}
    assert len(configs) == 2
    assert names[0].endswith(" aaaaaaaa")


def test_names_that_differ_stay_short() -> None:
    config = candidates_of("/one/best.pt", "/one/last.pt")
    assert config.name_of(config.candidates[0], "a" * 32) == "lenet5/best"


def test_a_checkpoint_and_its_copy_are_refused() -> None:
    config = candidates_of("/one/best.pt", "/two/best.pt")
    records = [BackboneRecord.model_construct(weights_digest="a" * 32)] * 2
    with pytest.raises(ConfigError, match="equal weights"):
        _refuse_equal_networks(config, records)


def test_a_candidate_is_named_once() -> None:
    twice = "candidates=[{backbone: {arch: lenet5}}, {backbone: {arch: lenet5}, taps: [c3]}]"
    with pytest.raises(ConfigError, match="another backbone"):
        load_config(AdviseConfig, None, ["dataset=a", twice])
