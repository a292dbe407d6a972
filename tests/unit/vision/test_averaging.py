from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from convoy.vision.averaging import (
    WeightKeeper,
    build_keeper,
    first_kept_phase,
    measure_batchnorm,
    swapped_in,
)
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.presets import EvalPreset
from convoy.vision.training_config import Phase, Recipe, WeightAveraging
from convoy.vision.training_state import PackedTraining, pack_training
from convoy.vision.views import normalise

SCORES = [0.5, 0.9, 0.7, 0.9, 0.2, 0.8]


def small_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    network[1].running_mean.normal_()
    network[1].num_batches_tracked.fill_(seed)
    return network


def state(seed: int) -> dict[str, Tensor]:
    return dict(small_network(seed).state_dict())


def keeper(averaging: WeightAveraging, **settings: float) -> WeightKeeper:
    return build_keeper(Recipe.model_validate({"averaging": averaging, **settings}))


def close(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> bool:
    assert found is not None
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[name], tensor, rtol=1e-6, atol=1e-7) for name, tensor in expected.items())


def mean_of(*seeds: int) -> dict[str, Tensor]:
    """The mean of states in double precision; counters are those of the last one."""
    states = [state(seed) for seed in seeds]
    return {
        name: torch.stack([one[name].double() for one in states]).mean(0).float()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[-1].items()
    }


def go_through(kept: WeightKeeper, network: nn.Module, seeds: range, num_epochs: int) -> None:
    """Two steps and then the end of an epoch for each seed."""
    for epoch in seeds:
        network.load_state_dict(state(100 + epoch))
        kept.after_step(network)
        network.load_state_dict(state(epoch))
        kept.after_step(network)
        kept.after_epoch(network, score=SCORES[epoch], epochs_left=num_epochs - 1 - epoch)


def test_ema_is_that_of_torch_with_a_rising_decay() -> None:
    network = small_network(0)
    kept = keeper(WeightAveraging.EMA, ema_decay=0.4)

    def move(average: Tensor, new: Tensor, num_averaged: Tensor | int) -> Tensor:
        # The first state counts as the first update; the decay of update n is (1 + n) / (10 + n).
        number = int(num_averaged) + 1
        decay = min(0.4, (1 + number) / (10 + number))
        return decay * average + (1 - decay) * new

    theirs = AveragedModel(network, avg_fn=move, use_buffers=True)
    for seed in range(12):
        network.load_state_dict(state(seed))
        kept.after_step(network)
        theirs.update_parameters(network)
    found = kept.kept()
    expected = dict(theirs.module.state_dict())
    assert found is not None
    counter = "1.num_batches_tracked"
    assert int(found.pop(counter)) == 11
    del expected[counter]
    assert close(found, expected)


def test_swa_is_the_mean_of_the_last_epochs() -> None:
    kept = keeper(WeightAveraging.SWA, average_epochs=3)
    network = small_network(0)
    for epoch in range(6):
        assert (kept.kept() is None) == (epoch < 4)
        go_through(kept, network, range(epoch, epoch + 1), 6)
    assert close(kept.kept(), mean_of(3, 4, 5))


def test_best_is_the_first_epoch_with_the_highest_score() -> None:
    kept = keeper(WeightAveraging.BEST)
    go_through(kept, small_network(0), range(6), 6)
    assert close(kept.kept(), state(1))
    assert kept.scores == [0.9]


def test_soup_is_the_mean_of_the_best_epochs_and_of_equal_ones_the_earlier_rank_first() -> None:
    kept = keeper(WeightAveraging.SOUP, average_epochs=3)
    go_through(kept, small_network(0), range(6), 6)
    assert kept.scores == [0.9, 0.9, 0.8]
    assert close(kept.kept(), mean_of(1, 3, 5))
    two = keeper(WeightAveraging.SOUP, average_epochs=2)
    for epoch in range(4):
        two.after_epoch(small_network(epoch), score=0.5, epochs_left=0)
    assert close(two.kept(), mean_of(0, 1))


def test_last_keeps_nothing() -> None:
    kept = keeper(WeightAveraging.LAST)
    go_through(kept, small_network(0), range(3), 3)
    assert kept.kept() is None
    assert kept.tensors() == {}


@pytest.mark.parametrize(
    ("resolutions_px", "first"),
    [
        ([None], 0),
        ([None, 32], 0),
        ([24, None], 1),
        ([24, 32, None], 1),
        # At 32 pixels again, but what was measured there was followed by something else.
        ([None, 24, 32], 2),
    ],
)
def test_epochs_are_kept_from_the_last_change_of_the_resolution_on(
    resolutions_px: list[int | None], first: int
) -> None:
    phases = [Phase(name="one", epochs=1, learning_rate=0.1, resolution_px=px) for px in resolutions_px]
    preset = EvalPreset(resize_px=36, crop_px=32)
    assert first_kept_phase(WeightAveraging.BEST, phases, preset) == first
    # What averages takes no weights of a phase before.
    assert first_kept_phase(WeightAveraging.SWA, phases, preset) == len(phases) - 1
    assert first_kept_phase(WeightAveraging.SOUP, phases, preset) == len(phases) - 1


@pytest.mark.parametrize("averaging", WeightAveraging)
@pytest.mark.parametrize("saved_after", [0, 1, 3, 5])
def test_a_saved_keeper_goes_on_as_if_it_had_not_been_saved(
    averaging: WeightAveraging, saved_after: int
) -> None:
    settings = {"average_epochs": 3, "ema_decay": 0.9}
    network = small_network(0)
    whole, first = keeper(averaging, **settings), keeper(averaging, **settings)
    go_through(whole, network, range(6), 6)
    go_through(first, network, range(saved_after), 6)
    scores = list(first.scores)
    data = pack_training(network, torch.optim.SGD(network.parameters(), lr=0.1), first)
    # What comes after must not change what was saved.
    go_through(first, network, range(saved_after, 6), 6)
    second = keeper(averaging, **settings)
    PackedTraining(data).load_keeper(second, scores, torch.device("cpu"))
    go_through(second, network, range(saved_after, 6), 6)
    assert second.scores == whole.scores
    found, expected = second.kept(), whole.kept()
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_swapped_in_weights_are_out_again_even_after_an_error() -> None:
    network = small_network(0)

    def fail_inside() -> None:
        with swapped_in(network, state(1)):
            assert close(dict(network.state_dict()), state(1))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all(torch.equal(network.state_dict()[name], one) for name, one in state(0).items())
    with swapped_in(network, None):
        assert all(torch.equal(network.state_dict()[name], one) for name, one in state(0).items())


PRESET = EvalPreset(resize_px=None, crop_px=32)
RESNET = BackboneConfig(arch="cifar_resnet20", weights="random")


def batches_of_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator) for size in (4, 6, 2)
    ]


def test_measured_batchnorm_is_that_of_torch() -> None:
    network = build_network(RESNET)
    theirs = copy.deepcopy(network)
    momenta = [one.momentum for one in network.modules() if isinstance(one, nn.BatchNorm2d)]
    measure_batchnorm(network, depth_axis(RESNET, network), 0, batches_of_images(), PRESET)
    update_bn([normalise(images_BCHW, PRESET) for images_BCHW in batches_of_images()], theirs)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert [one.momentum for one in network.modules() if isinstance(one, nn.BatchNorm2d)] == momenta
    assert not any(module.training for module in network.modules())


def test_frozen_batchnorm_is_not_measured() -> None:
    network = build_network(RESNET)
    axis = depth_axis(RESNET, network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    measure_batchnorm(network, axis, 6, batches_of_images(), PRESET)
    frozen = tuple(f"{name}." for stage in axis.stages[:6] for name in stage.module_names)
    moved = {
        name
        for name, tensor in network.state_dict().items()
        if "running" in name and not torch.equal(tensor, before[name])
    }
    assert moved == {name for name in before if "running" in name and not name.startswith(frozen)}


def test_measured_statistics_do_not_depend_on_dropout() -> None:
    config = BackboneConfig(arch="torchvision:densenet121", weights="random", num_classes=4)
    images = [images_BCHW[:2] for images_BCHW in batches_of_images()]
    found = []
    for seed in range(2):
        network = build_network(config)
        for layer in network.modules():
            if hasattr(layer, "drop_rate"):
                layer.drop_rate = 0.5
        torch.manual_seed(seed)
        measure_batchnorm(network, depth_axis(config, network), 0, images, PRESET)
        found.append(network.state_dict())
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
