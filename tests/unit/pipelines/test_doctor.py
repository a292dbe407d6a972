from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from convoy.core.errors import ConfigError
from convoy.pipelines.doctor import Check, Diagnosis, Verdict, examine
from convoy.pipelines.workspace import open_workspace
from convoy.storage.conditional_put import PROBE_FOLDER, VERDICT_KEY, StoreVerdict
from convoy.storage.local_store import LOCK_NAME, LocalStore
from convoy.storage.object_store import ConditionalPut, WriterMode


def test_healthy_machine_and_folder_are_green_and_left_clean_but_for_what_jobs_ask_for(
    tmp_path: Path,
) -> None:
    diagnosis = examine(str(tmp_path / "workspace"))
    assert diagnosis.ok, [check for check in diagnosis.checks if check.verdict is Verdict.RED]
    found = {check.what: check for check in diagnosis.checks}
    assert found["conditional writes"].found == "atomic"
    assert {"python", "ray", "torch", "pillow", "devices", "workspace write", "clock"} <= set(found)
    left = {tmp_path / "workspace" / key for key in (VERDICT_KEY, f"{PROBE_FOLDER}{LOCK_NAME}")}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == left


def test_a_store_is_judged_anew_whatever_the_workspace_remembers(tmp_path: Path) -> None:
    known = StoreVerdict(conditional_put=ConditionalPut.RACY, root_uri=str(tmp_path))
    LocalStore(str(tmp_path)).put(VERDICT_KEY, known.model_dump_json().encode())
    with pytest.raises(ConfigError, match="convoy doctor"):
        open_workspace(str(tmp_path), WriterMode.MANY)
    assert examine(str(tmp_path)).ok
    open_workspace(str(tmp_path), WriterMode.MANY)


def test_workspace_that_cannot_be_written_is_red_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    diagnosis = examine(str(tmp_path / "file" / "workspace"))
    assert not diagnosis.ok
    (red,) = [check for check in diagnosis.checks if check.verdict is Verdict.RED]
    assert red.what == "workspace write"


def test_unknown_scheme_is_red(tmp_path: Path) -> None:
    diagnosis = examine("ftp://host/folder")
    assert [check.what for check in diagnosis.checks if check.verdict is Verdict.RED] == ["workspace"]


@pytest.mark.parametrize(
    ("package", "raised"), [("torch", ImportError), ("torch", OSError), ("torchvision", RuntimeError)]
)
def test_a_torch_that_cannot_be_imported_is_one_red_line_of_a_whole_report(
    tmp_path: Path, package: str, raised: type[Exception]
) -> None:
    checks = checks_where_a_package_is_broken(tmp_path, package, raised)
    (red,) = [check for check in checks if check.verdict is Verdict.RED]
    assert red.what == "devices"
    assert red.found == "torch or torchvision cannot be imported: libbroken.so.13: cannot open"
    assert "make setup" in red.advice
    assert {"python", "ray", "c++ compiler", "workspace delete", "clock"} <= {check.what for check in checks}


@pytest.mark.parametrize(("package", "module"), [("ray", "ray"), ("pillow", "PIL")])
def test_a_package_that_is_there_but_cannot_be_imported_is_red(
    tmp_path: Path, package: str, module: str
) -> None:
    checks = checks_where_a_package_is_broken(tmp_path, module, ImportError)
    # torchvision needs Pillow too, so the devices may be another.
    red, *others = [check for check in checks if check.verdict is Verdict.RED]
    assert red.what == package
    assert {check.what for check in others} <= {"devices"}
    assert "cannot be imported: libbroken.so.13: cannot open" in red.found
    assert {"python", "devices", "workspace delete", "clock"} <= {check.what for check in checks}


@pytest.mark.parametrize("package", ["pyarrow", "boto3"])
def test_a_storage_that_cannot_be_imported_is_one_red_line_below_all_that_is_known_of_the_machine(
    tmp_path: Path, package: str
) -> None:
    checks = checks_where_a_package_is_broken(tmp_path, package, ImportError)
    (red,) = [check for check in checks if check.verdict is Verdict.RED]
    assert red.what == "workspace"
    assert red.found == "what opens it cannot be imported: libbroken.so.13: cannot open"
    assert "make setup" in red.advice
    assert {"python", "ray", "pyarrow", "devices", "c++ compiler"} <= {check.what for check in checks}


@pytest.mark.parametrize("asked", ["is_available", "device_count", "get_device_name"])
def test_a_gpu_that_does_not_answer_is_one_red_line_of_a_whole_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    def broken(*_: object) -> NoReturn:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(f"torch.cuda.{asked}", broken)
    checks = examine(str(tmp_path)).checks
    (red,) = [check for check in checks if check.verdict is Verdict.RED]
    assert (red.what, "nvidia-smi" in red.advice) == ("devices", True)
    assert red.found == "the GPUs cannot be used: CUDA error: uncorrectable ECC error encountered"
    assert {"python", "ray", "c++ compiler", "workspace delete", "clock"} <= {check.what for check in checks}


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "http://localhost:{}/"])
def test_open_ray_port_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", address.format(server.getsockname()[1]))
        assert ray_check(tmp_path).verdict is Verdict.YELLOW


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "http://127.0.0.1:{}"])
def test_a_ray_that_does_not_answer_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", address.format(port))
    red = ray_check(tmp_path)
    assert red.verdict is Verdict.RED
    assert "unset it" in red.advice


def test_an_address_without_a_port_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert ray_check(tmp_path).verdict is not Verdict.RED


def ray_check(workspace: Path) -> Check:
    """The last of that name: the first is about the package."""
    return [check for check in examine(str(workspace)).checks if check.what == "ray"][-1]


def checks_where_a_package_is_broken(folder: Path, package: str, raised: type[Exception]) -> list[Check]:
    """What the command line says where a package that is installed raises as it is imported."""
    (folder / f"{package}.py").write_text(f"raise {raised.__name__}('libbroken.so.13: cannot open')\n")
    variables = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.pathsep.join(sys.path)}"}
    command = [sys.executable, "-m", "convoy.cli", "doctor", "--json", "--workspace", str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert finished.returncode == 1, finished.stderr
    return Diagnosis.model_validate_json(finished.stdout).checks
