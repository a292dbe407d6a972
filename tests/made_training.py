"""A small real training of digits without Ray: its workspace, its spec, and a group of one worker."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cache_jobs import write_digits
from convoy.cluster.training_group import TrainingGroup
from convoy.cluster.training_spec import Ingest, TeacherRows, TrainingRows, TrainingSpec
from convoy.core.splits import SplitOptions
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.teacher_logits import write_teacher_logits
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.presets import EvalPreset
from convoy.vision.training_config import Distillation, Optimiser, Phase, Recipe, TrainingPrecision
from convoy.vision.weights import state_to_safetensors

RUN_ID = "train-0001"
PRESET = EvalPreset(resize_px=32, crop_px=32)


def frozen_rows(workspace: Path, images: Path) -> pa.Table:
    """The rows of the class folders below `images`, frozen as a dataset."""
    store = LocalStore(str(workspace))
    freeze_dataset(store, "digits", str(images), splits=SplitOptions(val_fraction=0, test_fraction=0))
    return open_dataset(store, "digits").read_table()


def digit_rows(folder: Path, num_images: int) -> pa.Table:
    """Rows of real digits as JPEG files below the folder, beside a workspace."""
    write_digits(folder / "images", num_images)
    return frozen_rows(folder / "workspace", folder / "images")


def training_spec(workspace: Path, rows: pa.Table, **settings: Any) -> TrainingSpec:
    """A spec over these rows, written into the workspace. Every fifth row is for validation.

    LeNet-5, two epochs of 5 steps with momentum and augmentation; `settings` replace fields of the spec.
    """
    is_val = [row % 5 == 4 for row in range(rows.num_rows)]
    train, val = (rows.filter(pa.array([one is wanted for one in is_val])) for wanted in (False, True))
    backbone = settings.get("backbone", BackboneConfig(arch="lenet5", weights="random", num_classes=10))
    store = LocalStore(str(workspace))
    initial = store_initial_weights(store, backbone)
    fields: dict[str, Any] = {
        "workspace": str(workspace),
        "run_id": RUN_ID,
        "backbone": backbone,
        "initial_weights_key": initial,
        "preset": PRESET,
        "decode_rule": DecodeRule(min_side_px=1),
        "augmentation": AugmentationPolicy.model_validate({"base": "cifar", "rotation": {"degrees": 10}}),
        "recipe": recipe(),
        "phases": (Phase(name="train", epochs=2, learning_rate=0.05),),
        "class_weights": None,
        "balanced_sampling": False,
        "train": store_rows(store, "train", train),
        "val": store_rows(store, "val", val),
        "batch_size": 8,
        "checkpoint_steps": 3,
        "checkpoint_minutes": 10.0,
        "ingest": Ingest.FUSED,
        "num_preparers": 1,
        "num_threads": 1,
        "num_fetch_threads": 2,
        "stall_s": 600.0,
        "local_cache": None,
    }
    return TrainingSpec(**{**fields, **settings})


def recipe(**settings: Any) -> Recipe:
    """Momentum, weight decay, float32; `settings` replace fields."""
    return Recipe.model_validate(
        {
            "optimiser": Optimiser(weight_decay=1e-3),
            "precision": TrainingPrecision.FP32,
            "batch_size": 8,
            **settings,
        }
    )


def store_rows(store: LocalStore, name: str, rows: pa.Table) -> TrainingRows:
    """Write rows as a training reads them."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    key = f"runs/{RUN_ID}/input/{name}.parquet"
    store.put(key, buffer.getvalue())
    return TrainingRows(key=key, num_rows=rows.num_rows)


def store_teacher(
    store: LocalStore, logits_NK: NDArray[np.float16], distillation: Distillation | None = None
) -> TeacherRows:
    """Write what a teacher says of the training rows as a training reads it."""
    key = f"runs/{RUN_ID}/input/teacher.parquet"
    names = [f"row{row}" for row in range(len(logits_NK))]
    write_teacher_logits(store, key, names, logits_NK)
    return TeacherRows(key=key, distillation=distillation or Distillation())


def store_initial_weights(store: LocalStore, backbone: BackboneConfig) -> str:
    """Write the weights that the backbone's seed gives."""
    key = f"runs/{RUN_ID}/initial.safetensors"
    store.put(key, state_to_safetensors(build_network(backbone).state_dict()))
    return key


@dataclass
class GroupOfOne(TrainingGroup):
    """A group of one worker on the CPU: all that it does together it does alone, as the real one would."""

    rank: int = 0
    num_workers: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def wrap(self, network: nn.Module) -> nn.Module:
        """Alone, the network itself."""
        return network

    def total(self, values: Tensor) -> Tensor:
        """The sum over one worker."""
        return values.clone()

    def from_first(self, value: Any) -> Any:
        """This worker is the first."""
        return value
