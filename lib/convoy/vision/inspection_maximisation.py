"""Activation maximisation: images that a class or a channel likes best (Erhan et al. 2009).

Plain gradient ascent finds patterns of high frequency that look like noise. Three things keep to what natural images
have: the image is the inverse Fourier transform of coefficients that are scaled down with frequency, in colours that
are decorrelated as those of ImageNet (preconditioning: Olah, Mordvintsev and Schubert, "Feature Visualization",
Distill 2017); it is shifted at random before each step (jitter: the same, and Mordvintsev et al. 2015); and its total
variation costs (Mahendran and Vedaldi, IJCV 2016, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convoy.core.randomness import generator
from convoy.vision.inspection import InspectedNetwork
from convoy.vision.inspection_options import MaximisationOptions, Unit

# Standard deviation of the coefficients that the ascent starts from: a nearly grey image.
_START_DEVIATION = 0.01
# What their library lucid divides by, so that its learning rates fit.
_CONTRAST = 4.0
# The square root of the covariance of ImageNet's colours, over its largest singular value: columns are luminance, then
# blue against yellow, then green against purple (Olah et al. 2017, from their library lucid).
_COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaximisedImages:
    """An image for each unit: uint8 of shape (N, 3, H, W), and the unit's activation at the start and for the image."""

    images_BCHW: Tensor
    start_B: tuple[float, ...]
    end_B: tuple[float, ...]


def maximise(
    network: InspectedNetwork, units: Sequence[Unit], options: MaximisationOptions
) -> MaximisedImages:
    """Images of the network's own size that maximise the logit of a class, or the mean of a channel's map.

    All units are of one stage. An image depends on the seed and its unit, not on the units beside it, but for the last
    bits: on another kind of device these may grow into another image.
    """
    side_px = network.preset.crop_px
    spectrum = _Spectrum(side_px, network.device, options.frequency_decay)
    coefficients = torch.from_numpy(
        np.stack([_first_coefficients(spectrum.shape, options.seed, unit) for unit in units])
    ).to(network.device)
    coefficients.requires_grad_(True)
    optimiser = torch.optim.Adam([coefficients], lr=options.learning_rate)
    start_B = _activations(network, _as_stored(spectrum.images(coefficients)), units)
    shifts_S2 = _shifts(options, side_px)
    with torch.enable_grad():
        for shift in shifts_S2:
            images_BCHW = spectrum.images(coefficients)
            loss = _loss(network, images_BCHW, units, shift, options.total_variation)
            (coefficients.grad,) = torch.autograd.grad(loss, [coefficients])
            optimiser.step()
    images_BCHW = _as_stored(spectrum.images(coefficients))
    return MaximisedImages(
        images_BCHW=(images_BCHW * 255).round().to(torch.uint8).cpu(),
        start_B=tuple(start_B.tolist()),
        end_B=tuple(_activations(network, images_BCHW, units).tolist()),
    )


class _Spectrum:
    """Images as the inverse Fourier transform of scaled coefficients (Olah et al. 2017)."""

    def __init__(self, side_px: int, device: torch.device, decay: float) -> None:
        self._side_px = side_px
        frequencies_HF = np.hypot(np.fft.fftfreq(side_px)[:, None], np.fft.rfftfreq(side_px)[None, :])
        scale_HF = np.maximum(frequencies_HF, 1 / side_px) ** -decay * side_px
        self._scale_HF1 = torch.from_numpy(scale_HF[..., None].astype(np.float32)).to(device)
        colours_CC = torch.tensor(_COLOURS, device=device)
        self._colours_CC = colours_CC / torch.linalg.matrix_norm(colours_CC, ord=2)
        self.shape = (3, *scale_HF.shape, 2)

    def images(self, coefficients: Tensor) -> Tensor:
        """Images in 0..1."""
        scaled = torch.view_as_complex((coefficients * self._scale_HF1).contiguous())
        planes_BCHW = torch.fft.irfft2(scaled, s=(self._side_px, self._side_px)) / _CONTRAST
        colours_BCHW = torch.einsum("bkhw,ck->bchw", planes_BCHW, self._colours_CC)
        return torch.sigmoid(colours_BCHW)


def _first_coefficients(shape: Sequence[int], seed: int, unit: Unit) -> np.ndarray:
    random = generator(seed, "maximise", unit.stage or "", unit.index)
    return (_START_DEVIATION * random.standard_normal(tuple(shape))).astype(np.float32)


def _shifts(options: MaximisationOptions, side_px: int) -> np.ndarray:
    """The shift of each step, down and to the right, in pixels."""
    most_px = round(options.jitter * side_px)
    return generator(options.seed, "jitter").integers(-most_px, most_px + 1, (options.steps, 2))


def _loss(
    network: InspectedNetwork, images_BCHW: Tensor, units: Sequence[Unit], shift: np.ndarray, weight: float
) -> Tensor:
    down_px, right_px = shift.tolist()
    shifted_BCHW = torch.roll(images_BCHW, (down_px, right_px), dims=(2, 3))
    values_B = _measure(network, shifted_BCHW, units)
    rough_B = (images_BCHW.diff(dim=2).abs().mean(dim=(1, 2, 3))) + images_BCHW.diff(dim=3).abs().mean(
        dim=(1, 2, 3)
    )
    # In units of what the activation is now, so that one weight serves logits and channels of any scale.
    scale_B = values_B.detach().abs().clamp_min(1e-3)
    return (-values_B / scale_B + weight * rough_B).sum()


@torch.no_grad()
def _activations(network: InspectedNetwork, images_BCHW: Tensor, units: Sequence[Unit]) -> Tensor:
    return _measure(network, images_BCHW, units).cpu()


def _measure(network: InspectedNetwork, images_BCHW: Tensor, units: Sequence[Unit]) -> Tensor:
    """Each image's activation of its unit."""
    stage = units[0].stage
    if stage is None:
        values_BD, _ = network.see(images_BCHW, [])
    else:
        activation = network.see_stage(images_BCHW, stage)
        values_BD = activation.mean(dim=(2, 3)) if activation.ndim == 4 else activation
    return values_BD[torch.arange(len(units)), [unit.index for unit in units]]


@torch.no_grad()
def _as_stored(images_BCHW: Tensor) -> Tensor:
    """Images whose values can be stored as bytes, so that what is measured is what is shown."""
    return (images_BCHW.detach() * 255).round() / 255
