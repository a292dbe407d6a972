"""A device that has no room for a batch gets smaller ones, and no image is left out; weights are cast once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from convoy.core.errors import ConfigError
from convoy.vision.engine_options import Precision
from convoy.vision.forward import FittingForward, NormalisedNetwork, autocast, casting_once, place
from convoy.vision.presets import EvalPreset
from convoy.vision.readout import LogitsAndFeatures

CPU = torch.device("cpu")


class SmallDevice(nn.Module):
    """Doubles images; has room for a few at once only, and counts what it was asked."""

    def __init__(self, room: int, form: str = "tensor") -> None:
        super().__init__()
        self.room, self.form = room, form
        self.asked: list[int] = []

    def forward(self, images_BCHW: Tensor) -> Any:
        self.asked.append(len(images_BCHW))
        if len(images_BCHW) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory, as the test makes it")
        doubled = 2 * images_BCHW
        if self.form == "dict":
            return {"pooled": doubled}
        return LogitsAndFeatures(doubled, -doubled) if self.form == "pair" else doubled


IMAGES = torch.arange(10.0).reshape(10, 1, 1, 1)


def test_a_batch_that_fits_is_run_whole() -> None:
    device = SmallDevice(room=10)
    assert torch.equal(FittingForward(device)(IMAGES), 2 * IMAGES)
    assert device.asked == [10]


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_the_size_is_remembered() -> None:
    device = SmallDevice(room=3)
    forward = FittingForward(device)
    assert torch.equal(forward(IMAGES), 2 * IMAGES)
    assert device.asked == [10, 5, 3, 3, 3, 1]
    device.asked.clear()
    assert torch.equal(forward(IMAGES), 2 * IMAGES)
    assert device.asked == [3, 3, 3, 1]


@pytest.mark.parametrize("form", ["dict", "pair"])
def test_parts_are_joined_in_the_form_of_the_output(form: str) -> None:
    whole, parts = (FittingForward(SmallDevice(room, form))(IMAGES) for room in (10, 4))
    assert type(whole) is type(parts)
    pairs = (
        zip(whole.values(), parts.values(), strict=True) if form == "dict" else zip(whole, parts, strict=True)
    )
    for one, other in pairs:
        assert torch.equal(one, other)


def test_a_single_image_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        FittingForward(SmallDevice(room=0))(IMAGES)


@pytest.mark.slow
@torch.no_grad()
def test_each_of_many_compiled_networks_has_its_own_weights_as_constants() -> None:
    preset, cpu = EvalPreset(resize_px=None, crop_px=8), torch.device("cpu")
    images_BCHW = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    for seed in range(10):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        network = place(NormalisedNetwork(layers, preset), cpu)
        expected = network(images_BCHW)
        forward = FittingForward.of(network, cpu, compiled=True)
        assert torch.allclose(forward(images_BCHW), expected, atol=1e-5)
        # Whatever is computed from the network itself is nothing from now on.
        for parameter in network.parameters():
            parameter.zero_()
        assert torch.allclose(forward(images_BCHW), expected, atol=1e-5)


@torch.no_grad()
def test_a_network_that_does_not_compile_is_an_error_with_a_next_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = place(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()), CPU)
    forward = FittingForward.of(network, CPU, compiled=True)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/bin/false",), "fx_graph_cache": False}),
        pytest.raises(ConfigError, match="the network cannot be compiled") as caught,
    ):
        forward(torch.rand(2, 3, 8, 8))
    assert caught.value.next_step is not None
    assert "extraction.compile=never" in caught.value.next_step


class Casts(TorchDispatchMode):
    """Counts what is cast to bfloat16 in the shape of a weight."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and output.dtype is torch.bfloat16:
            self.count += output.shape == self.shape
        return output


def run_twice(network: nn.Module, images_BCHW: Tensor) -> list[Tensor]:
    outputs = []
    for _ in range(2):
        with autocast(CPU, Precision.BF16), torch.no_grad():
            outputs.append(network(images_BCHW))
    return outputs


def test_within_one_context_weights_are_cast_once_for_all_passes() -> None:
    network, images_BCHW = nn.Conv2d(3, 4, 5), torch.rand(2, 3, 9, 9)
    with Casts(network.weight.shape) as casts:
        plain = run_twice(network, images_BCHW)
        assert casts.count == 2
        with casting_once(CPU):
            held = run_twice(network, images_BCHW)
        assert casts.count == 3
        run_twice(network, images_BCHW)
        assert casts.count == 5
    assert all(torch.equal(one, other) for one, other in zip(plain, held, strict=True))
    assert held[0].dtype is torch.bfloat16


def test_the_context_itself_casts_nothing() -> None:
    with casting_once(CPU):
        assert nn.Conv2d(3, 4, 5)(torch.rand(2, 3, 9, 9)).dtype is torch.float32
