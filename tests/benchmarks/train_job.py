"""The training that all ways of `convoy bench train` do: its images, its settings, and its parts by themselves."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from images import ImageSet
from torch import nn

from convoy.cluster.training_spec import Ingest, TrainingRows, TrainingSpec
from convoy.core.config import StrictModel, load_config
from convoy.core.records import Split
from convoy.pipelines.network_building import NewNetwork
from convoy.pipelines.network_plan import plan_network, trained_backbone_config
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.training_rows import count_classes, read_split
from convoy.storage.datasets import open_dataset
from convoy.storage.stores import open_store
from convoy.vision.augmentation_policy import Crop
from convoy.vision.backbones import default_preset
from convoy.vision.engine_options import device_here
from convoy.vision.learner import Learner
from convoy.vision.stages import DepthAxis

NUM_CLASSES = 10
# `convoy train` measures every network on held-out rows; that is not timed here.
NUM_TEST_IMAGES = NUM_CLASSES
# The peers draw their crops like Convoy's default policy.
CROP = Crop()


class TrainJob(StrictModel):
    """A from-scratch training by one worker, of images in class folders under `images`/train."""

    workspace: str
    dataset: str
    images: str
    arch: str
    crop_px: int
    resize_px: int
    batch_size: int
    epochs: int

    def overrides(self, **changed: str) -> list[str]:
        """The keys of `convoy train`; what is not here is as by default."""
        keys = {
            "name": f"bench-{self.dataset}",
            "dataset": self.dataset,
            "strategy": "from_scratch",
            "backbone": json.dumps(
                {"arch": self.arch, "preset": {"resize_px": self.resize_px, "crop_px": self.crop_px}}
            ),
            "epochs": str(self.epochs),
            "recipe.batch_size": str(self.batch_size),
            "workers": '{"num_workers": 1}',
            **changed,
        }
        return [f"{key}={value}" for key, value in keys.items()]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Training:
    """What the one worker of a training has, without Ray."""

    spec: TrainingSpec
    rows: pa.Table
    network: nn.Module
    axis: DepthAxis
    device: torch.device

    def learner(self) -> Learner:
        """The learner of the first phase, as the worker makes it, at the start of an epoch."""
        network = self.network.to(device=self.device, memory_format=torch.channels_last)
        learner = Learner(
            network,
            self.axis,
            model=network,
            preset=self.spec.preset,
            phase=self.spec.phases[0],
            recipe=self.spec.recipe,
            class_weights_K=None,
        )
        learner.begin_epoch()
        return learner


def open_training(job: TrainJob, **changed: str) -> Training:
    """The spec, rows and first weights that `convoy train` would give to its worker on this machine."""
    config = load_config(TrainConfig, None, job.overrides(**changed))
    manifest = open_dataset(open_store(job.workspace), job.dataset)
    rows = read_split(manifest, Split.TRAIN)
    backbone = trained_backbone_config(config, len(manifest.classes))
    new = NewNetwork(backbone)
    counts = count_classes(rows, manifest.classes)
    device = device_here()
    plan = plan_network(
        config,
        new.network,
        new.axis,
        counts,
        num_workers=1,
        on_gpus=device.is_gpu,
        device=device,
        has_val=False,
    )
    spec = TrainingSpec(
        workspace=job.workspace,
        run_id="bench",
        backbone=backbone,
        initial_weights_key="",
        preset=default_preset(backbone),
        decode_rule=config.extraction.decode,
        augmentation=config.augmentation,
        recipe=plan.recipe,
        phases=plan.phases,
        class_weights=None,
        balanced_sampling=False,
        train=TrainingRows(key="", num_rows=rows.num_rows),
        val=None,
        batch_size=plan.batch_size,
        checkpoint_steps=config.checkpoint_steps,
        checkpoint_minutes=config.checkpoint_minutes,
        ingest=Ingest.FUSED,
        num_preparers=1,
        num_threads=os.cpu_count() or 1,
        num_fetch_threads=config.extraction.num_fetch_threads,
        stall_s=config.extraction.stall_s,
        local_cache=None,
    )
    return Training(
        spec=spec,
        rows=rows,
        network=new.network,
        axis=new.axis,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


def plain_sgd(training: Training, network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of the training for a plain loop over the same network.

    Norms and biases have no decay, as with torchvision's `--norm-weight-decay 0 --bias-weight-decay 0`.
    """
    optimiser, parameters = training.spec.recipe.optimiser, list(network.parameters())
    groups = [
        {
            "params": [one for one in parameters if one.ndim > 1],
            "weight_decay": optimiser.weight_decay,
        },
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]
    rate = training.spec.phases[0].learning_rate
    return torch.optim.SGD(groups, lr=rate, momentum=optimiser.momentum, nesterov=True)


def link_classes(images: ImageSet, folder: Path, num_train: int) -> Path:
    """The first images as class folders in splits: `num_train` to train on, and the last ones of the set as test."""
    sources = sorted(Path(images.folder).iterdir())
    for split, chosen in (("train", sources[:num_train]), ("test", sources[-NUM_TEST_IMAGES:])):
        for index, source in enumerate(chosen):
            link = folder / split / f"class_{index % NUM_CLASSES}" / source.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(source)
    return folder
