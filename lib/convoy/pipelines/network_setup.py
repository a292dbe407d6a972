"""What is decided once before a network is trained: phases, augmentation, first weights, and a fitted head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from convoy.cluster.network_device import find_device
from convoy.cluster.training import WorkerPlan
from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError
from convoy.core.progress import Progress
from convoy.pipelines.distillation import TaughtRows
from convoy.pipelines.network_building import NewNetwork
from convoy.pipelines.network_plan import (
    NetworkPlan,
    plan_network,
    trained_backbone_config,
)
from convoy.pipelines.pixel_statistics import resolve_augmentation
from convoy.pipelines.probing import HeadSummary, TrainingInputs, check_head, fit_probe
from convoy.pipelines.train_config import HeadSource, TrainConfig
from convoy.pipelines.training_rows import count_classes, has_validation_rows
from convoy.pipelines.wanted_training import wanted_recipe
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.engine_options import NetworkDevice
from convoy.vision.head_config import can_choose
from convoy.vision.head_path import KeptPoints
from convoy.vision.training_config import TrainingPrecision


class TrainingSetup(StrictModel):
    """A training with nothing left to choose. `head` tells of a head that was fitted from the cache."""

    plan: NetworkPlan
    augmentation: AugmentationPolicy
    head: HeadSummary | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTraining:
    """A network before its training, and the plan of it; `fits_head`: its first phase is a fit on cached features."""

    new: NewNetwork
    plan: NetworkPlan
    fits_head: bool


def plan_training(
    inputs: TrainingInputs,
    counts: Sequence[int],
    *,
    num_workers: int,
    on_gpus: bool,
    device: NetworkDevice | None,
) -> PlannedTraining:
    """Build the network, and plan its training on `counts` images a class; `device` is that of `plan_network`.

    Raises ConfigError for weights that do not fit (with names and shapes), a head that must come from the cache and
    cannot, and whatever `plan_network` refuses.
    """
    store, manifest, pretrained, config = inputs
    new = NewNetwork(trained_backbone_config(config, len(manifest.classes)))
    classifier_note = new.take_weights(store, pretrained, manifest.classes)
    has_val = has_validation_rows(manifest, config.rows)
    plan = plan_network(
        config,
        new.network,
        new.axis,
        counts,
        num_workers=num_workers,
        on_gpus=on_gpus,
        device=device,
        has_val=has_val,
    )
    fits_head = takes_head_from_cache(config, plan, new)
    if fits_head and config.head_source is HeadSource.CACHE:
        check_head(manifest, config)
    elif fits_head and not can_choose(config.head, has_val=has_val):
        plan, fits_head = _with_unchosen_head(config, plan), False
    # A head that is fitted takes the classifier's place.
    if classifier_note is not None and not fits_head:
        plan = plan.model_copy(update={"notes": (*plan.notes, classifier_note)})
    return PlannedTraining(new=new, plan=plan, fits_head=fits_head)


def plan_on_workers(inputs: TrainingInputs, rows: pa.Table, workers: WorkerPlan) -> PlannedTraining:
    """The plan for some rows and a group of workers, one of which is asked for its device where that matters.

    Errors are those of `plan_training`; nothing has started for them.
    """
    wanted = wanted_recipe(inputs.config)
    asks = wanted.precision is TrainingPrecision.AUTO or wanted.compile
    return plan_training(
        inputs,
        count_classes(rows, inputs.manifest.classes),
        num_workers=workers.num_workers,
        on_gpus=workers.gpus_per_worker > 0,
        device=find_device() if asks else None,
    )


def set_up_training(
    inputs: TrainingInputs,
    planned: PlannedTraining,
    taught: TaughtRows,
    *,
    progress: Progress,
    new_run: bool,
    kept: KeptPoints | None,
) -> tuple[TrainingSetup, bytes]:
    """The setup of what was planned for the taught rows, and the first weights as safetensors.

    A head that is fitted goes on with what is `kept` of it.
    """
    store, manifest, _, config = inputs
    new, plan = planned.new, planned.plan
    plan = plan.model_copy(update={"notes": (*plan.notes, *taught.notes)})
    policy = resolve_augmentation(
        store, manifest, config.dataset, config.augmentation, config.extraction.decode, progress
    )
    head = None
    if planned.fits_head:
        probe = fit_probe(
            inputs,
            tap=new.head_tap or "",
            taught=taught.balanced(plan.balance, manifest.classes),
            progress=progress,
            new_run=new_run,
            kept=kept,
        )
        new.take_head(probe.fitted.head)
        head = probe.summary.in_place_of(plan.phases[0].epochs, num_views=config.views)
        plan = without_head_phase(plan)
    return TrainingSetup(plan=plan, augmentation=policy, head=head), new.to_safetensors()


def takes_head_from_cache(config: TrainConfig, plan: NetworkPlan, new: NewNetwork) -> bool:
    """Whether the first phase, of the head alone, is a fit on cached features; ConfigError where it must and cannot."""
    if not config.may_fit_head:
        return False
    is_possible = plan.phases[0].freeze_depth == len(new.axis) - 1 and new.head_tap is not None
    if config.head_source is HeadSource.CACHE and not is_possible:
        raise ConfigError(
            "the head cannot come from the feature cache: the first phase must train only the head, and the"
            " head must be one linear layer",
            where="head_source",
            next_step=f"give the first phase `freeze_depth: body`, or leave head_source at {HeadSource.AUTO.value}",
        )
    return is_possible


def without_head_phase(plan: NetworkPlan) -> NetworkPlan:
    """What is left to train where the first phase is a fit on cached features (see `takes_head_from_cache`)."""
    note = (
        f"phase {plan.phases[0].name} is a fit from the feature cache instead: its epochs, rate, schedule and"
        " resolution_px have no effect on it, nor have optimiser, mixing and label smoothing; augmentation has with"
        " more than one of `views`"
    )
    return plan.model_copy(update={"phases": plan.phases[1:], "notes": (*plan.notes, note)})


def _with_unchosen_head(config: TrainConfig, plan: NetworkPlan) -> NetworkPlan:
    """The plan where the first phase would be a fit on cached features, and no rows can choose its C."""
    note = (
        f"phase {plan.phases[0].name} trains the head through the network, and `head` and `views` have no effect: no"
        f" validation rows could choose among {len(set(config.head.C))} values of C for a fit from the feature cache; a"
        " single one, such as head.C=[1.0], needs none"
    )
    return plan.model_copy(update={"notes": (*plan.notes, note)})
