"""The manifests of Kubernetes: the fields that KubeRay 1.7 knows, the rules of its controller, and ours."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer import Typer
from typer.main import get_command

from convoy.cli.main import app
from convoy.cli.submit import submit_app
from convoy.cluster.growth import CPUS_VARIABLE, GPUS_VARIABLE
from convoy.cluster.submission import Submission
from convoy.core.config import read_settings
from convoy.core.errors import ConfigError
from convoy.core.secrets import find_secrets
from convoy.pipelines.submit import JobRequest, Verb, plan_submission
from infra_files import INFRA, ROOT, documents, locked_version, manifests, nodes

# The fields of the three kinds that we use or could: a name that is not here is a typing error. From the CRDs of 1.7.0.
CLUSTER_FIELDS = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
    "gcsFaultToleranceOptions", "upgradeStrategy", "networkPolicy", "tlsOptions", "headServiceAnnotations", "suspend",
    "managedBy", "historyServerOptions",
}  # fmt: skip
JOB_FIELDS = {
    "entrypoint", "runtimeEnvYAML", "rayClusterSpec", "clusterSelector", "submissionMode", "submitterPodTemplate",
    "submitterConfig", "backoffLimit", "activeDeadlineSeconds", "preRunningDeadlineSeconds", "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished", "deletionStrategy", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources",
    "metadata", "jobId", "suspend", "managedBy",
}  # fmt: skip
CRON_JOB_FIELDS = {"schedule", "jobTemplate", "timeZone", "suspend"}
HEAD_FIELDS = {
    "rayStartParams",
    "template",
    "serviceType",
    "headService",
    "enableIngress",
    "resources",
    "labels",
}
WORKER_FIELDS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template", "resources",
    "labels", "idleTimeoutSeconds", "suspend", "scaleStrategy",
}  # fmt: skip
AUTOSCALER_FIELDS = {
    "version", "idleTimeoutSeconds", "upscalingMode", "resources", "image", "imagePullPolicy", "env", "envFrom",
    "securityContext", "volumeMounts",
}  # fmt: skip
NAME_LIMITS = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [one for _, one in manifests() if one["kind"] == kind]


def jobs() -> list[dict[str, Any]]:
    return [job["spec"] for job in of_kind("RayJob")] + [
        cron["spec"]["jobTemplate"] for cron in of_kind("RayCronJob")
    ]


def clusters() -> list[dict[str, Any]]:
    return [cluster["spec"] for cluster in of_kind("RayCluster")] + [job["rayClusterSpec"] for job in jobs()]


def pods() -> Iterator[dict[str, Any]]:
    for _, manifest in manifests():
        yield from (
            node["template"]
            for node in nodes(manifest)
            if "containers" in node.get("template", {}).get("spec", {})
        )


def test_all_kinds_are_there() -> None:
    kinds = {manifest["kind"] for _, manifest in manifests()}
    assert {*NAME_LIMITS, "CronJob", "Namespace", "NetworkPolicy", "ServiceAccount"} == kinds


def test_all_live_in_a_namespace_that_the_first_step_makes() -> None:
    ((file, made),) = [(name, one) for name, one in manifests() if one["kind"] == "Namespace"]
    places = [one["metadata"].get("namespace") for _, one in manifests() if one["kind"] != "Namespace"]
    assert set(places) == {made["metadata"]["name"]}
    page = (INFRA / "README.md").read_text(encoding="utf-8")
    first = re.findall(r"`kubectl (\w+) -f (\S+)", page)[0]
    assert first == ("apply", f"infra/kuberay/{file}")
    # A file is applied from its top.
    assert documents("kuberay", file)[0] == made
    assert page.index(f"infra/kuberay/{file}") < page.index("kuberay/token-secret.md`, in that namespace")


def test_only_fields_that_kuberay_knows_are_used() -> None:
    for job in jobs():
        assert set(job) <= JOB_FIELDS
    for cron in of_kind("RayCronJob"):
        assert set(cron["spec"]) <= CRON_JOB_FIELDS
    for cluster in clusters():
        assert set(cluster) <= CLUSTER_FIELDS
        assert set(cluster["headGroupSpec"]) <= HEAD_FIELDS
        assert set(cluster["autoscalerOptions"]) <= AUTOSCALER_FIELDS
        assert all(set(group) <= WORKER_FIELDS for group in cluster["workerGroupSpecs"])
        params = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        assert all(isinstance(value, str) for group in params for value in group["rayStartParams"].values())


@pytest.mark.skipif("CONVOY_KUBERAY_CRDS" not in os.environ, reason="names the folder of KubeRay's CRDs")
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayCronJob"])
def test_the_schemas_of_kuberay_made_strict_accept_them(kind: str) -> None:
    path = Path(os.environ["CONVOY_KUBERAY_CRDS"], f"ray.io_{kind.lower()}s.yaml")
    versions = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]["versions"]
    schema = next(one for one in versions if one["name"] == "v1")["schema"]["openAPIV3Schema"]
    for node in nodes(schema):
        if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        if node.get("x-kubernetes-int-or-string"):
            node.pop("type", None)
    schema["properties"]["metadata"] = {"type": "object"}
    for manifest in of_kind(kind):
        jsonschema.Draft202012Validator(schema).validate(manifest)


def test_names_are_as_short_as_the_controller_wants_them() -> None:
    for kind, limit in NAME_LIMITS.items():
        for manifest in of_kind(kind):
            assert len(manifest["metadata"]["name"]) <= limit
            assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])


def test_clusters_keep_the_rules_of_the_controller() -> None:
    for cluster in clusters():
        assert cluster["rayVersion"] == locked_version("ray")
        assert cluster["authOptions"] == {"mode": "token", "secretName": "convoy-ray-token"}
        assert cluster["enableInTreeAutoscaling"] is True
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        assert all("resources" not in group and "labels" not in group["rayStartParams"] for group in groups)
        # Autoscaler v2, and the submitter beside the head, ask for this.
        assert all(group["template"]["spec"]["restartPolicy"] == "Never" for group in groups)
        assert all(0 <= group["minReplicas"] <= group["maxReplicas"] for group in cluster["workerGroupSpecs"])


def test_jobs_keep_the_rules_of_the_controller() -> None:
    for job in jobs():
        assert job["submissionMode"] in SUBMISSION_MODES
        if job["submissionMode"] == "SidecarMode":
            assert not {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & set(job)
        assert job["shutdownAfterJobFinishes"] is True
        assert job["ttlSecondsAfterFinished"] > 0
        assert "deletionStrategy" not in job
        assert "backoffLimit" in job
        assert job["activeDeadlineSeconds"] > 0


def test_entrypoints_name_jobs_that_exist() -> None:
    for job in jobs():
        assert (ROOT / shlex.split(job["entrypoint"])[1]).is_file()
    (cron,) = of_kind("CronJob")
    job = cron["spec"]["jobTemplate"]["spec"]
    (line,) = job["template"]["spec"]["containers"][0]["args"]
    words = shlex.split(line)
    assert words[1:4] == ["convoy", "submit", "score"]
    attempt = words.index("--attempt")
    assert words[attempt + 1] == "$JOB_NAME"
    tries = words.index("--tries")
    assert int(words[tries + 1]) == 1 + job["backoffLimit"], "each pod must have a try to send"
    assert planned("score", words[4:], submit_app)


def planned(verb: str, words: list[str], commands: Typer = app) -> Submission:
    """The submission of what `convoy VERB` is told by these words: settings that do not fit the job raise."""
    group: Any = get_command(commands)
    with group.commands[verb].make_context(verb, words) as context:
        path, overrides, workspace = (context.params[key] for key in ("config", "overrides", "workspace"))
    settings = read_settings(path and str(ROOT / path), [*(overrides or []), f"workspace={workspace}"])
    return plan_submission(JobRequest(verb=Verb(verb), settings=settings))


def test_jobs_take_the_settings_of_their_entrypoints() -> None:
    for job in jobs():
        _, script, *words = shlex.split(job["entrypoint"])
        verb = Path(script).stem
        assert planned(verb, words).metadata["verb"] == job["metadata"]["verb"] == verb


def test_scheduled_scorings_take_the_champion_and_not_what_was_written_last() -> None:
    files = [*INFRA.glob("kuberay/*.yaml"), *INFRA.glob("cron/*"), ROOT / "README.md", *INFRA.glob("*.md")]
    bundles = [one for path in files for one in re.findall(r"\bbundle[=:] ?([\w@-]+)", path.read_text())]
    assert len(bundles) >= 3
    assert all(one.endswith("@champion") for one in bundles)


def test_scheduled_scorings_ask_for_the_gpus_that_they_need() -> None:
    files = [*INFRA.glob("cron/*"), INFRA / "README.md"]
    commands = [
        one for path in files for one in re.findall(r"convoy submit score .*?--json", path.read_text(), re.S)
    ]
    assert len(commands) == 4
    assert all("--gpus 2 " in one for one in commands)


def test_an_entrypoint_without_a_setting_or_with_an_unknown_one_would_be_found() -> None:
    workspace = ["--workspace", "s3://convoy-example/workspace"]
    with pytest.raises(ConfigError, match="backbone"):
        planned("cache", [*workspace, "--set", "dataset=photos"])
    with pytest.raises(ConfigError, match="bundel"):
        planned("score", [*workspace, "--set", "dataset=photos", "--set", "bundel=photos"])


def test_a_cron_job_keeps_from_overlapping_and_tries_nothing_again_in_vain() -> None:
    (cron,) = of_kind("CronJob")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    (final, disruption) = cron["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert (final["action"], final["onExitCodes"]["values"]) == ("FailJob", [2, 3, 5, 6])
    assert disruption["action"] == "Ignore"


def test_pods_of_a_night_share_an_attempt_whenever_they_start() -> None:
    (cron,) = of_kind("CronJob")
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert "$(" not in container["args"][0], "each pod would evaluate it anew"
    (name,) = [one for one in container["env"] if one["name"] == "JOB_NAME"]
    # Kubernetes puts this label on the pods of a Job.
    assert name["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"


def test_pods_run_without_rights() -> None:
    found = list(pods())
    assert len(found) == 3 * 3 + 1
    accounts = {account["metadata"]["name"] for account in of_kind("ServiceAccount")}
    for pod in found:
        spec = pod["spec"]
        assert spec["serviceAccountName"] in accounts
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] != 0
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not any("hostPath" in volume for volume in spec["volumes"])
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            assert re.search(r":\d+\.\d+\.\d+", container["image"])


def test_the_object_store_of_ray_fits_its_shared_memory() -> None:
    """Where it does not, Ray puts it on the disk of the node."""
    for cluster in clusters():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            volumes = {one["name"]: one for one in group["template"]["spec"]["volumes"]}
            size = volumes["shm"]["emptyDir"]["sizeLimit"]
            assert size.endswith("Gi")
            most_bytes = 0.95 * int(size.removesuffix("Gi")) * 2**30
            assert int(group["rayStartParams"]["object-store-memory"]) <= most_bytes


def test_jobs_on_clusters_that_shrink_to_their_head_say_what_they_wait_for() -> None:
    for cluster in clusters():
        assert all(group["minReplicas"] == 0 for group in cluster["workerGroupSpecs"])
        (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        wanted = {one["name"]: int(one["value"]) for one in head["env"]}
        assert wanted.keys() == {CPUS_VARIABLE, GPUS_VARIABLE}
        assert wanted[CPUS_VARIABLE] > 0


def test_network_policies_leave_ray_to_its_own() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods()]
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind("NetworkPolicy")}
    for policy in policies.values():
        wanted = policy["podSelector"]["matchLabels"].items()
        assert wanted
        assert any(wanted <= one.items() for one in labels)
    for rule in policies["convoy-ray"]["ingress"]:
        assert rule["from"]
        assert all("ipBlock" not in peer for peer in rule["from"])
        if "ports" in rule:
            assert {port["port"] for port in rule["ports"]} <= {8265, 8080}
    assert "Egress" in policies["convoy-submit"]["policyTypes"]
    components = {one["app.kubernetes.io/component"] for one in labels}
    assert components == {"ray", "submit"}


def test_no_file_holds_a_secret() -> None:
    for name, manifest in manifests():
        assert manifest["kind"] != "Secret", name
        env = [entry for node in nodes(manifest) for entry in node.get("env", []) if "TOKEN" in entry["name"]]
        assert all("value" not in entry and "secretKeyRef" in entry["valueFrom"] for entry in env)
        plain = [value for node in nodes(manifest) for value in node.values() if isinstance(value, str)]
        assert find_secrets({"values": plain}, {}) == []
    assert find_secrets({"cluster": yaml.safe_load((ROOT / "cluster.yaml").read_text())}, {}) == []


def test_the_crontab_calls_a_job_once_a_day() -> None:
    (line,) = [line for line in (INFRA / "cron" / "crontab").read_text().splitlines() if line[:1].isdigit()]
    schedule, user, command = line.split()[:5], line.split()[5], line.split(maxsplit=6)[6]
    assert schedule == ["0", "3", "*", "*", "*"]
    assert user == "convoy"
    assert r'--attempt "$(date -u +\%F)"' in command
    assert "%" not in command.replace(r"\%", "")


def test_service_accounts_of_pods_without_kubernetes_get_no_token() -> None:
    accounts = {one["metadata"]["name"]: one for one in of_kind("ServiceAccount")}
    assert accounts["convoy-worker"]["automountServiceAccountToken"] is False
    assert accounts["convoy-submit"]["automountServiceAccountToken"] is False
    assert "annotations" not in accounts["convoy-submit"]["metadata"]
