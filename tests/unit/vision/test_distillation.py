from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.distillation import SoftTargets, Teacher, distilled_losses, distilled_slopes
from convoy.vision.head_config import HeadConfig, Standardisation
from convoy.vision.head_fitting import fit_head
from convoy.vision.head_objectives import LinearObjective, measure_features, softmax_loss
from convoy.vision.heads import TensorFeatures
from convoy.vision.learner import Learner, TrainBatch
from convoy.vision.presets import EvalPreset
from convoy.vision.training_config import Distillation, Optimiser, Phase, Recipe, TrainingPrecision
from convoy.vision.views import normalise

PRESET = EvalPreset(resize_px=None, crop_px=32)
PLAIN = Recipe(optimiser=Optimiser(momentum=0.0, weight_decay=0.0), precision=TrainingPrecision.FP32)
NUM_CLASSES = 5
HOW = Distillation(temperature=3.0, weight=0.7)


def logits_of(num_rows: int, *, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=(num_rows, NUM_CLASSES))


def soft_of(logits_NK: np.ndarray, how: Distillation = HOW) -> SoftTargets:
    return Teacher(logits_NK.astype(np.float16), how).targets(slice(None))


def test_the_loss_is_that_of_the_paper() -> None:
    student_NK, teacher_NK = logits_of(6), logits_of(6, seed=1).astype(np.float16).astype(np.float64)
    label_losses_N = np.linspace(0.5, 2, 6)
    q_NK, log_p_NK = softmax(teacher_NK / 3, axis=1), log_softmax(student_NK / 3, axis=1)
    divergence_N = (q_NK * (np.log(q_NK) - log_p_NK)).sum(axis=1)
    expected_N = 0.7 * 9 * divergence_N + 0.3 * label_losses_N
    found_N = distilled_losses(
        torch.from_numpy(label_losses_N), torch.from_numpy(student_NK), soft_of(teacher_NK)
    )
    np.testing.assert_allclose(found_N.numpy(), expected_N, rtol=1e-6)


def test_a_student_that_agrees_loses_nothing_and_a_sure_teacher_gives_no_nan() -> None:
    logits_NK = logits_of(4).astype(np.float16)
    agreeing = distilled_losses(
        torch.zeros(4), torch.from_numpy(logits_NK).float(), soft_of(logits_NK, Distillation(weight=1))
    )
    assert agreeing.abs().max() < 1e-5
    sure_NK = np.where(np.eye(NUM_CLASSES) > 0, 0, -np.inf)
    student_NK = torch.from_numpy(logits_of(NUM_CLASSES)).float()
    found = distilled_losses(
        torch.zeros(NUM_CLASSES), student_NK, soft_of(sure_NK, Distillation(temperature=1, weight=1))
    )
    expected = cross_entropy(student_NK, torch.arange(NUM_CLASSES), reduction="none")
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_slopes_are_those_of_the_losses() -> None:
    logits_BK = torch.from_numpy(logits_of(6)).requires_grad_()
    soft, labels_B = soft_of(logits_of(6, seed=1)), torch.tensor([0, 1, 2, 3, 4, 0])
    label_losses_B = cross_entropy(logits_BK, labels_B, reduction="none")
    distilled_losses(label_losses_B, logits_BK, soft).sum().backward()
    _, label_slopes_BK = softmax_loss(logits_BK.detach(), labels_B)
    found_BK = distilled_slopes(label_slopes_BK, logits_BK.detach(), soft)
    assert logits_BK.grad is not None
    assert torch.allclose(found_BK, logits_BK.grad, atol=1e-6)


def test_the_teacher_speaks_of_the_rows_that_are_asked_for() -> None:
    logits_NK = logits_of(9).astype(np.float16)
    teacher = Teacher(logits_NK, HOW)
    rows = np.array([7, 0, 0, 3])
    for found in (teacher.targets(rows), teacher.take(rows).targets(slice(0, 4))):
        expected_BK = softmax(logits_NK[rows].astype(np.float64) / 3, axis=1)
        np.testing.assert_allclose(found.probabilities_BK.numpy(), expected_BK, rtol=1e-4)
    assert teacher.targets(np.array([], np.int64)).probabilities_BK.shape == (0, NUM_CLASSES)


def gradients(
    network: nn.Module, recipe: Recipe, batch: TrainBatch, class_weights_K: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradients of one step."""
    made = Learner(
        network,
        depth_axis(BackboneConfig(arch="lenet5", weights="random", num_classes=NUM_CLASSES), network),
        model=network,
        preset=PRESET,
        phase=Phase(name="train", epochs=1, learning_rate=0.01),
        recipe=recipe,
        class_weights_K=class_weights_K,
    )
    made.begin_epoch()
    found: dict[str, Tensor] = {}

    def look(optimiser: torch.optim.Optimizer, *_: object) -> None:
        found.update(
            {name: one.grad.clone() for name, one in network.named_parameters() if one.grad is not None}
        )

    handle = made.optimiser.register_step_pre_hook(look)
    made.step([batch], num_group_rows=len(batch.labels_B), factor=1.0, step=2)
    handle.remove()
    return found


def lenet() -> nn.Module:
    return build_network(BackboneConfig(arch="lenet5", weights="random", num_classes=NUM_CLASSES))


def batch_of(soft: SoftTargets | None, num_rows: int = 7) -> TrainBatch:
    generator = torch.Generator().manual_seed(0)
    return TrainBatch(
        images_BCHW=torch.randint(0, 256, (num_rows, 3, 32, 32), dtype=torch.uint8, generator=generator),
        labels_B=torch.randint(0, NUM_CLASSES, (num_rows,), generator=generator),
        weights_B=torch.rand(num_rows, generator=generator) + 0.5,
        soft=soft,
    )


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6) for name in first
    )


def test_a_step_has_the_gradients_of_a_plain_loop() -> None:
    soft, class_weights_K = soft_of(logits_of(7)), torch.tensor([0.5, 1.0, 2.0, 1.5, 0.25])
    network, batch = lenet(), batch_of(soft)
    expected_network = copy.deepcopy(network)
    logits_BK = expected_network(normalise(batch.images_BCHW, PRESET))
    labels_B = class_weights_K[batch.labels_B] * cross_entropy(
        logits_BK, batch.labels_B, label_smoothing=0.1, reduction="none"
    )
    student_BK, q_BK = torch.log_softmax(logits_BK / 3, 1), soft.probabilities_BK
    divergence_B = (q_BK * (q_BK.log() - student_BK)).sum(1)
    ((0.7 * 9 * divergence_B + 0.3 * labels_B) * batch.weights_B).mean().backward()
    expected = {name: one.grad for name, one in expected_network.named_parameters() if one.grad is not None}
    recipe = PLAIN.model_copy(update={"label_smoothing": 0.1})
    assert same(gradients(network, recipe, batch, class_weights_K), expected)


@pytest.mark.parametrize("mixing", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}])
def test_soft_targets_are_mixed_as_the_labels_are(mixing: dict[str, float]) -> None:
    """A teacher that is as sure as the labels must teach what they do, and one of others must not."""
    recipe = PLAIN.model_copy(update=mixing)
    plain = batch_of(None)
    found = {}
    for name, labels_B in (("same", plain.labels_B), ("other", plain.labels_B.roll(1))):
        logits_NK = np.where(np.eye(NUM_CLASSES)[labels_B.numpy()] > 0, 0, -np.inf)
        soft = soft_of(logits_NK, Distillation(temperature=1, weight=1))
        found[name] = gradients(lenet(), recipe, batch_of(soft))
    expected = gradients(lenet(), recipe, plain)
    assert same(found["same"], expected)
    assert not same(found["other"], expected)


@pytest.fixture(scope="module")
def taught() -> tuple[Tensor, Tensor, np.ndarray]:
    """Features, labels that mean nothing, and the logits of a linear teacher."""
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.randn(300, 6, generator=generator)
    logits_NK = features_ND @ torch.randn(6, NUM_CLASSES, generator=generator)
    return features_ND, torch.randint(0, NUM_CLASSES, (300,), generator=generator), logits_NK.numpy()


@pytest.mark.parametrize("batch_rows", [7, 512])
def test_a_head_learns_from_its_teacher_alone(
    taught: tuple[Tensor, Tensor, np.ndarray], batch_rows: int
) -> None:
    features_ND, labels_N, logits_NK = taught
    teacher = Teacher(logits_NK.astype(np.float16), Distillation(temperature=2, weight=1))
    source = TensorFeatures(features_ND, labels_N, teacher=teacher, batch_rows=batch_rows)
    head = fit_head(HeadConfig(C=(100.0,)), source, None, num_classes=NUM_CLASSES).head
    with torch.inference_mode():
        found_NK = torch.softmax(head(features_ND), dim=1).numpy()
    np.testing.assert_allclose(found_NK, softmax(logits_NK, axis=1), atol=0.02)


def test_the_gradient_of_a_taught_head_is_that_of_its_value(
    taught: tuple[Tensor, Tensor, np.ndarray],
) -> None:
    features_ND, labels_N, logits_NK = taught
    teacher = Teacher(logits_NK.astype(np.float16), HOW)
    source = TensorFeatures(features_ND + 10, labels_N, torch.rand(300), teacher=teacher, batch_rows=64)
    scale = measure_features(source, num_classes=NUM_CLASSES, standardisation=Standardisation.MEAN_STD)
    objective = LinearObjective(source, scale, softmax_loss, num_classes=NUM_CLASSES)
    random = np.random.default_rng(0)
    parameters, direction = random.normal(size=(2, objective.num_parameters))
    above, below = (
        objective.value_and_gradient(parameters + step * direction, 0.5)[0] for step in (1e-6, -1e-6)
    )
    slope = objective.value_and_gradient(parameters, 0.5)[1] @ direction
    assert (above - below) / 2e-6 == pytest.approx(slope, rel=1e-5)
