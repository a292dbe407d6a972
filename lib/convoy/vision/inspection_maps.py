"""What a network is made of and what it makes of images: first-layer filters, and feature maps by depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convoy.core.errors import ConfigError
from convoy.vision.inspection import InspectedNetwork
from convoy.vision.stages import DepthAxis


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FirstFilters:
    """The filters of the first convolution of a network, by its module's name.

    `images_FCHW` are float weights scaled to -1..1 filter by filter, with three channels where the layer sees colour,
    else with one; `norms_F` are the filters' Euclidean norms: one near zero is dead.
    """

    module: str
    images_FCHW: Tensor
    norms_F: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageMaps:
    """The most active channels of a stage for an image: `maps_MHW` scaled to 0..1 map by map, the strongest first."""

    channels: tuple[int, ...]
    means: tuple[float, ...]
    maps_MHW: Tensor


def first_filters(network: nn.Module, axis: DepthAxis) -> FirstFilters:
    """The filters of the first convolution of the stem.

    Raises ConfigError where that layer sees neither colour nor grey values: its filters are no pictures.
    """
    found = next(
        (
            (f"{module}.{name}".rstrip("."), layer)
            for module in axis[0].module_names
            for name, layer in network.get_submodule(module).named_modules()
            if isinstance(layer, nn.Conv2d)
        ),
        None,
    )
    if found is None or found[1].weight.shape[1] not in {1, 3}:
        raise ConfigError(
            "the network does not begin with a convolution over colours: its filters are no pictures",
            where=axis[0].name,
            next_step="look at feature maps and channels of its stem instead",
        )
    module, layer = found
    weights_FCHW = layer.weight.detach().float().cpu()
    largest_F111 = (
        weights_FCHW.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    )
    return FirstFilters(
        module=module,
        images_FCHW=weights_FCHW / largest_F111,
        norms_F=tuple(weights_FCHW.flatten(1).norm(dim=1).tolist()),
    )


@torch.no_grad()
def feature_maps(
    network: InspectedNetwork, images_BCHW: Tensor, stages: Sequence[str], num_channels: int
) -> list[dict[str, StageMaps]]:
    """For each uint8 image, by stage, the channels whose maps have the largest mean."""
    pixels_BCHW = network.pixels(images_BCHW)
    by_stage = {stage: network.see_stage(pixels_BCHW, stage).float().cpu() for stage in stages}
    return [
        {stage: _strongest(maps_BCHW[place], num_channels) for stage, maps_BCHW in by_stage.items()}
        for place in range(len(images_BCHW))
    ]


def _strongest(maps_CHW: Tensor, num_channels: int) -> StageMaps:
    means_C = maps_CHW.mean(dim=(1, 2))
    channels_M = means_C.argsort(descending=True, stable=True)[:num_channels]
    chosen_MHW = maps_CHW[channels_M]
    low_M11, high_M11 = chosen_MHW.amin(dim=(1, 2), keepdim=True), chosen_MHW.amax(dim=(1, 2), keepdim=True)
    span_M11 = (high_M11 - low_M11).clamp_min(torch.finfo(torch.float32).tiny)
    return StageMaps(
        channels=tuple(channels_M.tolist()),
        means=tuple(means_C[channels_M].tolist()),
        maps_MHW=(chosen_MHW - low_M11) / span_M11,
    )
