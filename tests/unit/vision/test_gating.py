from __future__ import annotations

import pytest
import torch

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy
from convoy.core.errors import ConfigError
from convoy.vision.committee import Committee
from convoy.vision.committee_options import GateOptions
from convoy.vision.gating import GatedCommittee, GatedRows, GateStage
from made_committees import (
    fill,
    made_committee,
    made_images,
    made_member,
    plain_joint_logits,
    three_members,
)

NUM_IMAGES = 14
TEN = CropPlan(policy=CropPolicy.TEN)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def gate(
    threshold: float, *, policy: CropPolicy = CropPolicy.FLIP, members: tuple[int, ...] = (0,)
) -> GateOptions:
    return GateOptions(members=members, policy=policy, threshold=threshold)


def run_all(gated: GatedCommittee, num_images: int = NUM_IMAGES) -> list[GatedRows]:
    """All images through the gate in batches of four, the last one partial, and a flush at the end."""
    images, finished = made_images(num_images), []
    batch = gated.new_batch()
    for start in range(0, num_images, 4):
        chosen = images[start : start + 4]
        fill(batch, chosen, TEN)
        finished.extend(gated.run(batch, range(start, start + len(chosen))))
    return [*finished, *gated.flush()]


def by_row(finished: list[GatedRows], stage: GateStage) -> dict[int, torch.Tensor]:
    return {
        row: logits_K
        for rows in finished
        if rows.stage is stage
        for row, logits_K in zip(rows.rows, rows.logits_BK, strict=True)
    }


def median_confidence(committee: Committee, options: GateOptions) -> float:
    everything_sure = GatedCommittee(committee, options.model_copy(update={"threshold": 0.0}))
    logits = by_row(run_all(everything_sure), GateStage.FIRST_LOOK)
    return float(torch.stack(list(logits.values())).softmax(dim=1).amax(dim=1).median())


@pytest.mark.parametrize("averaging", Averaging)
@pytest.mark.parametrize("members", [(0,), (2, 0)])
def test_easy_rows_are_the_first_looks_and_hard_ones_the_committees(
    members: tuple[int, ...], averaging: Averaging
) -> None:
    committee = made_committee(three_members(), averaging=averaging, temperature=1.4)
    threshold = median_confidence(committee, gate(0, members=members))
    finished = run_all(GatedCommittee(committee, gate(threshold, members=members)))
    easy, hard = by_row(finished, GateStage.FIRST_LOOK), by_row(finished, GateStage.COMMITTEE)
    assert easy
    assert hard
    assert sorted([*easy, *hard]) == list(range(NUM_IMAGES))
    seen = [three_members()[index] for index in members]
    total = sum(member.options.weight for member in seen)
    first_look = [
        made_member(
            index,
            member.options.preset,
            weight=member.options.weight / total,
            temperature=member.options.temperature,
        )
        for index, member in zip(members, seen, strict=True)
    ]
    for row, image in enumerate(made_images(NUM_IMAGES)):
        first_K = plain_joint_logits(first_look, image, CropPlan(policy=CropPolicy.FLIP), averaging)
        if row in easy:
            assert torch.allclose(easy[row], first_K, **CLOSE)
            assert first_K.softmax(dim=0).max() > threshold - 1e-4
        else:
            exact_K = plain_joint_logits(three_members(), image, TEN, averaging, temperature=1.4)
            assert torch.allclose(hard[row], exact_K, **CLOSE)
            assert first_K.softmax(dim=0).max() < threshold + 1e-4


def test_a_threshold_of_zero_believes_every_first_look() -> None:
    finished = run_all(GatedCommittee(made_committee(three_members()), gate(0.0)))
    assert len(by_row(finished, GateStage.FIRST_LOOK)) == NUM_IMAGES


def test_a_threshold_above_every_confidence_is_the_exact_committee() -> None:
    committee = made_committee(three_members())
    hard = by_row(run_all(GatedCommittee(committee, gate(1.0))), GateStage.COMMITTEE)
    assert len(hard) == NUM_IMAGES
    batch = committee.new_batch()
    fill(batch, made_images(4), TEN)
    exact = committee.run(batch).logits_BK
    assert torch.allclose(torch.stack([hard[row] for row in range(4)]), exact, **CLOSE)


def test_hard_rows_wait_until_there_is_a_batch_of_them_or_a_flush() -> None:
    gated = GatedCommittee(made_committee(three_members()), gate(1.0))
    batch = gated.new_batch()
    fill(batch, made_images(4), TEN)
    assert gated.run(batch, [0, 1, 2]) == []
    (full,) = gated.run(batch, [10, 11, 12, 13])
    assert full.rows == (0, 1, 2, 10)
    assert torch.allclose(full.logits_BK[0], full.logits_BK[3], **CLOSE)
    (rest,) = gated.flush()
    assert rest.rows == (11, 12, 13)
    assert len(rest.logits_BK) == 3
    assert gated.flush() == []


def test_places_without_an_image_are_left_out() -> None:
    gated = GatedCommittee(made_committee(three_members()), gate(0.0))
    batch = gated.new_batch()
    fill(batch, made_images(4), TEN)
    (rows,) = gated.run(batch, [7, None, 9, None])
    assert rows.rows == (7, 9)


def test_passes_are_those_that_run_and_none_is_repeated() -> None:
    members = three_members()
    passes = [0, 0, 0]

    def count(member: int, images_BCHW: torch.Tensor) -> None:
        passes[member] += len(images_BCHW)

    for index, member in enumerate(members):
        member.network.register_forward_pre_hook(lambda _, inputs, index=index: count(index, inputs[0]))
    gated = GatedCommittee(made_committee(members), gate(1.0, policy=CropPolicy.FIVE, members=(0, 2)))
    batch = gated.new_batch()
    fill(batch, made_images(4), TEN)
    assert len(gated.run(batch, range(4))) == 1
    assert (gated.first_look_passes, gated.committee_passes) == (10, 20)
    assert passes == [40, 40, 40]


def test_a_gate_that_is_the_committee_itself_adds_no_pass() -> None:
    committee = made_committee([made_member(0, weight=1.0)])
    gated = GatedCommittee(committee, gate(1.0, policy=CropPolicy.TEN))
    assert gated.committee_passes == 0
    batch = gated.new_batch()
    fill(batch, made_images(4), TEN)
    (rows,) = gated.run(batch, range(4))
    assert torch.allclose(rows.logits_BK, committee.run(batch).logits_BK, **CLOSE)


@pytest.mark.parametrize(("policy", "members"), [("multiscale", (0,)), ("ten", (3,)), ("ten", (1, 1))])
def test_a_first_look_that_the_committee_cannot_take_is_refused(
    policy: str, members: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError):
        GatedCommittee(made_committee(three_members()), gate(0.5, policy=CropPolicy(policy), members=members))


def test_a_gate_needs_all_members_on_the_device() -> None:
    committee = made_committee(three_members(), max_resident_bytes=1)
    with pytest.raises(ConfigError, match="together"):
        GatedCommittee(committee, gate(0.5))
