"""The code of a factory is a part of what its network is; nothing of any other network has changed by that."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from convoy.core.errors import ConfigError, VersionMismatch
from convoy.core.fingerprints import digest
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.factories import with_pinned_code
from convoy.vision.presets import EvalPreset
from made_factories import ARCH, write_factory

CONFIG = BackboneConfig(arch=ARCH, weights="random")


def test_a_change_that_no_parameter_shows_gives_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = []
    for activation in ("ReLU", "GELU", "ReLU"):
        write_factory(tmp_path, monkeypatch, activation=activation)
        pinned.append(with_pinned_code(CONFIG))
    assert pinned[0] == pinned[2] != pinned[1]
    assert digest(pinned[0]) != digest(pinned[1])


def test_the_file_counts_in_which_a_factory_is_written_not_the_one_that_hands_it_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "made_door", raising=False)
    write_factory(tmp_path, monkeypatch)
    (tmp_path / "made_door.py").write_text("from made_network import network\n")
    behind = BackboneConfig(arch="made_door:network", weights="random")
    assert with_pinned_code(behind).code_digest == with_pinned_code(CONFIG).code_digest


def test_a_factory_that_is_no_function_has_the_code_of_the_module_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_factory(tmp_path, monkeypatch)
    pinned = with_pinned_code(CONFIG)
    made = sys.modules["made_network"]
    monkeypatch.setattr(made, "network", functools.partial(made.network, num_classes=2))
    assert with_pinned_code(CONFIG) == pinned


def test_a_network_is_not_built_by_other_code_than_it_was_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_factory(tmp_path, monkeypatch)
    pinned = with_pinned_code(CONFIG)
    build_network(pinned)
    write_factory(tmp_path, monkeypatch, activation="GELU")
    for refused in (build_network, with_pinned_code):
        with pytest.raises(VersionMismatch, match=r"made_network\.py on ") as caught:
            refused(pinned)
        assert "all nodes" in caught.value.next_step
    build_network(CONFIG)


def test_a_factory_without_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        with_pinned_code(BackboneConfig(arch="sys:exit"))


def test_only_a_factory_has_code_to_pin() -> None:
    with pytest.raises(ValidationError, match=r"package\.module:factory"):
        BackboneConfig(arch="lenet5", code_digest="a" * 32)


@pytest.mark.parametrize(
    ("config", "identity"),
    [
        (
            BackboneConfig(arch="lenet5", weights="random", preset=EvalPreset(resize_px=32, crop_px=32)),
            "a128154fdd1a27caaf855b8bd7eafa7f",
        ),
        (BackboneConfig(arch="timm:resnet10t", num_classes=3), "188f2a4fadf036ea6f68c3608454afef"),
    ],
)
def test_other_networks_have_the_identity_that_workspaces_remember(
    config: BackboneConfig, identity: str
) -> None:
    assert with_pinned_code(config) is config
    assert digest(config) == identity
