"""Grad-CAM: where in an image a stage found what speaks for a class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor

from convoy.core.errors import ConfigError
from convoy.vision.inspection import InspectedNetwork
from convoy.vision.stages import StageKind


def grad_cam(
    network: InspectedNetwork, images_BCHW: Tensor, classes_B: Sequence[int], stages: Sequence[str]
) -> dict[str, Tensor]:
    """By stage the heat_BHW in 0..1 of uint8 images, at their size: Selvaraju et al., ICCV 2017, equations 1 and 2.

    The gradient of a class's logit, averaged over the pixels of a map, is the weight of its channel; what remains of
    the weighted sum above zero is the heat, and its largest value in an image is 1. All zero where nothing in the image
    speaks for the class. The gradient goes through the head of a probe too. Raises ConfigError for a stage without
    maps, and for one that the logits do not depend on because it lies behind the tap.
    """
    for name in stages:
        _check_stage(network, name)
    pixels_BCHW = network.pixels(images_BCHW).requires_grad_(True)
    with torch.enable_grad():
        logits_BK, maps = network.see(pixels_BCHW, stages)
        scores_B = logits_BK[
            torch.arange(len(logits_BK)), torch.tensor(list(classes_B), device=network.device)
        ]
        # Each image's score depends on its own maps only, so the gradient of the sum is that of each.
        gradients = torch.autograd.grad(scores_B.sum(), [maps[name] for name in stages])
    size_HW = images_BCHW.shape[-2:]
    return {
        name: _heat(maps[name].detach(), gradient_BCHW, size_HW)
        for name, gradient_BCHW in zip(stages, gradients, strict=True)
    }


def cam_obstacle(network: InspectedNetwork, stage: str) -> str | None:
    """Why there is no Grad-CAM at a stage, or None where there is."""
    found = network.stages[stage]
    if found.kind is not StageKind.SPATIAL:
        return f"stage {stage} gives a vector an image, and no maps"
    if found.index > network.tap.index:
        return f"stage {stage} lies behind the tap {network.tap.name}: the logits do not depend on it"
    return None


def _check_stage(network: InspectedNetwork, name: str) -> None:
    obstacle = cam_obstacle(network, name)
    if obstacle is not None:
        raise ConfigError(f"no Grad-CAM: {obstacle}", where="stages", next_step="name a stage before it")


def _heat(maps_BCHW: Tensor, gradient_BCHW: Tensor, size_HW: Sequence[int]) -> Tensor:
    weights_BC11 = gradient_BCHW.mean(dim=(2, 3), keepdim=True)
    heat_B1HW = F.relu((weights_BC11 * maps_BCHW).sum(dim=1, keepdim=True))
    largest_B111 = heat_B1HW.amax(dim=(2, 3), keepdim=True)
    heat_B1HW = heat_B1HW / largest_B111.clamp_min(torch.finfo(torch.float32).tiny)
    return F.interpolate(heat_B1HW, size=tuple(size_HW), mode="bilinear", align_corners=False)[:, 0].cpu()
