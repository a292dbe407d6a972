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
from score_network import RESNET_18, ScoredNetwork
from timm.data import create_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from convoy.core.config import load_config


class Variant(StrEnum):
    """PLAIN: float32 as people write it. TUNED: bf16 autocast and channels_last."""

    PLAIN = "plain"
    TUNED = "tuned"


class Library(StrEnum):
    """Whose loader. TIMM: `create_loader`, with its own transform, as timm's inference.py does."""

    TORCH = "torch"
    TIMM = "timm"


class DataLoaderSettings(WaySettings):
    """Worker processes of the loader (0: in the main process), and how the network is run.

    Without `network` it gives the pooled features of ResNet-18, else its logits.
    """

    workers: int = Field(default=0, ge=0)
    variant: Variant = Variant.PLAIN
    library: Library = Library.TORCH
    network: ScoredNetwork | None = None


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
    loader, model = _loader(settings, paths), _model(settings.network)
    batches, features = [], []
    schema = pa.schema([("path", pa.string()), ("features", pa.list_(pa.float32()))])
    with TemporaryDirectory(prefix="convoy-bench-dataloader-") as folder:
        with pq.ParquetWriter(Path(folder) / "features.parquet", schema) as writer:
            for features_BD in _extract(loader, model, settings.variant):
                first = sum(len(one) for one in features)
                batches.append((time.time(), len(features_BD)))
                features.append(features_BD)
                chosen = paths[first : first + len(features_BD)]
                writer.write_table(pa.table({"path": chosen, "features": list(features_BD)}, schema))
        finished_unix_s = time.time()
    save_features(settings.features, [Path(path).name for path in paths], np.concatenate(features))
    return peer_result(settings, batches, finished_unix_s)


def _loader(settings: DataLoaderSettings, paths: Sequence[str]) -> DataLoader[Tensor]:
    network = settings.network or RESNET_18
    images = ImageFiles(paths, network.transform())
    if settings.library is Library.TORCH:
        pin_memory = torch.cuda.is_available()
        return DataLoader(images, settings.batch_size, num_workers=settings.workers, pin_memory=pin_memory)
    loader: DataLoader[Tensor] = create_loader(
        images,
        input_size=(3, network.crop_px, network.crop_px),
        batch_size=settings.batch_size,
        use_prefetcher=False,
        interpolation="bilinear",
        crop_pct=network.crop_px / network.resize_px,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    return loader


def _extract(loader: DataLoader[Tensor], model: nn.Module, variant: Variant) -> Iterator[np.ndarray]:
    """The float32 outputs_BD of each batch, from the current GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory_format = torch.channels_last if variant is Variant.TUNED else torch.contiguous_format
    model = model.to(device, memory_format=memory_format)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=variant is Variant.TUNED)
    for images in loader:
        images_BCHW = images.to(device, non_blocking=True, memory_format=memory_format)
        with torch.inference_mode(), autocast:
            yield model(images_BCHW).float().cpu().numpy()


def _model(network: ScoredNetwork | None) -> nn.Module:
    if network is not None:
        return network.build()
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return model.eval()


if __name__ == "__main__":
    print(run_dataloader(load_config(DataLoaderSettings, None, sys.argv[1:])).model_dump_json())
