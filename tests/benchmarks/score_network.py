"""The network that all ways of `convoy bench score` run, and how it sees an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from convoy.core.config import StrictModel
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.presets import EvalPreset


class ScoredNetwork(StrictModel):
    """A network with random weights of seed 0, for the central crop of an image whose short side is `resize_px`."""

    arch: str
    resize_px: PositiveInt
    crop_px: PositiveInt

    @property
    def backbone(self) -> BackboneConfig:
        """The network as jobs are told it."""
        preset = EvalPreset(resize_px=self.resize_px, crop_px=self.crop_px)
        return BackboneConfig(arch=self.arch, weights="random", preset=preset)

    @property
    def scored_model(self) -> dict[str, Any]:
        """The network as the `model` of a scoring's config, with a name for each of its outputs."""
        with torch.inference_mode():
            outputs_BK: Tensor = self.build()(torch.zeros(1, 3, self.crop_px, self.crop_px))
        classes = [f"class_{index}" for index in range(outputs_BK.shape[1])]
        return {"backbone": self.backbone.model_dump(mode="json"), "classes": classes}

    def build(self) -> nn.Module:
        """The network in evaluation mode: float32 images_BCHW in, log-probabilities_BK out, as jobs keep them."""
        return nn.Sequential(build_network(self.backbone), nn.LogSoftmax(dim=1))

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """torchvision's own transform for classification, at these sizes."""
        weights = ResNet18_Weights.IMAGENET1K_V1
        transform: Callable[[Image.Image], Tensor] = weights.transforms(
            crop_size=self.crop_px, resize_size=self.resize_px
        )
        return transform


RESNET_18 = ScoredNetwork(arch="torchvision:resnet18", resize_px=256, crop_px=224)
