"""One training step of a network, and the counts of a validation pass. Knows no data source and no cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, one_hot
from torchvision.transforms import v2

from convoy.core.randomness import position_digest
from convoy.vision.distillation import SoftTargets, distilled_losses
from convoy.vision.freezing import BATCHNORMS, frozen_stages, set_train_mode
from convoy.vision.optimisation import build_optimiser, set_rate
from convoy.vision.presets import EvalPreset
from convoy.vision.stages import DepthAxis
from convoy.vision.training_config import Phase, Recipe, TrainingPrecision
from convoy.vision.views import normalise

# What mixed targets are divided by where all that was mixed counts nothing.
_LEAST_WEIGHT = torch.finfo(torch.float32).tiny
# Where a module keeps what watches its forward pass; torch has no way to hand that on.
_FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """Usable images of one pass: uint8 images_BCHW, int64 labels_B, float32 weights_B; `soft` is a teacher's.

    `num_missing` more images of the pass cannot be used.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    weights_B: Tensor
    soft: SoftTargets | None = None
    num_missing: int = 0

    @property
    def lacks_statistics(self) -> bool:
        """Whether too few of its images are left for BatchNorm, which may take several values of a channel."""
        return self.num_missing > 0 and len(self.labels_B) < 2


class Learner:
    """A network in one phase of its training, on one device.

    `model` is what is called with normalised images: the network itself, compiled or not, or
    DistributedDataParallel around it. Gradients are those of the mean loss over the usable images of the whole
    group's batch, whatever their distribution over workers; but BatchNorm takes its statistics over the images of a
    pass, of this worker or, where it was made the group's, of all. Of a pass of which one image is usable it takes
    none; and where it is the group's, a worker without any usable image adds a black one.
    """

    def __init__(
        self,
        network: nn.Module,
        axis: DepthAxis,
        *,
        model: nn.Module,
        preset: EvalPreset,
        phase: Phase,
        recipe: Recipe,
        class_weights_K: Tensor | None,
        num_workers: int = 1,
    ) -> None:
        self.device = next(network.parameters()).device
        self._network, self._axis, self._freeze_depth = network, axis, frozen_stages(phase)
        self._model, self._preset, self._recipe = model, preset, recipe
        self._num_workers = num_workers
        self._class_weights_K = None if class_weights_K is None else class_weights_K.to(self.device)
        self.optimiser = build_optimiser(network, axis, phase, recipe.optimiser)
        needs_scaling = recipe.precision is TrainingPrecision.FP16 and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=needs_scaling)
        self._num_classes = axis[len(axis) - 1].channels
        self._mixers = _mixers(recipe)
        # Loss and correct predictions summed over images, and images; on the device, so that no step waits.
        self.sums_3 = torch.zeros(3, device=self.device, dtype=torch.float64)

    def begin_epoch(self) -> None:
        """Train mode behind the frozen stages, and sums of zero."""
        set_train_mode(self._network, self._axis, self._freeze_depth)
        self.sums_3.zero_()

    def step(
        self,
        batches: Sequence[TrainBatch],
        *,
        num_group_rows: int | Tensor,
        factor: float,
        step: int,
        rank: int = 0,
    ) -> None:
        """One update from the share of a batch that the worker `rank` of the group has, in one or more passes.

        `num_group_rows` are the usable images of the whole group's batch; `factor` is the schedule's. All random
        numbers depend on the recipe's seed and the step, so a resumed training draws the same ones: those of the
        mixing are the same for all workers, those of the network (dropout) each worker's own.
        """
        self._seed("step", step)
        set_rate(self.optimiser, factor)
        for number, batch in enumerate(batches):
            place = ("step", step, "pass", number)
            if number and self._num_workers > 1:
                # The pass before has left each worker elsewhere in its stream.
                self._seed(*place)
            # The first worker goes on with the stream of the mixing, as a single one does.
            own_place = (*place, "rank", rank) if rank else ()
            with self._without_sync(number < len(batches) - 1):
                self._backward(batch, num_group_rows, own_place)
        if self._recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimiser)
            parameters = [one for group in self.optimiser.param_groups for one in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self._recipe.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)

    def _seed(self, *place: str | int) -> None:
        torch.manual_seed(int.from_bytes(position_digest(self._recipe.seed, *place)[:8], "big") >> 1)

    def _backward(
        self, batch: TrainBatch, num_group_rows: int | Tensor, own_place: tuple[str | int, ...]
    ) -> None:
        if not len(batch.labels_B):
            self._backward_nothing(batch)
            return
        images = normalise(batch.images_BCHW.to(self.device, non_blocking=True), self._preset)
        labels_B = batch.labels_B.to(self.device, non_blocking=True)
        weights_B = batch.weights_B.to(self.device, non_blocking=True)
        soft = None if batch.soft is None else batch.soft.to(self.device)
        images, targets, weights_B, soft = self._mixed(images, labels_B, weights_B, soft)
        if own_place:
            self._seed(*own_place)
        rests = self._resting(*BATCHNORMS) if batch.lacks_statistics else contextlib.nullcontext()
        with rests, training_autocast(self.device, self._recipe.precision):
            logits_BK = self._model(images)
        losses_B = self._losses(logits_BK.float(), targets, soft)
        loss_sum = (losses_B * weights_B).sum()
        # DistributedDataParallel divides the sum of the workers' gradients by their number.
        loss = loss_sum * (self._num_workers / num_group_rows)
        torch.autograd.backward(self.scaler.scale(loss))
        with torch.no_grad():
            correct = (logits_BK.argmax(1) == labels_B).sum()
            self.sums_3[:2] += torch.stack([loss_sum, correct])
            self.sums_3[2] += len(labels_B)

    def _losses(self, logits_BK: Tensor, targets: Tensor, soft: SoftTargets | None) -> Tensor:
        losses_B = self._label_losses(logits_BK, targets)
        return losses_B if soft is None else distilled_losses(losses_B, logits_BK, soft)

    def _label_losses(self, logits_BK: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of each row, smoothed, times the weight of its class; targets are labels or mixtures."""
        smoothing, weights_K = self._recipe.label_smoothing, self._class_weights_K
        if weights_K is None:
            return cross_entropy(logits_BK, targets, label_smoothing=smoothing, reduction="none")
        # torch weighs what smoothing gives to other classes by theirs: so a common class would be taught the rare one.
        sharp_B = cross_entropy(logits_BK, targets, weight=weights_K, reduction="none")
        row_weights_B = weights_K[targets] if targets.ndim == 1 else targets @ weights_K
        even_B = -log_softmax(logits_BK, dim=1).mean(dim=1)
        return sharp_B.lerp(row_weights_B * even_B, smoothing)

    def _backward_nothing(self, batch: TrainBatch) -> None:
        """Gradients of zero for a pass without usable images: the other workers wait for this one's."""
        image_BCHW = batch.images_BCHW.new_zeros((1, *batch.images_BCHW.shape[1:]))
        # A made-up image must not move BatchNorm.
        with self._resting(nn.Module), training_autocast(self.device, self._recipe.precision):
            logits_BK = self._model(normalise(image_BCHW.to(self.device), self._preset))
        torch.autograd.backward(self.scaler.scale(logits_BK.float().sum() * 0))

    @contextlib.contextmanager
    def _resting(self, *kinds: type[nn.Module]) -> Iterator[None]:
        """Modules of these kinds as in evaluation; but BatchNorm that is the group's, for which others wait."""
        for module in self._network.modules():
            if isinstance(module, kinds) and not isinstance(module, nn.SyncBatchNorm):
                module.training = False
        try:
            yield
        finally:
            set_train_mode(self._network, self._axis, self._freeze_depth)

    def _mixed(
        self, images_BCHW: Tensor, labels_B: Tensor, weights_B: Tensor, soft: SoftTargets | None
    ) -> tuple[Tensor, Tensor, Tensor, SoftTargets | None]:
        """Images, both kinds of targets, and weights, mixed by the same shares; a target counts by its own weight."""
        if not self._mixers or len(labels_B) < 2:
            return images_BCHW, labels_B, weights_B, soft
        mixer = self._mixers[int(torch.randint(len(self._mixers), ()))]
        targets = [one_hot(labels_B, self._num_classes).float()]
        if soft is not None:
            targets.append(soft.probabilities_BK)
        weights_B1 = weights_B[:, None]
        images, mixed = mixer(
            images_BCHW, torch.cat([*(one * weights_B1 for one in targets), weights_B1], dim=1)
        )
        *mixed_targets, weights_B1 = mixed.split([self._num_classes] * len(targets) + [1], dim=1)
        targets_BK, *soft_BK = (one / weights_B1.clamp_min(_LEAST_WEIGHT) for one in mixed_targets)
        if soft is not None:
            soft = soft.with_probabilities(soft_BK[0])
        return images, targets_BK, weights_B1[:, 0], soft

    def _without_sync(self, is_wanted: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged once an update, with the last pass."""
        no_sync = getattr(self._model, "no_sync", None)
        return no_sync() if is_wanted and no_sync is not None else contextlib.nullcontext()


def training_autocast(device: torch.device, precision: TrainingPrecision) -> torch.autocast:
    """The context in which a network of this precision runs; fp16 without a GPU is float32."""
    if precision is TrainingPrecision.FP16:
        return torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is TrainingPrecision.BF16)


@torch.no_grad()
def validation_sums(
    network: nn.Module, preset: EvalPreset, batch: TrainBatch, precision: TrainingPrecision
) -> Tensor:
    """[sum of NLL, correct predictions, images] of a batch, in float64 on the device of a network in eval mode."""
    device = next(network.parameters()).device
    labels_B = batch.labels_B.to(device, non_blocking=True)
    images_BCHW = normalise(batch.images_BCHW.to(device, non_blocking=True), preset)
    with training_autocast(device, precision):
        logits_BK = network(images_BCHW).float()
    nll = cross_entropy(logits_BK, labels_B, reduction="sum").double()
    correct = (logits_BK.argmax(1) == labels_B).sum()
    return torch.stack([nll, correct, torch.full_like(nll, len(labels_B))])


def with_group_batchnorm(network: nn.Module) -> nn.Module:
    """The network with BatchNorms that take their statistics over the whole group of workers; for GPUs."""
    # torch's own conversion would lose the activation that many of timm's BatchNorms contain.
    from timm.layers import convert_sync_batchnorm  # noqa: PLC0415

    before = dict(network.named_modules())
    converted: nn.Module = convert_sync_batchnorm(network)
    for name, module in converted.named_modules():
        if before[name] is not module:
            # A network that reuses early stages watches the last of them, which may be a BatchNorm.
            for hooks in _FORWARD_HOOKS:
                getattr(module, hooks).update(getattr(before[name], hooks))
    return converted


def _mixers(recipe: Recipe) -> list[nn.Module]:
    mixers: list[nn.Module] = []
    if recipe.mixup_alpha:
        mixers.append(v2.MixUp(alpha=recipe.mixup_alpha))
    if recipe.cutmix_alpha:
        mixers.append(v2.CutMix(alpha=recipe.cutmix_alpha))
    return mixers
