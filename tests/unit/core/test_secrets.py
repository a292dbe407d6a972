from __future__ import annotations

import pytest

from convoy.core.secrets import find_secrets

ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": "wJalr/K7MDENG+bPxRfiCY",
    "RAY_AUTH_TOKEN_PATH": "/run/convoy/ray-auth-token",
    "SHORT_TOKEN": "auto",
    "HOME": "/home/somebody",
}


@pytest.mark.parametrize(
    "value",
    [
        "AKIA" + "Q" * 16,
        "https://bucket.s3.amazonaws.com/a.jpg?X-Amz-Algorithm=AWS4&X-Amz-Signature=0f",
        "https://account.blob.example.com/a.jpg?sv=2024&sig=abc",
        "-----BEGIN RSA PRIVATE KEY-----\nMII",
        "s3://key:word@bucket/prefix",
        "ghp_" + "a" * 36,
        "hf_" + "b" * 34,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.x",
    ],
)
def test_the_forms_of_secrets_are_found_under_any_key(value: str) -> None:
    (found,) = find_secrets({"reading": {"uri": value}}, {})
    assert found == "reading.uri: has the form of a secret"


def test_the_value_of_a_secret_variable_is_found_wherever_it_stands() -> None:
    secret = ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]
    (found,) = find_secrets({"members": [{"bundle": "a"}, {"bundle": f"x{secret}x"}]}, ENVIRONMENT)
    assert found == "members.1.bundle: has the value of the variable AWS_SECRET_ACCESS_KEY"
    assert secret not in found


def test_a_secret_may_look_like_a_path() -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": "/Jalr/K7MDENG+bPxRfiCY"}
    assert find_secrets({"name": environment["AWS_SECRET_ACCESS_KEY"]}, environment)


@pytest.mark.parametrize("key", ["password", "api_key", "hf_token", "AWS_SECRET_ACCESS_KEY", "credentials"])
def test_keys_that_name_secrets_may_have_no_value(key: str) -> None:
    assert find_secrets({"tracking": {key: "anything"}}, {}) == [f"tracking.{key}: has the name of a secret"]
    assert find_secrets({"tracking": {key: None, "other": ""}}, {}) == []


def test_ordinary_settings_are_no_secrets() -> None:
    settings = {
        "workspace": "s3://my-bucket/convoy",
        "backbone": {
            "arch": "torchvision:resnet50",
            "weights": "https://download.example.com/a-0676ba61.pth?x=1",
        },
        "tracking": {"uri": "http://mlflow:5000"},
        "tokens_per_image": 16,
        "mode": "auto",
        "path": ENVIRONMENT["RAY_AUTH_TOKEN_PATH"],
        "digest": "9f86d081884c7d659a2feaa0c55ad015",
    }
    assert find_secrets(settings, ENVIRONMENT) == []
