from __future__ import annotations

import torch

from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.head_config import HeadKind, HeadSpec
from convoy.vision.heads import Head, OutputGroups
from convoy.vision.readout import LogitsNetwork

CONFIG = BackboneConfig(arch="lenet5", weights="random", seed=3)
IMAGES_BCHW = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def made_network(**options: object) -> tuple[torch.nn.Module, LogitsNetwork]:
    network = build_network(CONFIG).eval()
    tap = str(options.pop("tap", "logits"))
    readout = options.pop("readout", None)
    order = options.pop("class_order", None)
    wrapped = LogitsNetwork(
        network,
        depth_axis(CONFIG, network),
        tap=tap,
        readout=readout,  # type: ignore[arg-type]
        class_order=order,  # type: ignore[arg-type]
    )
    return network, wrapped.eval()


@torch.no_grad()
def test_without_a_readout_the_networks_outputs_are_the_logits() -> None:
    network, wrapped = made_network()
    torch.testing.assert_close(wrapped(IMAGES_BCHW), network(IMAGES_BCHW))


@torch.no_grad()
def test_classes_come_out_in_the_order_that_is_asked_for() -> None:
    network, wrapped = made_network(class_order=(2, 0, 1))
    torch.testing.assert_close(wrapped(IMAGES_BCHW), network(IMAGES_BCHW)[:, [2, 0, 1]])


@torch.no_grad()
def test_outputs_of_one_class_are_added_before_they_are_ordered() -> None:
    groups = OutputGroups([(0, 5), (1,), (9, 2)])
    network, wrapped = made_network(readout=groups, class_order=(1, 2, 0))
    torch.testing.assert_close(wrapped(IMAGES_BCHW), groups(network(IMAGES_BCHW))[:, [1, 2, 0]])


@torch.no_grad()
def test_a_head_computes_in_float32_where_the_network_does_not() -> None:
    head = Head(HeadSpec(kind=HeadKind.SOFTMAX, num_features=84, num_classes=3)).eval()
    seen: list[torch.dtype] = []
    head.layers[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    _, wrapped = made_network(tap="f6", readout=head)
    exact_BK = wrapped(IMAGES_BCHW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded_BK = wrapped(IMAGES_BCHW)
    assert seen == [torch.float32, torch.float32]
    torch.testing.assert_close(rounded_BK, exact_BK, atol=0.05, rtol=0.05)
    assert not torch.equal(rounded_BK, exact_BK)
