"""The evaluation that all ways of `convoy bench evaluate` do: its images, networks and crops."""

from __future__ import annotations

import os

import numpy as np
from measuring import list_images
from pydantic import Field, PositiveInt
from torch import nn

from convoy.core.config import StrictModel
from convoy.core.crop_policies import CropPlan, CropPolicy
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.presets import EvalPreset

PLAN = CropPlan(policy=CropPolicy.TEN)
NUM_VIEWS = 10


class EvaluateJob(StrictModel):
    """Ten crops of every image of a folder by committees of the first networks, all with equal weights.

    The seed of a network is its place. `outputs` is the file for the joint log-probabilities of all networks.
    `compiled` is for Convoy, and its bounds.
    """

    images: str
    archs: tuple[str, ...]
    sizes: tuple[PositiveInt, ...]
    crop_px: PositiveInt
    batch_size: PositiveInt
    outputs: str
    compiled: bool = False

    @property
    def preset(self) -> EvalPreset:
        """Shows as much of an image as ImageNet's presets do."""
        return EvalPreset(resize_px=round(self.crop_px * 256 / 224), crop_px=self.crop_px)

    @property
    def paths(self) -> list[str]:
        """The images, in the order of their names."""
        return list_images(self.images)

    def backbone(self, place: int) -> BackboneConfig:
        """The network of that place, with random weights."""
        return BackboneConfig(arch=self.archs[place], weights="random", seed=place)

    def network(self, place: int) -> nn.Module:
        """The network of that place in evaluation mode."""
        return build_network(self.backbone(place))


class CommitteeRates(StrictModel):
    """One run of one way: images a second by the number of networks, and how many there were.

    Of ours, `others_share` is the share of all cores that driver and Ray took meanwhile, `network_share` that which
    was in networks.
    """

    num_images: int
    images_per_s: dict[int, float]
    others_share: dict[int, float | None] = Field(default_factory=dict)
    network_share: dict[int, float] = Field(default_factory=dict)


def num_cores() -> int:
    """How many threads a way may keep busy."""
    return os.cpu_count() or 1


def save_joint(job: EvaluateJob, probabilities_NK: np.ndarray) -> None:
    """Keep joint outputs for the comparison, in the order of the images' names."""
    names = [os.path.basename(path) for path in job.paths]
    np.savez(job.outputs, names=np.asarray(names), features_BD=np.log(probabilities_NK))
