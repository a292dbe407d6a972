"""A network up to a tap, with what makes logits of its features, as one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convoy.vision.stages import DepthAxis
from convoy.vision.tapping import TappedNetwork


class LogitsAndFeatures(NamedTuple):
    """Logits, and the features_BD of another tap of the same pass."""

    logits_BK: Tensor
    features_BD: Tensor


class LogitsNetwork(nn.Module):
    """Float32 logits_BK of normalised images_BCHW, in evaluation mode; with a `features_tap` its features too.

    Without a `readout` the features of the tap are the logits. `class_order` gives for each class that comes out
    the index among those of the readout.
    """

    def __init__(
        self,
        network: nn.Module,
        axis: DepthAxis,
        *,
        tap: str,
        readout: nn.Module | None,
        class_order: Sequence[int] | None = None,
        features_tap: str | None = None,
    ) -> None:
        super().__init__()
        taps = [tap] if features_tap is None else [tap, features_tap]
        self._tap, self._features_tap = tap, features_tap
        self._tapped = TappedNetwork(network.eval(), axis, list(dict.fromkeys(taps)))
        self._readout = nn.Identity() if readout is None else readout.eval()
        order = None if class_order is None else torch.tensor(class_order)
        self.register_buffer("_order", order, persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor | LogitsAndFeatures:
        """The logits; a head computes in float32 whatever precision the network computes in."""
        tapped = self._tapped(images_BCHW)
        logits_BK = self._read_out(tapped[self._tap])
        if self._features_tap is None:
            return logits_BK
        return LogitsAndFeatures(logits_BK, tapped[self._features_tap])

    def _read_out(self, features_BD: Tensor) -> Tensor:
        device = features_BD.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                logits_BK: Tensor = self._readout(features_BD)
        else:
            logits_BK = self._readout(features_BD)
        return logits_BK if self._order is None else logits_BK[:, self._order]  # type: ignore[index]
