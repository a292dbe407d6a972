"""What the scripts of this benchmark share: settings in, one line of JSON out, and how a rate is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import Field

from convoy.core.config import StrictModel, load_config
from convoy.core.errors import ConfigError, ConvoyError

_BENCHMARKS = Path(__file__).parent
_LIB = _BENCHMARKS.parents[1] / "lib"


class BenchSettings(StrictModel):
    """What every benchmark takes: `results` is a Markdown file to write."""

    results: str | None = None


SettingsT = TypeVar("SettingsT", bound=BenchSettings)


class WaySettings(StrictModel):
    """What every way is told: the folder with the images, and where its features go for the comparison.

    `launched_unix_s` is when the process was started, so that its imports count; a script that is run alone
    counts from its own first line on.
    """

    images: str
    features: str
    batch_size: int = Field(default=32, gt=0)
    launched_unix_s: float = Field(default_factory=time.time)


class WayResult(StrictModel):
    """One run of one way. `images_per_s` is the steady rate; the others count from the launch of the process.

    `wall_s` ends when all features are on disk.
    """

    num_images: int
    images_per_s: float
    first_row_s: float
    wall_s: float
    details: dict[str, Any] = Field(default_factory=dict)


class RateResult(StrictModel):
    """One run of one way to train: its steady rate, and the seconds of all of it."""

    num_images: int
    images_per_s: float
    wall_s: float
    details: dict[str, Any] = Field(default_factory=dict)


def list_images(folder: str) -> list[str]:
    """The paths of all files of a folder, sorted."""
    return sorted(str(path) for path in Path(folder).iterdir())


def peer_result(
    settings: WaySettings, batches: Sequence[tuple[float, int]], finished_unix_s: float
) -> WayResult:
    """The result of a peer from (when it was through the network, number of images) of its batches.

    Its steady rate begins after the first batch, so that the time to fill its pipeline is not held against it.
    """
    if len(batches) < 2:
        raise ConfigError(
            "a steady rate needs two batches or more", next_step="raise num_images, or lower batch_size"
        )
    (first_unix_s, num_first), *_, (last_unix_s, _) = batches
    num_images = sum(num for _, num in batches)
    return WayResult(
        num_images=num_images,
        images_per_s=(num_images - num_first) / (last_unix_s - first_unix_s),
        first_row_s=first_unix_s - settings.launched_unix_s,
        wall_s=finished_unix_s - settings.launched_unix_s,
    )


def save_features(path: str, names: Sequence[str], features_BD: np.ndarray) -> None:
    """Keep features for the comparison, in the order of the images' names."""
    order = np.argsort(names)
    np.savez(path, names=np.asarray(names)[order], features_BD=features_BD[order])


def run_script(script: str, **settings: Any) -> dict[str, Any]:
    """What a script of this folder prints last on stdout, as JSON. It runs in a process of its own."""
    arguments = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return run_python([str(_BENCHMARKS / script), *arguments])


def run_python(arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON object on the last line that a Python process prints; it sees the library of this checkout."""
    finished = subprocess.run(
        [sys.executable, *arguments], env=_environment(), capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise ConvoyError(f"exit code {finished.returncode}\n{finished.stderr}", where=" ".join(arguments))
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def convoy(*arguments: str) -> dict[str, Any]:
    """The report of a `convoy` command, which runs in a process of its own."""
    return run_python(["-m", "convoy.cli", *arguments, "--json"])


@contextmanager
def convoy_process(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `convoy` command in a process of its own, which is killed when the block ends; its output is thrown away."""
    with subprocess.Popen(
        [sys.executable, "-m", "convoy.cli", *arguments],
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run_benchmark(
    settings_type: type[SettingsT],
    measure: Callable[[SettingsT], dict[str, Any]],
    write_page: Callable[[Path, dict[str, Any]], None],
) -> None:
    """The `main` of a benchmark: measure by the command line's settings, write the page, print the report."""
    try:
        settings = load_config(settings_type, None, sys.argv[1:])
        report = measure(settings)
    except ConvoyError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    if settings.results:
        write_page(Path(settings.results), report)
    print(json.dumps(report))


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _environment() -> dict[str, str]:
    paths = [str(_LIB), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
