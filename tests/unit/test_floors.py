"""The floors of lib/convoy: imports look down only, and each floor keeps to its outside packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lib" / "convoy"

# What each folder may import of ours, and which heavy outside packages it may name.
MAY_IMPORT = {
    "core": set(),
    "storage": {"core"},
    "vision": {"core"},
    "cluster": {"core", "storage", "vision"},
    "pipelines": {"core", "storage", "vision", "cluster", "pipelines"},
    "report": {"core", "pipelines"},
    "cli": {"core", "storage", "vision", "pipelines", "report"},
}
OUTSIDE = {
    "core": {"numpy", "pydantic", "yaml"},
    "storage": {"numpy", "pydantic", "pyarrow", "boto3", "botocore", "tenacity"},
    "vision": {
        "numpy",
        "pydantic",
        "torch",
        "torchvision",
        "timm",
        "PIL",
        "safetensors",
        "scipy",
        "threadpoolctl",
        "onnxruntime",
        "matplotlib",
    },
    "cluster": {"numpy", "pydantic", "pyarrow", "torch", "ray"},
    "pipelines": {"numpy", "pydantic", "pyarrow", "torch", "umap"},
    # markupsafe is what jinja2 escapes with.
    "report": {"pydantic", "rich", "tensorboard", "jinja2", "markupsafe", "torch", "matplotlib", "mlflow"},
    "cli": {"pydantic", "typer"},
}


def python_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            yield node.module or ""


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_look_down_only(path: Path) -> None:
    floor = floor_of(path)
    for module in imported_modules(path):
        top, _, rest = module.partition(".")
        if top == "convoy":
            target = rest.split(".")[0]
            assert target == floor or target in MAY_IMPORT[floor], f"{floor} must not import {module}"
        elif top not in sys.stdlib_module_names:
            assert top in OUTSIDE[floor], f"{floor} must not import {module}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        "convoy." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts): {
            module for module in imported_modules(path) if module.startswith("convoy.")
        }
        for path in python_files()
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module in done:
            return
        for target in sorted(graph.get(module, ())):
            visit(target, (*above, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_the_ground_floor_loads_no_heavy_package() -> None:
    script = (
        "import sys, convoy.core.config, convoy.core.metrics, convoy.storage.commits, convoy.storage.runs; "
        "print([name for name in ('torch', 'ray', 'torchvision', 'timm') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


@pytest.mark.parametrize("job", ["cache", "score"])
def test_a_job_that_only_tells_workers_what_to_do_waits_for_no_heavy_package(job: str) -> None:
    script = (
        f"import sys, convoy.pipelines.{job}; "
        "print([name for name in ('torch', 'ray', 'torchvision', 'timm', 'sklearn') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_files_and_job_scripts_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


def test_git_and_ray_do_not_ignore_the_library() -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", "lib/convoy/core/errors.py"], cwd=ROOT, capture_output=True, check=False
    )
    assert ignored.returncode == 1
