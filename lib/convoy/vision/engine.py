"""The forward engine: uint8 batches in, pooled activations out, at the device's best settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from convoy.vision.engine_options import EngineOptions, Precision
from convoy.vision.forward import FittingForward, NormalisedNetwork, autocast, new_images, open_device, place
from convoy.vision.presets import EvalPreset
from convoy.vision.stages import DepthAxis
from convoy.vision.tapping import TappedNetwork


class FeatureEngine:
    """A network with its taps on one device, in evaluation mode and channels_last."""

    def __init__(
        self,
        network: nn.Module,
        axis: DepthAxis,
        preset: EvalPreset,
        *,
        taps: Sequence[str],
        options: EngineOptions,
    ) -> None:
        self.device = open_device(options.num_threads)
        self.options = options
        self.preset = preset
        placed = place(NormalisedNetwork(TappedNetwork(network, axis, taps), preset), self.device)
        self._eager = FittingForward(placed)
        self._forward = FittingForward.of(placed, self.device, compiled=options.compiled)

    def new_batch(self) -> Tensor:
        """A reusable uint8 buffer images_BCHW in channels_last, pinned where the device is a GPU."""
        return new_images((self.options.batch_size, 3, self.preset.crop_px, self.preset.crop_px), self.device)

    def warm_up(self) -> dict[str, Tensor]:
        """Run once on zeros, so that compilation and allocation happen before the first image."""
        return self.run(self.new_batch())

    @torch.no_grad()
    def run(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The float32 features_BD of every tap, on the engine's device, for a uint8 batch."""
        images = images_BCHW.to(self.device, non_blocking=True)
        with autocast(self.device, self.options.precision):
            features: dict[str, Tensor] = self._forward(images)
        return features

    @torch.no_grad()
    def precision_effect(
        self, images_BCHW: Tensor, features: Mapping[str, Tensor], num_images: int
    ) -> dict[str, float]:
        """By tap, the lowest cosine similarity between the features that `run` gave and those in float32."""
        with autocast(self.device, Precision.FP32):
            exact: dict[str, Tensor] = self._eager(images_BCHW.to(self.device))
        similarities = {
            tap: nn.functional.cosine_similarity(features[tap], exact[tap])[:num_images] for tap in exact
        }
        # Features that are no finite numbers say nothing of precision.
        return {tap: float(values.nan_to_num(nan=1.0).min()) for tap, values in similarities.items()}
