"""Ray Data as its documentation shows it: read_images -> map(transform) -> map_batches(model) -> write_parquet.

After "Image Classification Batch Inference with PyTorch" in Ray's documentation, with what makes it faster on a
small machine: the transform gets a Pillow image (resized as uint8, not as float), the undecorated image is not
carried along, the one actor asks for one CPU, so that reading always finds the other, and its network still uses
all cores.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
import torchvision
from measuring import WayResult, WaySettings, peer_result, save_features
from PIL import Image
from ray.data import ActorPoolStrategy
from score_network import RESNET_18, ScoredNetwork

from convoy.core.config import load_config


class RayDocsSettings(WaySettings):
    """Without `network` it gives the pooled features of ResNet-18, else its logits."""

    network: ScoredNetwork | None = None


def transform_image(row: dict[str, Any], transform: Callable[[Image.Image], torch.Tensor]) -> dict[str, Any]:
    return {"path": row["path"], "image": transform(Image.fromarray(row["image"])).numpy()}


class Model:
    def __init__(self, network: ScoredNetwork | None, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = _resnet_features() if network is None else network.build()
        self.model = model.to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            images_BCHW = torch.from_numpy(batch["image"]).to(self.device)
            features_BD = self.model(images_BCHW).cpu().numpy()
        finished_unix_s = np.full(len(features_BD), time.time())
        return {"path": batch["path"], "features": features_BD, "finished_unix_s": finished_unix_s}


def _resnet_features() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model.fc = torch.nn.Identity()
    return model.eval()


def run_ray_docs(settings: RayDocsSettings) -> WayResult:
    # Without "local" it would join, and measure, a cluster that happens to run on this machine.
    ray.init("local", include_dashboard=False, log_to_driver=False)
    with TemporaryDirectory(prefix="convoy-bench-ray-docs-") as folder:
        (
            ray.data.read_images(settings.images, mode="RGB", include_paths=True)
            .map(transform_image, fn_args=((settings.network or RESNET_18).transform(),))
            .map_batches(
                Model,
                fn_constructor_args=(settings.network, os.cpu_count()),
                batch_size=settings.batch_size,
                compute=ActorPoolStrategy(size=1),
                num_cpus=1,
                num_gpus=1 if torch.cuda.is_available() else 0,
            )
            .write_parquet(folder)
        )
        finished_unix_s = time.time()
        rows = pq.read_table(folder)
    save_features(
        settings.features,
        [Path(path).name for path in rows["path"].to_pylist()],
        np.stack(rows["features"].combine_chunks().to_numpy_ndarray()),
    )
    moments_unix_s, sizes = np.unique(rows["finished_unix_s"].to_numpy(), return_counts=True)
    batches = list(zip(moments_unix_s.tolist(), sizes.tolist(), strict=True))
    return peer_result(settings, batches, finished_unix_s)


if __name__ == "__main__":
    print(run_ray_docs(load_config(RayDocsSettings, None, sys.argv[1:])).model_dump_json())
