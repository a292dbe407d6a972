"""`make demo`: the main jobs on real images, end to end: local Ray, local folder, no cloud.

The images are scikit-learn's handwritten digits, written as JPEG files at some place, size and tilt in the frame, as
photographs are. A small network learns the digits 0-4 from scratch; then its weights serve to tell 5-9 apart from
20 labelled images a class: frozen under a new head, fine-tuned, and not at all. In the end a search builds an ensemble.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import ray
import torch
from PIL import Image
from sklearn.datasets import load_digits

from convoy.cluster.session import WORKER_ENVIRONMENT
from convoy.vision.head_config import HeadConfig
from convoy.vision.head_fitting import evaluate_head, fit_head
from convoy.vision.heads import TensorFeatures

# Stands in every folder that the demo made, and may delete.
MARK = ".convoy-demo"
SIDE_PX = 32
TRAIN_PER_CLASS = 20
# Places of each of the digits 0-4: the network that is transferred has seen enough to know strokes.
PLACES = 3
# The digits that there are few images of.
FEW = range(5, 10)
ARCH = "lenet5"
PRESET = {"resize_px": None, "crop_px": SIDE_PX, "mean": [0.5] * 3, "std": [0.25] * 3}
# Mirrored digits are other shapes, and a crop of a digit may be another digit.
AUGMENTATION = {"crop": {"kind": "random", "padding_px": 2}, "mirror": None, "rotation": {"degrees": 8}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder",
        default="demo-workspace",
        type=Path,
        help="where images and workspace go (%(default)s): a new or empty folder, or that of an earlier demo, "
        "which is deleted first",
    )
    folder = parser.parse_args().folder.resolve()
    begin_anew(folder)
    started_s = time.monotonic()
    workspace = str(folder / "workspace")

    digits = load_digits()
    say("1  Write digits as JPEG class folders, and freeze them: convoy dataset")
    write_many(digits, folder / "images" / "digits-0-4")
    write_few(digits, folder / "images" / "digits-5-9")
    for name in ("digits-0-4", "digits-5-9"):
        frozen = convoy("dataset", str(folder / "images" / name), "--name", name, "--workspace", workspace)
        print(f"   {name}: {frozen['splits']}")

    # One Ray for all commands; each of them alone would start its own.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.update(WORKER_ENVIRONMENT)
    ray.init("local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address

    say("2  Teach a LeNet-5 the digits 0-4 from scratch: there must be something to transfer")
    learnt = {
        "name": "lenet5-digits-0-4",
        "dataset": "digits-0-4",
        "backbone": {"arch": ARCH, "preset": PRESET},
    }
    scratch = {"strategy": "from_scratch", "augmentation": AUGMENTATION, "recipe": {"batch_size": 32}}
    pretrained = train(folder, {**learnt, **scratch, "epochs": 5}, workspace)
    print(f"   top-1 {pretrained['top1']:.1%} on digits 0-4; curves {pretrained['learning_curves']}")
    weights = f"{workspace}/models/{pretrained['bundle'].replace('@', '/')}/model.safetensors"
    backbone = {"arch": ARCH, "weights": weights, "num_classes": 5, "preset": PRESET}

    say("3  Cache its features of 5-9 with Ray Data: convoy cache")
    cache(folder, {"dataset": "digits-5-9", "backbone": backbone, "taps": ["c3", "f6"]}, workspace)

    say(f"4  Use it on 5-9, {TRAIN_PER_CLASS} images a class, in three ways: convoy train")
    shared = {"augmentation": AUGMENTATION, "recipe": {"batch_size": 20}}
    ways = {
        "frozen features, new head": {"strategy": "linear_probe", "backbone": backbone, "tap": "f6"},
        "fine-tuned": {"strategy": "fine_tune", "backbone": backbone, "epochs": 30, "freeze_depth": 0},
        "from scratch": {"strategy": "from_scratch", "backbone": learnt["backbone"], "epochs": 30},
    }
    reports = {
        way: train(
            folder,
            {**shared, **settings, "dataset": "digits-5-9", "name": settings["strategy"].replace("_", "-")},
            workspace,
        )
        for way, settings in ways.items()
    }

    say("5  Is fine-tuning better than frozen features, on the same images? convoy evaluate --compare")
    bundles = [reports[way]["bundle"] for way in ("fine-tuned", "frozen features, new head")]
    paired = convoy("evaluate", "--compare", *bundles, "--dataset", "digits-5-9", "--workspace", workspace)
    difference = paired["top1_difference"]
    print(
        f"   difference {difference['estimate']:+.1%} (95 %: {difference['low']:+.1%} to {difference['high']:+.1%})"
    )

    say("6  Search a few ways, and average those that help each other: convoy tune")
    tuned = tune(folder, {"base": {**shared, "backbone": backbone}, "name": "digits-5-9-tuned"}, workspace)
    ray.shutdown()

    say(f"Done in {time.monotonic() - started_s:.0f} s")
    for way, report in reports.items():
        interval = report["intervals"]["top1"]
        print(f"   {way:27} top-1 {report['top1']:.1%}", end=" ")
        print(f"(95 % interval {interval['low']:.1%} to {interval['high']:.1%})")
    print(f"   {'a softmax on raw pixels':27} top-1 {pixel_baseline(folder / 'images' / 'digits-5-9'):.1%}")
    print_ensemble(tuned)
    print(f"   images     {folder / 'images'}")
    print(f"   workspace  {workspace}")


def begin_anew(folder: Path) -> None:
    """An empty folder that is marked as the demo's; of what was there, only what bears the mark is deleted."""
    mark = folder / MARK
    if mark.is_file():
        shutil.rmtree(folder)
    elif folder.exists() and (folder.is_file() or any(folder.iterdir())):
        sys.exit(
            f"{folder} exists and has no {MARK} of the demo: choose another --folder, or delete it yourself"
        )
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()


def cache(folder: Path, settings: dict[str, object], workspace: str) -> None:
    """Compute features, show that nothing is computed twice, and prove that no image was lost."""
    command = ["cache", "--config", write_yaml(folder / "cache.yaml", settings), "--workspace", workspace]
    first, second = convoy(*command), convoy(*command)
    print(
        f"   {first['recomputed']} images computed, {first['rejects']} rejects; again: {second['recomputed']}"
    )
    proof = convoy("verify", first["run"], "--workspace", workspace)
    print(
        f"   {proof['inputs']} in = {proof['results']} results + {proof['rejects']} rejects: ok {proof['ok']}"
    )


def train(folder: Path, settings: dict[str, object], workspace: str) -> dict[str, object]:
    config = write_yaml(folder / f"train.{settings['name']}.yaml", settings)
    return convoy("train", "--config", config, "--workspace", workspace)


def tune(folder: Path, settings: dict[str, object], workspace: str) -> dict[str, object]:
    """A search over three ways to use the network. A mirrored digit is another shape: only the centre is shown."""
    ways = [
        {"strategy": "linear_probe", "tap": "f6"},
        {"strategy": "early_layer_probe", "tap": "c3"},
        {"strategy": "fine_tune", "epochs": 20, "freeze_depth": 0},
    ]
    settings |= {"dataset": "digits-5-9", "space": {"config": {"grid": ways}}, "crops": "center"}
    return convoy("tune", "--config", write_yaml(folder / "tune.yaml", settings), "--workspace", workspace)


def print_ensemble(tuned: dict[str, object]) -> None:
    low, high = (tuned["gain_interval"][end] for end in ("low", "high"))
    print(
        f"   {'ensemble':27} top-1 {tuned['measured']['top1']:.1%}"
        f" (gain over its best member {tuned['gain']:+.1%}, 95 %: {low:+.1%} to {high:+.1%})"
    )
    print("   accuracy against cost, on validation images:")
    for point in tuned["front"]:
        if point["is_best"]:
            names = ", ".join(tuned["candidates"][member].partition("@")[0] for member in point["members"])
            print(f"      {point['images_per_s']:7.0f} images/s  top-1 {point['top1']:.1%}  {names}")
    print(f"   report     {tuned['page']}")


def write_yaml(path: Path, settings: dict[str, object]) -> str:
    path.write_text(json.dumps(settings, indent=2))  # JSON is YAML
    return str(path)


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def convoy(*arguments: str) -> dict[str, object]:
    """Run a command as a person would, show it, and return its JSON."""
    print(f"   $ convoy {' '.join(arguments)}", flush=True)
    command = [str(Path(sys.executable).parent / "convoy"), *arguments, "--json"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    return json.loads(finished.stdout.splitlines()[-1])


def write_many(digits: object, folder: Path) -> None:
    """Digits 0-4, each at several places; the places of one digit stay in one split."""
    for label in range(5):
        for number, index in enumerate(np.flatnonzero(digits.target == label)):
            split = "val" if number % 10 == 0 else "test" if number % 10 == 1 else "train"
            for place in range(PLACES):
                write_image(digits, folder / split / str(label), index, seed=int(index) * PLACES + place)


def write_few(digits: object, folder: Path) -> None:
    """Digits 5-9 as split/class/number.jpg; the split goes by the order of the images in each class."""
    for label in FEW:
        for number, index in enumerate(np.flatnonzero(digits.target == label)):
            split = "train" if number < TRAIN_PER_CLASS else "val" if number < 2 * TRAIN_PER_CLASS else "test"
            write_image(digits, folder / split / str(label), index, seed=int(index))


def write_image(digits: object, folder: Path, index: int, *, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    as_image(digits.images[index], seed=seed).save(folder / f"{seed:05d}.jpg", quality=95)


def as_image(pixels_HW: np.ndarray, *, seed: int) -> Image.Image:
    """An 8x8 digit of values 0..16 somewhere in a 32x32 grey image."""
    random = np.random.default_rng(seed)
    digit_px = int(random.integers(20, 27))
    grey = Image.fromarray((pixels_HW * (255 / 16)).astype(np.uint8))
    digit = grey.resize((digit_px, digit_px), Image.Resampling.BICUBIC)
    frame = Image.new("L", (SIDE_PX, SIDE_PX))
    left, top = random.integers(0, SIDE_PX - digit_px + 1, size=2)
    frame.paste(digit.rotate(float(random.uniform(-12, 12)), Image.Resampling.BICUBIC), (int(left), int(top)))
    return frame


def pixel_baseline(images: Path) -> float:
    """Top-1 of the very head of a linear probe, chosen on the same val images, on raw pixels."""
    train, val, test = (pixel_rows(images / split) for split in ("train", "val", "test"))
    fitted = fit_head(HeadConfig(), train, val, num_classes=len(FEW))
    return evaluate_head(fitted.head, test).summary().top1


def pixel_rows(folder: Path) -> TensorFeatures:
    """The images of a split, each a row of its pixels."""
    paths = sorted(folder.glob("*/*.jpg"))
    pixels_ND = np.stack([np.asarray(Image.open(path), np.float32).reshape(-1) / 255 for path in paths])
    labels = [FEW.index(int(path.parent.name)) for path in paths]
    return TensorFeatures(torch.from_numpy(pixels_ND), torch.tensor(labels))


if __name__ == "__main__":
    main()
