"""Container files, and the Terraform module: by Terraform itself where it is installed, and by our rules."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from infra_files import INFRA, ROOT

IMAGES = sorted(path.name for path in (INFRA / "images").glob("Dockerfile.*"))
TERRAFORM = shutil.which("terraform")


def test_there_is_an_image_for_each_kind_of_node() -> None:
    assert IMAGES == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_built_from_the_lock_and_run_without_root(name: str) -> None:
    text = (INFRA / "images" / name).read_text()
    lines = [
        line.strip() for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")
    ]
    assert lines[0] == "ARG PYTHON_IMAGE=python:3.11-slim-bookworm"
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 2
    assert all("--no-deps" in line for line in installs)
    assert "--require-hashes -r requirements.lock" in installs[0]
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 1000:1000"]
    assert lines.index(users[0]) > max(i for i, line in enumerate(lines) if line.startswith(("RUN", "COPY")))
    assert not any(
        line.startswith("ADD ") or re.search(r"curl|https?://|TOKEN|SECRET", line) for line in lines
    )


@pytest.mark.parametrize("name", IMAGES)
def test_what_images_copy_exists_and_reaches_the_build(name: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[0] == "**"
    copies = re.findall(
        r"^COPY (?!--from)(?:--chown=\S+ )?(.+) \S+$", (INFRA / "images" / name).read_text(), re.MULTILINE
    )
    sources = [source for line in copies for source in line.split()]
    assert {"requirements.lock", "lib", "jobs"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignore


@pytest.mark.skipif(TERRAFORM is None, reason="terraform is not installed")
def test_terraform_can_read_the_module_and_finds_it_well_formed() -> None:
    checked = subprocess.run(
        [str(TERRAFORM), "fmt", "-check", "-diff", str(INFRA / "iam")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def terraform() -> str:
    return "\n".join(path.read_text() for path in sorted((INFRA / "iam").glob("*.tf")))


def test_references_of_the_module_are_declared() -> None:
    text = terraform()
    declared = set(re.findall(r'^variable "(\w+)"', text, re.MULTILINE))
    assert declared == set(re.findall(r"\bvar\.(\w+)", text))
    blocks = {f"{kind}.{name}" for kind, name in re.findall(r'^resource "(\w+)" "(\w+)"', text, re.MULTILINE)}
    assert set(re.findall(r"(?<![\w.\"])(aws_\w+\.\w+)", text)) <= blocks
    data = {f"{kind}.{name}" for kind, name in re.findall(r'^data "(\w+)" "(\w+)"', text, re.MULTILINE)}
    assert set(re.findall(r"\bdata\.(\w+\.\w+)", text)) == data


def test_rights_are_named_one_by_one() -> None:
    text = terraform()
    for statement in re.findall(r"statement \{.*?\n  \}", text, re.DOTALL):
        if 'effect  = "Deny"' in statement:
            continue
        assert not re.search(r'"[\w-]*:?\*"', re.sub(r"resources\s*=.*", "", statement)), statement
        if 'resources = ["*"]' in statement:
            assert re.search(r"know(s)? no resource", statement), statement


def test_the_bucket_is_private_and_drops_the_parts_of_unfinished_uploads() -> None:
    text = terraform()
    for switch in (
        "block_public_acls",
        "block_public_policy",
        "ignore_public_acls",
        "restrict_public_buckets",
    ):
        assert re.search(rf"{switch}\s+= true", text)
    assert re.search(r"abort_incomplete_multipart_upload \{\s+days_after_initiation = [1-7]\n", text)
    # Results never expire by themselves.
    assert "expiration" not in text
    assert "force_destroy" not in text
