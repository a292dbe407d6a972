from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy, MemberOutputs, crop_views
from convoy.core.errors import ConfigError
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.committee import Committee, CommitteeOutput, check_input_size
from convoy.vision.committee_options import CommitteeOptions
from convoy.vision.engine_options import Precision
from convoy.vision.presets import EvalPreset, dense_preset, geometry_of
from made_committees import (
    GREY,
    NUM_CLASSES,
    PLAIN,
    SMALLER,
    fill,
    made_committee,
    made_images,
    made_member,
    plain_joint_logits,
    plain_view_logits,
    three_members,
)

FLIP = CropPlan(policy=CropPolicy.FLIP)
TEN = CropPlan(policy=CropPolicy.TEN)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def run(committee: Committee, num_images: int, keep: MemberOutputs = MemberOutputs.NONE) -> CommitteeOutput:
    batch = committee.new_batch()
    fill(batch, made_images(num_images), committee.options.plan)
    return committee.run(batch, keep)


@pytest.mark.parametrize("averaging", Averaging)
@pytest.mark.parametrize("policy", [CropPolicy.CENTER, CropPolicy.FLIP, CropPolicy.TEN])
def test_joint_logits_are_those_of_a_plain_loop(policy: CropPolicy, averaging: Averaging) -> None:
    members = three_members()
    committee = made_committee(members, policy, averaging, temperature=1.3)
    expected = torch.stack(
        [
            plain_joint_logits(members, image, CropPlan(policy=policy), averaging, temperature=1.3)
            for image in made_images(4)
        ]
    )
    assert torch.allclose(run(committee, 4).logits_BK, expected, **CLOSE)


def test_multiscale_is_that_of_a_plain_loop() -> None:
    members = [made_member(0, weight=1.0)]
    plan = CropPlan(policy=CropPolicy.MULTISCALE)
    committee = made_committee(members, CropPolicy.MULTISCALE, batch_size=1)
    (image,) = made_images(1)
    assert torch.allclose(run(committee, 1).logits_BK[0], plain_joint_logits(members, image, plan), **CLOSE)


def test_averaged_probabilities_are_log_probabilities_and_logits_are_not() -> None:
    members = three_members()
    sums = [
        run(made_committee(members, CropPolicy.FLIP, averaging), 4).logits_BK.exp().sum(dim=1)
        for averaging in (Averaging.PROBABILITIES, Averaging.LOGITS)
    ]
    assert torch.allclose(sums[0], torch.ones(4))
    assert not torch.allclose(sums[1], torch.ones(4), atol=0.1)


def test_weights_and_temperatures_matter() -> None:
    members = three_members()
    plain = run(made_committee(members, CropPolicy.FLIP), 4).logits_BK
    for changes in ({"temperature": 3.0}, {"precision": Precision.BF16}):
        options = members[0].options.model_copy(update=changes)
        changed = [dataclasses.replace(members[0], options=options), *members[1:]]
        assert not torch.allclose(
            run(made_committee(changed, CropPolicy.FLIP), 4).logits_BK, plain, atol=1e-5
        )


def test_a_class_that_no_view_believes_in_keeps_finite_logits() -> None:
    member = made_member(0, weight=1.0)
    nn.init.constant_(member.network.get_submodule("linear").bias[0], 5000.0)
    logits = run(made_committee([member], CropPolicy.FLIP), 4).logits_BK
    assert torch.isfinite(logits).all()
    assert (logits.argmax(dim=1) == 0).all()


def test_presets_of_one_geometry_share_their_crops() -> None:
    committee = made_committee(three_members(), CropPolicy.TEN)
    assert committee.geometries == (geometry_of(PLAIN), geometry_of(SMALLER))
    assert geometry_of(PLAIN) == geometry_of(GREY)
    batch = committee.new_batch()
    assert {images.shape for images in batch.values()} == {(4, 6, 3, 32, 32), (4, 6, 3, 24, 24)}


def test_each_slot_of_a_batch_is_one_channels_last_block() -> None:
    (images_BSCHW,) = made_committee([made_member(0, weight=1.0)]).new_batch().values()
    assert images_BSCHW[:, 2].is_contiguous(memory_format=torch.channels_last)


def test_rows_do_not_depend_on_what_else_is_in_the_batch() -> None:
    committee = made_committee(three_members(), CropPolicy.TEN)
    full = run(committee, 4).logits_BK
    batch = committee.new_batch()
    fill(batch, made_images(4), TEN)
    fill(batch, made_images(3)[::-1], TEN)
    partial = committee.run(batch).logits_BK
    assert torch.allclose(partial[:3].flip(0), full[:3], **CLOSE)
    assert torch.allclose(partial[3], full[3], **CLOSE)


@pytest.mark.parametrize("averaging", Averaging)
def test_turns_give_what_all_members_together_give(averaging: Averaging) -> None:
    members = three_members()
    together = run(made_committee(members, averaging=averaging), 4, MemberOutputs.VIEWS)
    turned = made_committee(members, averaging=averaging, max_resident_bytes=1)
    assert turned.turns() == ((0,), (1,), (2,))
    batch = turned.new_batch()
    fill(batch, made_images(4), TEN)
    parts = [turned.run_turn(batch, turn, MemberOutputs.VIEWS) for turn in turned.turns()]
    for output in (turned.join(parts), turned.run(batch, MemberOutputs.VIEWS)):
        for name in ("logits_BK", "member_logits_MBK", "view_logits_MVBK"):
            assert torch.equal(getattr(output, name), getattr(together, name)), name


def test_members_share_turns_as_far_as_their_bytes_allow() -> None:
    members = three_members()
    num_bytes = sum(
        tensor.nbytes for tensor in (*members[0].network.parameters(), *members[0].network.buffers())
    )
    assert made_committee(members).turns() == ((0, 1, 2),)
    assert made_committee(members, max_resident_bytes=2 * num_bytes).turns() == ((0, 1), (2,))
    assert made_committee(members, max_resident_bytes=3 * num_bytes).turns() == ((0, 1, 2),)


def test_view_outputs_are_the_logits_of_each_network_on_each_view() -> None:
    members = three_members()
    output = run(made_committee(members, CropPolicy.TEN), 4, MemberOutputs.VIEWS)
    assert output.view_logits_MVBK is not None
    assert output.view_logits_MVBK.shape == (3, 10, 4, NUM_CLASSES)
    for index, member in enumerate(members):
        expected = torch.stack([plain_view_logits(member, image, TEN) for image in made_images(4)], dim=1)
        assert torch.allclose(output.view_logits_MVBK[index], expected, **CLOSE)


@pytest.mark.parametrize("averaging", Averaging)
def test_member_outputs_are_those_of_the_member_alone(averaging: Averaging) -> None:
    members = three_members()
    output = run(made_committee(members, CropPolicy.FLIP, averaging), 4, MemberOutputs.MEMBERS)
    assert output.view_logits_MVBK is None
    assert output.member_logits_MBK is not None
    for index, member in enumerate(members):
        alone = dataclasses.replace(member, options=member.options.model_copy(update={"weight": 1.0}))
        joint = run(made_committee([alone], CropPolicy.FLIP, averaging), 4)
        assert torch.allclose(output.member_logits_MBK[index], joint.logits_BK, **CLOSE)


def test_nothing_is_kept_unless_asked_for() -> None:
    output = run(made_committee(three_members(), CropPolicy.FLIP), 4)
    assert output.member_logits_MBK is None
    assert output.view_logits_MVBK is None


def test_every_pass_takes_one_batch_of_images_whatever_the_crops() -> None:
    member = made_member(0, weight=1.0)
    sizes: list[tuple[int, ...]] = []
    member.network.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    run(made_committee([member], CropPolicy.TEN), 3)
    assert sizes == [(4, 3, 32, 32)] * len(crop_views(TEN))


@pytest.mark.parametrize("weights", [(), (0.5, 0.4), (0.7, 0.7)])
def test_weights_that_do_not_sum_to_one_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError):
        made_committee([made_member(seed, weight=weight) for seed, weight in enumerate(weights)])


def test_dense_evaluation_of_a_network_that_takes_any_size() -> None:
    member = made_member(0, weight=1.0)
    dense = member.options.model_copy(update={"preset": dense_preset(PLAIN)})
    check_input_size(member.network, dense.preset)
    committee = made_committee([dataclasses.replace(member, options=dense)], CropPolicy.FLIP)
    assert committee.new_batch()[geometry_of(dense.preset)].shape == (4, 2, 3, 36, 36)
    expected = plain_joint_logits([dataclasses.replace(member, options=dense)], made_images(1)[0], FLIP)
    assert torch.allclose(run(committee, 1).logits_BK[0], expected, **CLOSE)


def test_a_network_of_one_size_says_why_it_cannot_be_dense() -> None:
    network = build_network(BackboneConfig(arch="lenet5"))
    check_input_size(network, EvalPreset(resize_px=32, crop_px=32))
    with pytest.raises(ConfigError, match="does not take images of 40 pixels"):
        check_input_size(network, EvalPreset(resize_px=40, crop_px=40))


@pytest.mark.slow
def test_a_compiled_committee_gives_the_same_and_compiles_each_network_once() -> None:
    from torch._dynamo.utils import counters  # noqa: PLC0415

    members = three_members()[:2]
    weights = (0.625, 0.375)
    members = [
        dataclasses.replace(member, options=member.options.model_copy(update={"weight": weight}))
        for member, weight in zip(members, weights, strict=True)
    ]
    eager = run(made_committee(members), 4).logits_BK
    options = CommitteeOptions(batch_size=4, compiled=True, num_threads=1, plan=TEN)
    counters.clear()
    compiled = Committee(members, options)
    compiled.warm_up()
    assert torch.allclose(run(compiled, 4).logits_BK, eager, **CLOSE)
    assert counters["stats"]["unique_graphs"] == len(members)
