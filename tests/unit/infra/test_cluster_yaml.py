"""`cluster.yaml` by the checks of Ray's own launcher, and by ours."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from infra_files import INFRA, ROOT


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return loaded


def images_of(cluster: dict[str, Any]) -> list[str]:
    """The images that containers of the head and of workers are made of."""
    sections = [
        cluster["docker"],
        *(group.get("docker", {}) for group in cluster["available_node_types"].values()),
    ]
    return [section[key] for section in sections for key in ("head_image", "worker_image") if key in section]


def test_the_launcher_of_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_the_launcher_of_ray_would_refuse_a_wrong_one(cluster: dict[str, Any]) -> None:
    for damage in ({"max_wrokers": 3}, {"head_node_type": "nobody"}):
        with pytest.raises(Exception, match=r"max_wrokers|head_node_type"):
            validate_config(prepare_config(copy.deepcopy({**cluster, **damage})))


def test_the_provider_has_no_unknown_key(cluster: dict[str, Any]) -> None:
    """Ray does not check these."""
    known = {
        "type",
        "region",
        "availability_zone",
        "cache_stopped_nodes",
        "use_internal_ips",
        "security_group",
    }
    assert set(cluster["provider"]) <= known
    assert cluster["provider"]["use_internal_ips"] is True
    # Inbound rules are the launcher's own: ssh and the group itself. None opens a port of Ray to others.
    assert set(cluster["provider"]["security_group"]) == {"GroupName"}


def test_the_dashboard_listens_on_loopback_and_everything_asks_for_a_token(cluster: dict[str, Any]) -> None:
    head = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in head
    options = cluster["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    assert not any("RAY_AUTH_TOKEN=" in option for option in options)
    assert any(option.startswith("--env RAY_AUTH_TOKEN_PATH=") for option in options)


def test_the_head_runs_no_slices_and_the_groups_fit_the_jobs(cluster: dict[str, Any]) -> None:
    groups = cluster["available_node_types"]
    assert groups["head"]["resources"]["CPU"] == 0
    assert "--num-cpus=0" in " ".join(cluster["head_start_ray_commands"])
    assert "GPU" not in groups["cpu"]["resources"]
    gpu = groups["gpu-spot"]
    assert gpu["resources"]["GPU"] >= 1
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert all(groups[name]["min_workers"] == 0 for name in ("cpu", "gpu-spot"))
    assert sum(group["max_workers"] for group in groups.values()) <= cluster["max_workers"]


def test_machines_have_roles_encrypted_disks_and_no_open_metadata(cluster: dict[str, Any]) -> None:
    for name, group in cluster["available_node_types"].items():
        node = group["node_config"]
        assert node["IamInstanceProfile"]["Name"] == ("convoy-head" if name == "head" else "convoy-worker")
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def run_for_token(cluster: dict[str, Any], folder: Path, *, aws: str) -> subprocess.CompletedProcess[str]:
    """The command that fetches the token, with this for `aws`, and a `sudo` that says that it installs its input."""
    (command,) = [one for one in cluster["initialization_commands"] if "get-parameter" in one]
    for name, script in {"aws": aws, "sudo": 'echo "installed $(cat)"'}.items():
        folder.joinpath(name).write_text(f"#!/bin/sh\n{script}\n")
        folder.joinpath(name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["/bin/sh", "-ec", command], env=environment, capture_output=True, text=True, check=False
    )


def test_a_node_that_gets_no_token_does_not_start(cluster: dict[str, Any], tmp_path: Path) -> None:
    given = run_for_token(cluster, tmp_path, aws="echo abc123")
    assert (given.returncode, given.stdout) == (0, "installed abc123\n")
    for aws in ("exit 254", "true"):
        refused = run_for_token(cluster, tmp_path, aws=aws)
        assert refused.returncode != 0
        assert refused.stdout == ""


def test_nodes_log_in_to_the_registry_of_every_image(cluster: dict[str, Any]) -> None:
    region = cluster["provider"]["region"]
    registries = {image.split("/")[0] for image in images_of(cluster)}
    logins = [one.split() for one in cluster["initialization_commands"] if "docker login" in one]
    assert {login[-1] for login in logins} == registries
    assert all(login[:3] == ["aws", "ecr", "get-login-password"] for login in logins)
    # The aws client of a node has no region of its own.
    asking = [one for one in cluster["initialization_commands"] if re.search(r"\baws (ssm|ecr)", one)]
    assert all(f"--region {region}" in one for one in asking)


def test_machines_are_of_an_image_with_docker_that_the_head_may_look_up(cluster: dict[str, Any]) -> None:
    images = {group["node_config"]["ImageId"] for group in cluster["available_node_types"].values()}
    assert all(one.startswith("resolve:ssm:/aws/service/deeplearning/ami/") for one in images)
    roles = (INFRA / "iam" / "roles.tf").read_text()
    (autoscaler,) = re.findall(r'"autoscaler" \{\n(  statement.*?)\n\}', roles, re.DOTALL)
    assert '"ssm:GetParameters"' in autoscaler
    assert '"arn:aws:ssm:${var.region}::parameter/aws/service/*"' in autoscaler


def test_images_are_pinned_and_nothing_is_installed_at_start(cluster: dict[str, Any]) -> None:
    assert all(
        ":" in image.rsplit("/", 1)[-1] and not image.endswith(":latest") for image in images_of(cluster)
    )
    assert (
        cluster["setup_commands"] == cluster["head_setup_commands"] == cluster["worker_setup_commands"] == []
    )
