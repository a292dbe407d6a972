from __future__ import annotations

from typing import Any

import pytest

from convoy.core.config import parse_config
from convoy.core.errors import ConfigError
from convoy.pipelines.augmentation_effect import AugmentationEffectConfig, named_policies
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.augmentation_strengths import AugmentationKind, Strength, policy_of


def config(**settings: Any) -> AugmentationEffectConfig:
    return parse_config(AugmentationEffectConfig, settings, where="test")


def test_every_kind_at_every_strength_is_measured_and_the_users_own_beside_them() -> None:
    policies = named_policies(config(policies={"mine": "standard"}), crop_px=32)
    assert len(policies) == len(AugmentationKind) * len(Strength) + 1
    assert policies[-1].policy == AugmentationPolicy.ready("standard")
    some = named_policies(config(kinds=["mirror", "grey"], strengths=["medium"]), crop_px=32)
    assert [str(policy) for policy in some] == ["mirror (medium)", "grey (medium)"]
    assert some[0].policy == policy_of(AugmentationKind.MIRROR, Strength.MEDIUM, crop_px=32)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"head": {"kind": "mlp"}}, "probes are linear"),
        ({"kinds": []}, "nothing to measure"),
        ({"policies": {"mirror": "light"}}, "'mirror' cannot name a policy"),
        ({"policies": {"My policy": "light"}}, "'My policy' cannot name a policy"),
        ({"kinds": ["mirrored"]}, "kinds"),
        ({"strengths": []}, "strengths"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**settings)
