"""`convoy doctor`: one line a check, and what to do where it is red."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.storage.conditional_put import judge_conditional_put
from convoy.storage.object_store import ConditionalPut, ObjectStore
from convoy.vision.engine_options import has_python_headers

# The oldest versions that are safe: older ones run code from data files (see lib/README.md).
FLOORS = {"ray": "2.55", "torch": "2.11", "pillow": "12.3", "pyarrow": "21"}
# What is installed may still not load; other checks import the rest.
_MODULES = {"ray": "ray", "pillow": "PIL"}
_PROBE_KEY = ".convoy/doctor"
_MAX_CLOCK_SKEW_S = 60.0
_KNOCK_TIMEOUT_S = 5.0


class Verdict(StrEnum):
    """How a check ended. Only red makes the exit code 1."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


class Check(StrictModel):
    """One line of the doctor."""

    verdict: Verdict
    what: str
    found: str
    advice: str = ""


class Diagnosis(StrictModel):
    """All checks; `ok` if none is red."""

    ok: bool
    checks: list[Check]


def examine(workspace: str | None) -> Diagnosis:
    """Check this machine and the workspace, that of jobs whose config names none where it is None.

    What conditional writes are worth there stays, for the jobs to come.
    """
    checks = [*_machine(), *_workspace(workspace)]
    return Diagnosis(ok=all(check.verdict is not Verdict.RED for check in checks), checks=checks)


def _machine() -> Iterator[Check]:
    good = sys.version_info >= (3, 11)
    yield _check(good, "python", platform.python_version(), "install Python 3.11 or newer")
    for package, floor in FLOORS.items():
        yield _package(package, floor)
    yield _devices()
    yield _compiler()
    yield _ray_address()


def _compiler() -> Check:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler and has_python_headers():
        return Check(verdict=Verdict.GREEN, what="c++ compiler", found=compiler)
    return Check(
        verdict=Verdict.YELLOW,
        what="c++ compiler",
        found=f"{compiler}, without Python.h" if compiler else "none",
        advice="networks run eagerly; install g++ and python3-dev to let torch.compile speed up long jobs",
    )


def _package(package: str, floor: str) -> Check:
    try:
        found = version(package)
    except PackageNotFoundError:
        return Check(verdict=Verdict.RED, what=package, found="not installed", advice="run `make setup`")
    try:
        if package in _MODULES:
            import_module(_MODULES[package])
    except Exception as error:  # a broken installation fails in any way
        found = f"{found}, but it cannot be imported: {error}"
        return Check(verdict=Verdict.RED, what=package, found=found, advice="run `make setup`")
    good = _numbers(found) >= _numbers(floor)
    return _check(good, package, found, f"upgrade to {floor} or newer: older ones are unsafe")


def _devices() -> Check:
    try:
        import torch  # noqa: PLC0415 (it may not load, and every other check can do without)

        import_module("torchvision")
    except Exception as error:  # a broken installation fails in any way
        return Check(
            verdict=Verdict.RED,
            what="devices",
            found=f"torch or torchvision cannot be imported: {error}",
            advice="run `make setup`, or install builds of both that fit each other and this machine",
        )
    try:
        if not torch.cuda.is_available():
            return Check(verdict=Verdict.GREEN, what="devices", found=f"{os.cpu_count()} CPUs, no CUDA GPU")
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except Exception as error:  # a GPU without a working driver, in whatever words CUDA has for it
        return Check(
            verdict=Verdict.RED,
            what="devices",
            found=f"the GPUs cannot be used: {error}",
            advice="mend what `nvidia-smi` shows, or set CUDA_VISIBLE_DEVICES= to work on CPUs",
        )
    return Check(verdict=Verdict.GREEN, what="devices", found=", ".join(names))


def _ray_address() -> Check:
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        return Check(verdict=Verdict.GREEN, what="ray", found="no RAY_ADDRESS: jobs start a local Ray")
    try:
        _knock(address)
    except OSError as error:
        advice = "start that cluster, correct RAY_ADDRESS, or unset it: then jobs start a local Ray"
        return Check(
            verdict=Verdict.RED, what="ray", found=f"nothing answers at {address}: {error}", advice=advice
        )
    runs = "`convoy submit` sends jobs to" if address.startswith("http") else "jobs run on"
    token = os.environ.get("RAY_AUTH_MODE") == "token" or "RAY_AUTH_TOKEN" in os.environ
    return Check(
        verdict=Verdict.GREEN if token else Verdict.YELLOW,
        what="ray",
        found=f"{runs} {address}",
        advice="" if token else "set RAY_AUTH_MODE=token: an open Ray port lets anybody run code",
    )


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT; `auto` and the like name no port to try."""
    named = re.search(r"([^/\[\]]+)\]?:(\d+)/?$", address)
    if named:
        socket.create_connection((named[1], int(named[2])), _KNOCK_TIMEOUT_S).close()


def _workspace(configured: str | None) -> Iterator[Check]:
    try:
        # They need pyarrow and boto3, which may not load either.
        from convoy.pipelines.workspace import workspace_store  # noqa: PLC0415
    except Exception as error:
        yield Check(
            verdict=Verdict.RED,
            what="workspace",
            found=f"what opens it cannot be imported: {error}",
            advice="run `make setup`, or install the package that is missing or broken",
        )
        return
    try:
        store = workspace_store(configured)
        yield Check(verdict=Verdict.GREEN, what="workspace", found=store.root_uri)
    except ConvoyError as error:
        yield _red("workspace", error)
        return
    key = f"{_PROBE_KEY}/{time.time_ns()}"
    steps: dict[str, Callable[[], object]] = {
        "write": lambda: store.put(key, b"doctor"),
        "read": lambda: store.get(key),
        "list": lambda: next(iter(store.list_objects(f"{_PROBE_KEY}/")), None),
        "delete": lambda: store.delete([key]),
    }
    for step, run in steps.items():
        try:
            run()
            yield Check(verdict=Verdict.GREEN, what=f"workspace {step}", found="allowed")
        except ConvoyError as error:
            yield _red(f"workspace {step}", error)
            return
    yield _conditional_put(store)
    yield _clock(store)


def _conditional_put(store: ObjectStore) -> Check:
    try:
        found = judge_conditional_put(store)
    except ConvoyError as error:
        return _red("conditional writes", error)
    atomic = found is ConditionalPut.ATOMIC
    return Check(
        verdict=Verdict.GREEN if atomic else Verdict.YELLOW,
        what="conditional writes",
        found=found.value,
        advice="" if atomic else "run one job at a time on this workspace, with --set writers=single",
    )


def _clock(store: ObjectStore) -> Check:
    try:
        skew_s = store.clock_skew_s()
    except ConvoyError as error:
        return _red("clock", error)
    good = abs(skew_s) <= _MAX_CLOCK_SKEW_S
    return _check(
        good, "clock", f"{skew_s:+.0f} s from the store's", "set this machine's clock: signed requests expire"
    )


def _check(good: bool, what: str, found: str, advice: str) -> Check:
    return Check(
        verdict=Verdict.GREEN if good else Verdict.RED, what=what, found=found, advice="" if good else advice
    )


def _red(what: str, error: ConvoyError) -> Check:
    return Check(verdict=Verdict.RED, what=what, found=error.what, advice=error.next_step)


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison: 2.15.0+cpu gives (2, 15, 0)."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
