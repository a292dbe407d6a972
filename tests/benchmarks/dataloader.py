"""A torch DataLoader over a list of files, as people write it, and at its own best."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision
from measuring import WayResult, WaySettings, list_images, peer_result, save_features
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from convoy.core.config import load_config


class Variant(StrEnum):
    """PLAIN: float32 as people write it. TUNED: bf16 autocast and channels_last."""

    PLAIN = "plain"
    TUNED = "tuned"


class DataLoaderSettings(WaySettings):
    """Worker processes of the loader (0: in the main process), and how the network is run."""

    workers: int = Field(default=0, ge=0)
    variant: Variant = Variant.PLAIN


class ImageFiles(Dataset[Tensor]):
    def __init__(self, paths: Sequence[str], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def run_dataloader(settings: DataLoaderSettings) -> WayResult:
    paths = list_images(settings.images)
    transform = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    loader = DataLoader(ImageFiles(paths, transform), settings.batch_size, num_workers=settings.workers)
    batches, features = [], []
    schema = pa.schema([("path", pa.string()), ("features", pa.list_(pa.float32()))])
    with TemporaryDirectory(prefix="convoy-bench-dataloader-") as folder:
        with pq.ParquetWriter(Path(folder) / "features.parquet", schema) as writer:
            for features_BD in _extract(loader, settings.variant):
                first = sum(len(one) for one in features)
                batches.append((time.time(), len(features_BD)))
                features.append(features_BD)
                chosen = paths[first : first + len(features_BD)]
                writer.write_table(pa.table({"path": chosen, "features": list(features_BD)}, schema))
        finished_unix_s = time.time()
    save_features(settings.features, [Path(path).name for path in paths], np.concatenate(features))
    return peer_result(settings, batches, finished_unix_s)


def _extract(loader: DataLoader[Tensor], variant: Variant) -> Iterator[np.ndarray]:
    """The float32 features_BD of each batch."""
    memory_format = torch.channels_last if variant is Variant.TUNED else torch.contiguous_format
    model = _model().to(memory_format=memory_format)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=variant is Variant.TUNED)
    for images_BCHW in loader:
        with torch.inference_mode(), autocast:
            yield model(images_BCHW.contiguous(memory_format=memory_format)).float().numpy()


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return model.eval()


if __name__ == "__main__":
    print(run_dataloader(load_config(DataLoaderSettings, None, sys.argv[1:])).model_dump_json())
