"""The files of infra/ and cluster.yaml, as their tests read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"


def documents(*parts: str) -> list[dict[str, Any]]:
    """All documents of a YAML file below infra/."""
    return [one for one in yaml.safe_load_all(INFRA.joinpath(*parts).read_text(encoding="utf-8")) if one]


def manifests() -> list[tuple[str, dict[str, Any]]]:
    """All Kubernetes manifests, each with its file's name."""
    files = sorted([*INFRA.glob("kuberay/*.yaml"), *INFRA.glob("cron/*.yaml")])
    return [(path.name, one) for path in files for one in documents(path.parent.name, path.name)]


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside a document, the outer one first."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(inner)


def locked_version(package: str) -> str:
    """The version of a package that requirements.lock pins."""
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert found, package
    return found[1]
