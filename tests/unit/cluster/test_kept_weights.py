from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from convoy.cluster.kept_weights import open_network, read_kept_weights
from convoy.pipelines.models import fetch_backbone
from convoy.storage.local_store import LocalStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.weights import load_weights


@torch.no_grad()
def test_a_network_that_is_to_predict_has_its_batch_norms_folded(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    record = fetch_backbone(store, BackboneConfig(arch="cifar_resnet20", weights="random"))
    network, axis = open_network(store, record.config, record.weights_key, record.num_classes)
    as_trained = build_network(record.config)
    load_weights(as_trained, read_kept_weights(store, record.weights_key))
    assert axis == depth_axis(record.config, as_trained)
    assert any(isinstance(module, nn.BatchNorm2d) for module in as_trained.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    images_BCHW = torch.rand(2, 3, 32, 32)
    assert torch.allclose(network(images_BCHW), as_trained(images_BCHW), atol=1e-5)
