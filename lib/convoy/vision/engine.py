"""The forward engine: uint8 batches in, pooled activations out, at the device's best settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convoy.vision.engine_options import EngineOptions, Precision
from convoy.vision.presets import EvalPreset
from convoy.vision.stages import DepthAxis
from convoy.vision.tapping import TappedNetwork
from convoy.vision.views import normalise


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
        torch.set_num_threads(options.num_threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.options = options
        self.preset = preset
        network = network.eval().to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._eager = _NormalisedNetwork(TappedNetwork(network, axis, taps), preset)
        self._forward: nn.Module = self._eager
        if options.compiled:
            # Freezing folds batch norms and constants into the convolutions.
            freezing: dict[str, Any] = {"freezing": True} if self.device.type == "cpu" else {}
            self._forward = torch.compile(self._eager, dynamic=False, options=freezing)  # type: ignore[assignment]

    def new_batch(self) -> Tensor:
        """A reusable uint8 buffer images_BCHW in channels_last, pinned where the device is a GPU."""
        shape = (self.options.batch_size, 3, self.preset.crop_px, self.preset.crop_px)
        buffer = torch.zeros(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        return buffer.pin_memory() if self.device.type == "cuda" else buffer

    def warm_up(self) -> dict[str, Tensor]:
        """Run once on zeros, so that compilation and allocation happen before the first image."""
        return self.run(self.new_batch())

    @torch.no_grad()
    def run(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The float32 features_BD of every tap, on the engine's device, for a uint8 batch."""
        images = images_BCHW.to(self.device, non_blocking=True)
        with self._autocast(self.options.precision):
            features: dict[str, Tensor] = self._forward(images)
        return features

    @torch.no_grad()
    def precision_effect(
        self, images_BCHW: Tensor, features: Mapping[str, Tensor], num_images: int
    ) -> dict[str, float]:
        """By tap, the lowest cosine similarity between the features that `run` gave and those in float32."""
        with self._autocast(Precision.FP32):
            exact: dict[str, Tensor] = self._eager(images_BCHW.to(self.device))
        return {
            tap: float(nn.functional.cosine_similarity(features[tap], exact[tap])[:num_images].min())
            for tap in exact
        }

    def _autocast(self, precision: Precision) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision is Precision.BF16)


class _NormalisedNetwork(nn.Module):
    """Normalisation and network as one graph, so that a compiler fuses them."""

    def __init__(self, tapped: TappedNetwork, preset: EvalPreset) -> None:
        super().__init__()
        self._tapped = tapped
        self._preset = preset

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = self._tapped(normalise(images_BCHW, self._preset))
        return features
