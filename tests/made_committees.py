"""Small committees of real networks, their images, and the plain loop that says what is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy, crop_views, num_slots
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.committee import Committee, Member
from convoy.vision.committee_options import CommitteeOptions, MemberOptions
from convoy.vision.engine_options import Precision
from convoy.vision.multicrop import cut_slots
from convoy.vision.presets import CropGeometry, EvalPreset, geometry_of
from convoy.vision.views import normalise
from image_files import photo

NUM_CLASSES = 7
PLAIN = EvalPreset(resize_px=36, crop_px=32)
GREY = EvalPreset(resize_px=36, crop_px=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SMALLER = EvalPreset(resize_px=30, crop_px=24)


def made_member(seed: int, preset: EvalPreset = PLAIN, *, weight: float, temperature: float = 1.0) -> Member:
    """A CIFAR ResNet-20 of random weights; its logits are spread, so that some images are sure and some not."""
    config = BackboneConfig(arch="cifar_resnet20", num_classes=NUM_CLASSES, seed=seed)
    network = build_network(config)
    weights_KD = network.get_parameter("linear.weight")
    torch.nn.init.normal_(weights_KD, std=0.02, generator=torch.Generator().manual_seed(seed))
    options = MemberOptions(preset=preset, precision=Precision.FP32, weight=weight, temperature=temperature)
    return Member(network, options)


def three_members() -> list[Member]:
    """Two that share crops but not their normalisation, and one of another size."""
    return [
        made_member(0, PLAIN, weight=0.5, temperature=1.5),
        made_member(1, GREY, weight=0.3, temperature=0.5),
        made_member(2, SMALLER, weight=0.2),
    ]


def made_committee(
    members: Sequence[Member],
    policy: CropPolicy = CropPolicy.TEN,
    averaging: Averaging = Averaging.PROBABILITIES,
    *,
    batch_size: int = 4,
    temperature: float = 1.0,
    max_resident_bytes: int | None = None,
) -> Committee:
    return Committee(
        members,
        CommitteeOptions(
            batch_size=batch_size,
            compiled=False,
            num_threads=1,
            plan=CropPlan(policy=policy),
            averaging=averaging,
            temperature=temperature,
            max_resident_bytes=max_resident_bytes,
        ),
    )


def made_images(num_images: int) -> list[Tensor]:
    """Images of several shapes, in the memory layout of `decode_image`."""
    sizes = ((40, 55), (61, 38), (36, 36), (33, 90))
    return [
        torch.from_numpy(photo(*sizes[index % len(sizes)], index)).permute(2, 0, 1)
        for index in range(num_images)
    ]


def fill(batch: Mapping[CropGeometry, Tensor], images: Sequence[Tensor], plan: CropPlan) -> None:
    for geometry, images_BSCHW in batch.items():
        for place, image_CHW in enumerate(images):
            cut_slots(image_CHW, geometry, plan, images_BSCHW[place])


@torch.no_grad()
def plain_view_logits(member: Member, image_CHW: Tensor, plan: CropPlan) -> Tensor:
    """The logits_VK of one member on one image, one view at a time."""
    preset = member.options.preset
    slots_SCHW = torch.empty(num_slots(plan), 3, preset.crop_px, preset.crop_px, dtype=torch.uint8)
    cut_slots(image_CHW, geometry_of(preset), plan, slots_SCHW)
    logits = []
    for view in crop_views(plan):
        view_CHW = slots_SCHW[view.slot].flip(-1) if view.mirrored else slots_SCHW[view.slot]
        logits.append(member.network.eval()(normalise(view_CHW[None], preset))[0])
    return torch.stack(logits)


def plain_joint_logits(
    members: Sequence[Member],
    image_CHW: Tensor,
    plan: CropPlan,
    averaging: Averaging = Averaging.PROBABILITIES,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """The joint logits_K by the words of the definition."""
    joint_K = torch.zeros(NUM_CLASSES, dtype=torch.float64)
    for member in members:
        for logits_K in plain_view_logits(member, image_CHW, plan):
            values_K = logits_K.double() / member.options.temperature
            if averaging is Averaging.PROBABILITIES:
                values_K = values_K.softmax(dim=0)
            joint_K += member.options.weight * values_K / len(crop_views(plan))
    if averaging is Averaging.PROBABILITIES:
        joint_K = joint_K.log()
    return (joint_K / temperature).float()
