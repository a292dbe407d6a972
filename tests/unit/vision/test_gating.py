from __future__ import annotations

import pytest
import torch

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy
from convoy.core.errors import ConfigError
from convoy.vision.committee import Committee
from convoy.vision.committee_options import GateLook, GateOptions, GateStage, gate_costs, gate_passes
from convoy.vision.gating import GatedCommittee, GatedRows
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

SECOND = GateLook(members=(0, 1), policy=CropPolicy.FLIP, threshold=2.0)


def gate(
    threshold: float, *, policy: CropPolicy = CropPolicy.FLIP, members: tuple[int, ...] = (0,)
) -> GateOptions:
    return GateOptions(members=members, policy=policy, threshold=threshold)


def run_all(gated: GatedCommittee, num_images: int = NUM_IMAGES) -> list[GatedRows]:
    """All images through the gate in batches of four, the last one partial, and a flush at the end."""
    images, finished = made_images(num_images), []
    batch = gated._committee.new_batch()
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
    batch = gated._committee.new_batch()
    fill(batch, made_images(4), TEN)
    assert gated.run(batch, [0, 1, 2]) == []
    (full,) = gated.run(batch, [10, 11, 12, 13])
    assert full.rows == (0, 1, 2, 10)
    assert torch.allclose(full.logits_BK[0], full.logits_BK[3], **CLOSE)
    (rest,) = gated.flush()
    assert rest.rows == (11, 12, 13)
    assert len(rest.logits_BK) == 3
    assert gated.flush() == []


def test_rows_that_were_forgotten_are_in_no_later_output() -> None:
    gated = GatedCommittee(made_committee(three_members()), gate(1.0))
    batch = gated._committee.new_batch()
    fill(batch, made_images(4), TEN)
    assert gated.run(batch, [0, 1, 2]) == []
    gated.forget()
    assert gated.flush() == []
    assert gated.run(batch, [10, 11]) == []
    (rest,) = gated.flush()
    assert rest.rows == (10, 11)


def test_places_without_an_image_are_left_out() -> None:
    gated = GatedCommittee(made_committee(three_members()), gate(0.0))
    batch = gated._committee.new_batch()
    fill(batch, made_images(4), TEN)
    (rows,) = gated.run(batch, [7, None, 9, None])
    assert rows.rows == (7, 9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (gate(2.0, policy=CropPolicy.FIVE, members=(0, 2)), [10, 30]),
        (gate(2.0, policy=CropPolicy.FLIP).model_copy(update={"then": (SECOND,)}), [2, 4, 30]),
    ],
)
def test_passes_are_those_that_run_and_none_is_repeated(options: GateOptions, expected: list[int]) -> None:
    members = three_members()
    seen: list[int] = []
    for member in members:
        member.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    gated = GatedCommittee(made_committee(members), options)
    batch = gated._committee.new_batch()
    fill(batch, made_images(4), TEN)
    assert len(gated.run(batch, range(4))) == 1
    assert list(gate_passes(options, TEN, 3).values()) == expected
    assert seen == [4] * 30


@pytest.mark.parametrize("averaging", Averaging)
def test_rows_go_from_look_to_look_until_one_is_sure(averaging: Averaging) -> None:
    committee = made_committee(three_members(), averaging=averaging, temperature=1.4)
    looks = [gate(0.0), GateOptions.model_validate(SECOND.model_dump()), *([gate(0.0, members=(0, 1, 2))])]
    thresholds = [median_confidence(committee, look) for look in looks]
    first, *then = (
        look.model_copy(update={"threshold": threshold})
        for look, threshold in zip(looks, thresholds, strict=True)
    )
    further = tuple(GateLook(**look.model_dump(exclude={"then"})) for look in then)
    finished = run_all(GatedCommittee(committee, first.model_copy(update={"then": further})))
    rows = {stage: by_row(finished, stage) for stage in GateStage}
    assert sorted(row for of_stage in rows.values() for row in of_stage) == list(range(NUM_IMAGES))
    assert all(rows[stage] for stage in (GateStage.FIRST_LOOK, GateStage.SECOND_LOOK, GateStage.COMMITTEE))
    for look, stage in zip(looks, GateStage, strict=False):
        alone = by_row(
            run_all(GatedCommittee(committee, look.model_copy(update={"threshold": 0.0}))),
            GateStage.FIRST_LOOK,
        )
        for row, logits_K in rows[stage].items():
            assert torch.allclose(logits_K, alone[row], **CLOSE)
    for row, logits_K in rows[GateStage.COMMITTEE].items():
        image = made_images(NUM_IMAGES)[row]
        exact_K = plain_joint_logits(three_members(), image, TEN, averaging, temperature=1.4)
        assert torch.allclose(logits_K, exact_K, **CLOSE)


@pytest.mark.parametrize(
    "later",
    [
        GateLook(members=(1, 2), policy=CropPolicy.FLIP, threshold=0.5),
        GateLook(members=(0, 1), policy=CropPolicy.CENTER, threshold=0.5),
    ],
)
def test_a_look_that_forgets_what_was_seen_is_refused(later: GateLook) -> None:
    with pytest.raises(ConfigError, match="leaves out"):
        gate_passes(gate(0.5).model_copy(update={"then": (later,)}), TEN, 3)


def test_a_gate_that_is_the_committee_itself_adds_no_pass() -> None:
    committee = made_committee([made_member(0, weight=1.0)])
    options = gate(1.0, policy=CropPolicy.TEN)
    gated = GatedCommittee(committee, options)
    assert set(gate_passes(options, TEN, 1).values()) == {10}
    batch = gated._committee.new_batch()
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


def test_an_image_costs_what_the_members_cost_that_looked_at_it() -> None:
    second = GateLook(members=(2, 0), policy=CropPolicy.FLIP, threshold=0.9)
    options = GateOptions(members=(2,), policy=CropPolicy.CENTER, threshold=0.5, then=(second,))
    assert gate_costs(options, TEN, [10, 100, 1000]) == {
        GateStage.FIRST_LOOK: 1000,
        GateStage.SECOND_LOOK: 2 * 1010,
        GateStage.COMMITTEE: 10 * 1110,
    }
