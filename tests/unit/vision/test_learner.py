from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from convoy.core.epochs import even_share
from convoy.core.randomness import position_digest
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.freezing import freeze
from convoy.vision.learner import (
    Learner,
    TrainBatch,
    validation_sums,
    with_group_batchnorm,
)
from convoy.vision.presets import EvalPreset
from convoy.vision.training_config import Optimiser, Phase, Recipe, TrainingPrecision
from convoy.vision.views import normalise

PRESET = EvalPreset(resize_px=None, crop_px=32)
PLAIN = Recipe(optimiser=Optimiser(momentum=0.0, weight_decay=0.0), precision=TrainingPrecision.FP32)
# A part of the machine's rounding, summed in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}

Gradients = dict[str, Tensor]


def build(arch: str = "lenet5", *, num_classes: int = 5, depth: int = 0) -> nn.Module:
    config = BackboneConfig(arch=arch, weights="random", num_classes=num_classes)
    network = build_network(config)
    freeze(network, depth_axis(config, network), depth)
    return network


def learner(
    network: nn.Module,
    recipe: Recipe = PLAIN,
    *,
    arch: str = "lenet5",
    depth: int = 0,
    class_weights_K: Tensor | None = None,
    num_workers: int = 1,
    dropout: float = 0.0,
) -> Learner:
    made = Learner(
        network,
        depth_axis(BackboneConfig(arch=arch, weights="random", num_classes=5), network),
        model=nn.Sequential(nn.Dropout(dropout), network) if dropout else network,
        preset=PRESET,
        phase=Phase(name="train", epochs=1, freeze_depth=depth, learning_rate=0.01),
        recipe=recipe,
        class_weights_K=class_weights_K,
        num_workers=num_workers,
    )
    made.begin_epoch()
    return made


def whole_batch(num_rows: int = 7) -> TrainBatch:
    generator = torch.Generator().manual_seed(0)
    return TrainBatch(
        images_BCHW=torch.randint(0, 256, (num_rows, 3, 32, 32), dtype=torch.uint8, generator=generator),
        labels_B=torch.randint(0, 5, (num_rows,), generator=generator),
        weights_B=torch.rand(num_rows, generator=generator) + 0.5,
    )


def rows_of(batch: TrainBatch, rows: range) -> TrainBatch:
    part = slice(rows.start, rows.stop)
    return TrainBatch(
        images_BCHW=batch.images_BCHW[part], labels_B=batch.labels_B[part], weights_B=batch.weights_B[part]
    )


def parts(batch: TrainBatch, num_parts: int) -> list[TrainBatch]:
    num_rows = len(batch.labels_B)
    return [rows_of(batch, even_share(num_rows, num_parts, part)) for part in range(num_parts)]


def step_gradients(
    made: Learner,
    network: nn.Module,
    batches: Sequence[TrainBatch],
    *,
    num_group_rows: int | Tensor = 7,
    step: int = 0,
    rank: int = 0,
) -> Gradients:
    """The gradients from which a real step makes its update."""
    found: Gradients = {}

    def look(*_: object) -> None:
        found.update(
            {name: one.grad.clone() for name, one in network.named_parameters() if one.grad is not None}
        )

    handle = made.optimiser.register_step_pre_hook(look)
    made.step(batches, num_group_rows=num_group_rows, factor=1.0, step=step, rank=rank)
    handle.remove()
    return found


def same(first: Gradients, second: Gradients) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], **TOLERANCE) for name in first
    )


@pytest.mark.parametrize("num_passes", [1, 2, 3])
def test_a_step_has_the_gradients_of_a_plain_loop(num_passes: int) -> None:
    class_weights_K = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.25])
    network, batch = build(), whole_batch()
    expected_network = copy.deepcopy(network)
    losses_B = class_weights_K[batch.labels_B] * cross_entropy(
        expected_network(normalise(batch.images_BCHW, PRESET)),
        batch.labels_B,
        label_smoothing=0.1,
        reduction="none",
    )
    (losses_B * batch.weights_B).mean().backward()
    expected = {name: one.grad for name, one in expected_network.named_parameters() if one.grad is not None}

    recipe = PLAIN.model_copy(update={"label_smoothing": 0.1, "accumulate": num_passes})
    made = learner(network, recipe, class_weights_K=class_weights_K)
    assert same(step_gradients(made, network, parts(batch, num_passes)), expected)
    loss_sum, num_correct, num_rows = made.sums_3.tolist()
    assert loss_sum == pytest.approx(float((losses_B.detach() * batch.weights_B).sum()), rel=1e-5)
    logits_BK = expected_network(normalise(batch.images_BCHW, PRESET))
    assert num_correct == int((logits_BK.argmax(1) == batch.labels_B).sum())
    assert num_rows == 7


@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 0.2}])
def test_smoothing_does_not_teach_a_common_class_to_be_the_rare_one(mixing: dict[str, float]) -> None:
    """99 dark images and a bright one, with the weights that balance them."""
    labels_B = torch.tensor([0] * 99 + [1])
    images_BCHW = torch.where(labels_B == 1, 255, 0).to(torch.uint8)[:, None, None, None]
    images_BCHW = images_BCHW.expand(-1, 3, 32, 32).contiguous()
    batch = TrainBatch(images_BCHW=images_BCHW, labels_B=labels_B, weights_B=torch.ones(100))
    class_weights_K = torch.tensor([100 / 198, 100 / 2, 1.0, 1.0, 1.0])
    torch.manual_seed(0)
    network = build()
    recipe = PLAIN.model_copy(update={"label_smoothing": 0.1, **mixing})
    made = learner(network, recipe, class_weights_K=class_weights_K)
    for step in range(60):
        made.step([batch], num_group_rows=100, factor=1.0, step=step)
    with torch.no_grad():
        predicted_B = network(normalise(images_BCHW, PRESET)).argmax(1)
    assert torch.equal(predicted_B, labels_B)


def test_without_class_weights_smoothing_is_torchs_own() -> None:
    network, batch = build(), whole_batch()
    losses_B = cross_entropy(
        network(normalise(batch.images_BCHW, PRESET)), batch.labels_B, label_smoothing=0.1, reduction="none"
    )
    expected = torch.autograd.grad((losses_B * batch.weights_B).sum() * (1 / 7), list(network.parameters()))
    found = step_gradients(
        learner(network, PLAIN.model_copy(update={"label_smoothing": 0.1})), network, [batch]
    )
    assert all(torch.equal(one, other) for one, other in zip(found.values(), expected, strict=True))


def test_a_step_moves_the_weights_by_the_rate_and_leaves_no_gradient() -> None:
    network = build()
    before = {name: one.detach().clone() for name, one in network.named_parameters()}
    made = learner(network)
    found = step_gradients(made, network, [whole_batch()])
    for name, one in network.named_parameters():
        assert torch.allclose(one, before[name] - 0.01 * found[name], atol=1e-7)
        assert one.grad is None


@pytest.mark.parametrize("num_passes", [1, 2])
def test_averaged_gradients_of_two_workers_are_those_of_one(num_passes: int) -> None:
    network, batch = build(), whole_batch()
    recipe = PLAIN.model_copy(update={"label_smoothing": 0.1, "accumulate": num_passes})
    alone = copy.deepcopy(network)
    expected = step_gradients(learner(alone, recipe), alone, [batch])
    of_workers = []
    for share in parts(batch, 2):
        copied = copy.deepcopy(network)
        made = learner(copied, recipe, num_workers=2)
        of_workers.append(step_gradients(made, copied, parts(share, num_passes)))
    averaged = {name: (of_workers[0][name] + of_workers[1][name]) / 2 for name in expected}
    assert same(averaged, expected)


def test_a_worker_that_lacks_images_does_not_weaken_the_update_of_the_group() -> None:
    network, batch = build(), whole_batch()
    usable = rows_of(batch, range(5))
    alone = copy.deepcopy(network)
    expected = step_gradients(learner(alone), alone, [usable], num_group_rows=5)
    of_workers = []
    for share in (range(4), range(4, 5)):
        copied = copy.deepcopy(network)
        made = learner(copied, num_workers=2)
        passes = [rows_of(batch, share)]
        of_workers.append(step_gradients(made, copied, passes, num_group_rows=torch.tensor(5.0)))
    averaged = {name: (of_workers[0][name] + of_workers[1][name]) / 2 for name in expected}
    assert same(averaged, expected)


@pytest.mark.parametrize(
    "mixing", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.8, "cutmix_alpha": 1}]
)
def test_mixing_repeats_with_the_step_and_differs_with_another(mixing: dict[str, float]) -> None:
    recipe = Recipe.model_validate({**PLAIN.model_dump(), **mixing})
    found = []
    for step in (3, 3, 4):
        network = build()
        torch.manual_seed(len(found))
        found.append(step_gradients(learner(network, recipe), network, [whole_batch()], step=step))
    unmixed = build()
    found.append(step_gradients(learner(unmixed), unmixed, [whole_batch()], step=3))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not same(found[0], found[2])
    assert not same(found[0], found[3])


def group_gradients(rank: int, *, dropout: float, **recipe: float) -> Gradients:
    """Those of a worker of a group, all of which have the same images in two passes."""
    network = build()
    changed = PLAIN.model_copy(update={"accumulate": 2, **recipe})
    made = learner(network, changed, num_workers=2, dropout=dropout)
    return step_gradients(made, network, parts(whole_batch(8), 2), num_group_rows=16, step=3, rank=rank)


def test_each_worker_draws_dropout_of_its_own_and_the_first_that_of_a_single_one() -> None:
    first, again, second, third = (group_gradients(rank, dropout=0.5) for rank in (0, 0, 1, 2))
    assert same(first, again)
    assert not same(first, second)
    assert not same(second, third)
    network = build()
    made = learner(network, dropout=0.5)
    torch.manual_seed(0)
    alone = step_gradients(made, network, [whole_batch()], step=3)
    torch.manual_seed(int.from_bytes(position_digest(0, "step", 3)[:8], "big") >> 1)
    copied = build()
    images_BCHW = nn.Dropout(0.5)(normalise(whole_batch().images_BCHW, PRESET))
    losses_B = cross_entropy(copied(images_BCHW), whole_batch().labels_B, reduction="none")
    ((losses_B * whole_batch().weights_B).sum() * (1 / 7)).backward()
    assert all(torch.equal(alone[name], one.grad) for name, one in copied.named_parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_all_workers_mix_alike(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    blend = v2.MixUp.make_params

    def watched(mixer: v2.MixUp, inputs: list[Any]) -> dict[str, Any]:
        params = blend(mixer, inputs)
        shares.append(params["lam"])
        return params

    monkeypatch.setattr(v2.MixUp, "make_params", watched)
    for rank in (0, 1):
        group_gradients(rank, dropout=dropout, mixup_alpha=0.8)
    assert shares[:2] == shares[2:]
    assert shares[0] != shares[1]


@pytest.mark.parametrize("mixing", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}])
def test_the_label_of_an_image_that_counts_nothing_teaches_nothing_through_the_one_it_is_mixed_with(
    mixing: dict[str, float],
) -> None:
    recipe = PLAIN.model_copy(update={**mixing, "label_smoothing": 0.1})
    batch = whole_batch(2)
    weights_B, found = torch.tensor([1.0, 0.0]), []
    for label in (0, 1, 2):
        network = build()
        labels_B = torch.tensor([int(batch.labels_B[0]), label])
        changed = replace(batch, labels_B=labels_B, weights_B=weights_B)
        found.append(step_gradients(learner(network, recipe), network, [changed]))
    assert any(gradient.any() for gradient in found[0].values())
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


def test_a_mixed_image_counts_as_much_as_its_parts_do() -> None:
    recipe = PLAIN.model_copy(update={"mixup_alpha": 0.8})
    ones, threes = (build() for _ in range(2))
    batch = whole_batch()
    heavy = replace(batch, weights_B=batch.weights_B * 3)
    once = step_gradients(learner(ones, recipe), ones, [batch])
    found = step_gradients(learner(threes, recipe), threes, [heavy])
    assert same({name: 3 * one for name, one in once.items()}, found)


def test_a_single_image_is_not_mixed() -> None:
    batch = whole_batch(1)
    mixed, plain = build(), build()
    recipe = PLAIN.model_copy(update={"mixup_alpha": 0.8})
    found = step_gradients(learner(mixed, recipe), mixed, [batch])
    assert same(found, step_gradients(learner(plain), plain, [batch]))


def test_gradients_are_clipped_to_the_norm_and_smaller_ones_are_not() -> None:
    networks = [build() for _ in range(3)]
    recipes = [PLAIN, *(PLAIN.model_copy(update={"clip_norm": norm}) for norm in (0.01, 1e3))]
    whole, clipped, untouched = (
        step_gradients(learner(network, recipe), network, [whole_batch()])
        for network, recipe in zip(networks, recipes, strict=True)
    )
    norm = float(torch.stack([one.norm() for one in whole.values()]).norm())
    assert norm > 0.01
    assert same({name: one * 0.01 / norm for name, one in whole.items()}, clipped)
    assert float(torch.stack([one.norm() for one in clipped.values()]).norm()) == pytest.approx(
        0.01, rel=1e-3
    )
    assert same(whole, untouched)


NOTHING = TrainBatch(
    images_BCHW=torch.empty((0, 3, 32, 32), dtype=torch.uint8),
    labels_B=torch.empty(0, dtype=torch.int64),
    weights_B=torch.empty(0),
)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_pass_without_usable_images_contributes_nothing(place: int) -> None:
    resnet = {"arch": "cifar_resnet20"}
    batch = whole_batch()
    expected_network = build("cifar_resnet20")
    expected_learner = learner(expected_network, **resnet)
    expected = step_gradients(expected_learner, expected_network, parts(batch, 2))
    network = build("cifar_resnet20")
    made = learner(network, **resnet)
    passes = parts(batch, 2)
    passes.insert(place, NOTHING)
    found = step_gradients(made, network, passes)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(made.sums_3, expected_learner.sums_3)
    for name, tensor in expected_network.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_one_image_that_is_left_of_a_pass_trains_without_statistics_of_its_own() -> None:
    """Where maps are of one pixel, as here the last ones, torch refuses to take those of one image."""
    network = build("cifar_resnet20")
    made = learner(network, arch="cifar_resnet20")
    whole = TrainBatch(
        images_BCHW=torch.full((1, 3, 4, 4), 200, dtype=torch.uint8),
        labels_B=torch.ones(1, dtype=torch.int64),
        weights_B=torch.ones(1),
    )
    before = {name: one.clone() for name, one in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        made.step([whole], num_group_rows=1, factor=1.0, step=0)
    network.load_state_dict(before)
    made.step([replace(whole, num_missing=1)], num_group_rows=1, factor=1.0, step=0)
    moved = {name for name, one in network.state_dict().items() if not torch.equal(one, before[name])}
    assert moved
    assert moved <= {name for name, _ in network.named_parameters()}
    assert [module.training for module in network.modules()] == modes
    assert made.sums_3[2] == 1


@pytest.mark.parametrize("depth", [0, 5, 11])
def test_a_step_without_usable_images_takes_part_with_gradients_of_zero(depth: int) -> None:
    network = build("cifar_resnet20", depth=depth)
    made = learner(network, arch="cifar_resnet20", depth=depth)
    before = {name: one.clone() for name, one in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    found = step_gradients(made, network, [NOTHING])
    trainable = {name for name, one in network.named_parameters() if one.requires_grad}
    assert found.keys() == trainable
    assert not any(one.any() for one in found.values())
    assert all(torch.equal(network.state_dict()[name], one) for name, one in before.items())
    assert [module.training for module in network.modules()] == modes
    assert made.sums_3.tolist() == [0, 0, 0]


def test_fp16_is_float32_without_a_gpu() -> None:
    half, full = build(), build()
    made = learner(half, PLAIN.model_copy(update={"precision": TrainingPrecision.FP16}))
    assert not made.scaler.is_enabled()
    found = step_gradients(made, half, [whole_batch()])
    expected = step_gradients(learner(full), full, [whole_batch()])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bf16_trains_float32_weights() -> None:
    network = build()
    found = step_gradients(
        learner(network, PLAIN.model_copy(update={"precision": TrainingPrecision.BF16})),
        network,
        [whole_batch()],
    )
    full = build()
    expected = step_gradients(learner(full), full, [whole_batch()])
    assert {one.dtype for one in network.parameters()} == {torch.float32}
    assert any(not torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.allclose(found[name], expected[name], rtol=0.1, atol=0.02) for name in expected)


def test_validation_counts_loss_without_smoothing_or_weights() -> None:
    network, batch = build(), whole_batch()
    logits_BK = network(normalise(batch.images_BCHW, PRESET))
    nll, correct, rows = validation_sums(network, PRESET, batch, TrainingPrecision.FP32).tolist()
    assert nll == pytest.approx(
        float(cross_entropy(logits_BK.detach(), batch.labels_B, reduction="sum")), rel=1e-6
    )
    assert correct == int((logits_BK.argmax(1) == batch.labels_B).sum())
    assert rows == 7


def test_batchnorm_over_a_group_keeps_weights_and_activations() -> None:
    network = build("timm:mobilenetv3_small_100")
    converted = with_group_batchnorm(copy.deepcopy(network))
    images_BCHW = torch.randn(2, 3, 64, 64)
    norms = [module for module in converted.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    assert converted.state_dict().keys() == network.state_dict().keys()
    # In eval mode it runs without a group.
    with torch.no_grad():
        assert torch.equal(converted.eval()(images_BCHW), network.eval()(images_BCHW))


def test_what_watches_a_batchnorm_watches_the_one_of_the_group() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    seen: list[str] = []
    network[1].register_forward_hook(lambda module, args, output: seen.append("output"))
    network[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(f"input {kwargs}"), with_kwargs=True
    )
    with_group_batchnorm(network).eval()(torch.randn(2, 3, 8, 8))
    assert seen == ["input {}", "output"]


class _FromNumbers(TorchDispatchMode):
    """Counts the tensors that are made of Python's numbers: on a GPU each waits for all that runs there."""

    num_made = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num_made += func is torch.ops.aten.lift_fresh.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("num_group_rows", [7, torch.tensor(7.0)])
def test_passes_make_no_tensor_of_numbers(num_group_rows: int | Tensor) -> None:
    network = build()
    made = learner(network)
    with _FromNumbers() as watch:
        made.step([whole_batch()], num_group_rows=num_group_rows, factor=1.0, step=0)
        validation_sums(network, PRESET, whole_batch(), TrainingPrecision.FP32)
    assert watch.num_made == 0
