"""Aliases in the model registry of a real MLflow, as the workspace has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from command_lines import convoy_here, last_json
from convoy.core.errors import ConfigError, StorageError
from convoy.core.tracking import MirrorConfig
from convoy.pipelines.model_registry import RegisteredModel, registered_model
from convoy.report.model_mirror import follow_move, mirror_aliases
from convoy.storage.bundles import BundleRef, write_bundle
from convoy.storage.registry import Alias, AliasMove, move_aliases
from convoy.storage.stores import open_store

tracking = pytest.importorskip("mlflow.tracking", reason="needs the extra `tracking`")

NAME = "net"
FILES = dict.fromkeys(("config.json", "preprocess.json", "classes.json", "metrics.json"), b"{}")


@pytest.fixture
def workspace(tmp_path: Path) -> str:
    return str(tmp_path / "workspace")


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MirrorConfig:
    uri = f"file://{tmp_path}/mlflow"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    # The registry of files opens the tracking store of the environment too, and else makes one where it stands.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MirrorConfig(mlflow_uri=uri)


def version_of(workspace: str, content: bytes) -> BundleRef:
    return write_bundle(
        open_store(workspace), NAME, {**FILES, "README.md": b"# net\n", "model.safetensors": content}
    )


def move(workspace: str, moves: dict[Alias, str | None]) -> RegisteredModel:
    made = AliasMove(action="moved", moves=moves, reason="a test")
    move_aliases(open_store(workspace), NAME, lambda _: made)
    return registered_model(workspace, NAME)


def theirs(mirror: MirrorConfig) -> Any:
    return tracking.MlflowClient(tracking_uri=mirror.mlflow_uri, registry_uri=mirror.mlflow_uri)


def digests(mirror: MirrorConfig) -> dict[str, str]:
    """The digest of the version behind each of MLflow's aliases."""
    aliases = theirs(mirror).get_registered_model(NAME).aliases
    versions = {
        alias: theirs(mirror).get_model_version(NAME, str(number)) for alias, number in aliases.items()
    }
    return {alias: version.tags["convoy.digest"] for alias, version in versions.items()}


def test_mlflow_has_the_aliases_of_the_workspace_after_each_move(
    workspace: str, mirror: MirrorConfig
) -> None:
    one, two = version_of(workspace, b"one"), version_of(workspace, b"two")
    first = mirror_aliases(move(workspace, {Alias.CHAMPION: one.digest, Alias.CANDIDATE: two.digest}), mirror)
    assert first.moved == ["candidate", "champion"]
    assert digests(mirror) == {"champion": one.digest, "candidate": two.digest}
    version = theirs(mirror).get_model_version_by_alias(NAME, "champion")
    assert (version.source, version.status) == (one.uri, "READY")

    moved = move(workspace, {Alias.CHAMPION: two.digest, Alias.PREVIOUS: one.digest, Alias.CANDIDATE: None})
    assert mirror_aliases(moved, mirror).moved == ["candidate", "champion", "previous"]
    assert digests(mirror) == {"champion": two.digest, "previous": one.digest}
    again = mirror_aliases(moved, mirror)
    assert (again.moved, again.revision) == ([], 2)
    assert len(theirs(mirror).search_model_versions(f"name = '{NAME}'")) == 2


def test_an_alias_of_other_people_stays(workspace: str, mirror: MirrorConfig) -> None:
    one = version_of(workspace, b"one")
    mirror_aliases(move(workspace, {Alias.CHAMPION: one.digest}), mirror)
    theirs(mirror).set_registered_model_alias(NAME, "audited", "1")
    mirror_aliases(move(workspace, {Alias.CHAMPION: None, Alias.PREVIOUS: one.digest}), mirror)
    assert digests(mirror) == {"previous": one.digest, "audited": one.digest}


def test_an_older_state_does_not_replace_a_later_one(workspace: str, mirror: MirrorConfig) -> None:
    one, two = version_of(workspace, b"one"), version_of(workspace, b"two")
    before = move(workspace, {Alias.CHAMPION: one.digest})
    mirror_aliases(move(workspace, {Alias.CHAMPION: two.digest}), mirror)
    late = mirror_aliases(before, mirror)
    assert (late.moved, late.revision) == ([], 2)
    assert digests(mirror) == {"champion": two.digest}


def test_a_model_that_is_not_ours_is_left_alone(workspace: str, mirror: MirrorConfig, tmp_path: Path) -> None:
    theirs(mirror).create_registered_model(NAME)
    ours = move(workspace, {Alias.CHAMPION: version_of(workspace, b"one").digest})
    with pytest.raises(ConfigError, match="was not made by Convoy"):
        mirror_aliases(ours, mirror)
    theirs(mirror).delete_registered_model(NAME)
    mirror_aliases(ours, mirror)
    elsewhere = str(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="mirrors the workspace"):
        mirror_aliases(move(elsewhere, {Alias.CHAMPION: version_of(elsewhere, b"x").digest}), mirror)


def test_a_promotion_is_mirrored_by_the_command_that_makes_it(workspace: str, mirror: MirrorConfig) -> None:
    one, two = version_of(workspace, b"one"), version_of(workspace, b"two")
    options = ("--workspace", workspace, "--mlflow-uri", mirror.mlflow_uri or "", "--json")
    for ref in (one, two):
        finished = convoy_here(
            "models", "promote", NAME, "--digest", ref.digest, "--reason", "better", *options
        )
        assert finished.returncode == 0, finished.stderr
    assert digests(mirror) == {"champion": two.digest, "previous": one.digest}
    assert convoy_here("models", "rollback", NAME, *options).returncode == 0
    assert digests(mirror) == {"champion": one.digest, "previous": two.digest}
    mirrored = convoy_here("models", "mirror", NAME, *options)
    assert last_json(mirrored)["moved"] == []


def test_a_mirror_that_cannot_be_reached_fails_no_promotion(workspace: str) -> None:
    one = version_of(workspace, b"one")
    nowhere = "http://127.0.0.1:9"  # has no listener
    promoted = convoy_here(
        *("models", "promote", NAME, "--digest", one.digest, "--reason", "better"),
        *("--workspace", workspace, "--mlflow-uri", nowhere, "--json"),
    )
    assert (promoted.returncode, last_json(promoted)["changed"]) == (0, True)
    assert promoted.stderr.count("the mirror in MLflow failed and is left out") == 1
    with pytest.raises(StorageError, match="MLflow says"):
        mirror_aliases(registered_model(workspace, NAME), MirrorConfig(mlflow_uri=nowhere))
    refused = convoy_here("models", "mirror", NAME, "--workspace", workspace, "--mlflow-uri", nowhere)
    assert (refused.returncode, "convoy models mirror" in refused.stderr) == (1, True)


def test_without_a_mirror_nothing_is_read(workspace: str) -> None:
    follow_move(MirrorConfig(), lambda: registered_model(workspace, "no such name at all"))
