"""`make demo`: the main job on real images, end to end: local Ray, local folder, no cloud.

The images are scikit-learn's handwritten digits, written as JPEG files at some place, size and tilt in the frame, as
photographs are. A small network learns the digits 0-4; then its frozen features serve to tell 5-9 apart from 20
labelled images a class.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

from convoy.vision.backbones import BackboneConfig, build_network

SIDE_PX = 32
TRAIN_PER_CLASS = 20
ARCH = "lenet5"
MEAN, STD = 0.5, 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="demo-workspace", type=Path)
    folder = parser.parse_args().folder.resolve()
    if folder.exists() and not (folder / "images").exists() and any(folder.iterdir()):
        sys.exit(f"{folder} exists and was not made by the demo: choose another --folder")
    shutil.rmtree(folder, ignore_errors=True)
    started_s = time.monotonic()

    digits = load_digits()
    say("1  Write the digits 5-9 as JPEG class folders")
    counts = write_images(digits, folder / "images")
    print(f"   {counts['train']} train, {counts['val']} val, {counts['test']} test images of 5 classes")

    say("2  Teach a LeNet-5 the digits 0-4: there must be something to transfer")
    weights = folder / "lenet5-digits-0-4.pt"
    pretrain(digits, weights)

    workspace = str(folder / "workspace")
    say("3  Freeze the dataset: convoy dataset")
    convoy("dataset", str(folder / "images"), "--name", "digits-5-9", "--workspace", workspace)

    say("4  Cache its features with Ray Data: convoy cache")
    cache = ["cache", "--config", str(write_config(folder, weights)), "--workspace", workspace]
    first = convoy(*cache)
    print(f"   {first['recomputed']} images computed, {first['rows']} rows, {first['rejects']} rejects")

    say("5  The same command again: nothing is recomputed")
    second = convoy(*cache)
    print(f"   {second['recomputed']} images computed, {second['rows']} rows")

    say("6  Prove that every image ended exactly once: convoy verify")
    proof = convoy("verify", first["run"], "--workspace", workspace)
    print(
        f"   {proof['inputs']} in = {proof['results']} results + {proof['rejects']} rejects: ok {proof['ok']}"
    )

    say("7  Train a softmax head on the cached features: convoy train")
    trained = convoy("train", "--config", str(write_train_config(folder, weights)), "--workspace", workspace)
    say("8  Evaluate the bundle on the test images: convoy evaluate")
    report = convoy(
        "evaluate",
        "--workspace",
        workspace,
        "--set",
        "dataset=digits-5-9",
        "--set",
        f"bundle={trained['bundle']}",
    )
    interval = report["intervals"]["top1"]
    pixels = pixel_baseline(folder / "images")

    say(f"Done in {time.monotonic() - started_s:.0f} s")
    print(f"   transferred features, {TRAIN_PER_CLASS} images a class: top-1 {report['top1']:.1%}", end=" ")
    print(f"(95 % interval {interval['low']:.1%} to {interval['high']:.1%})")
    print(f"   the same head on raw pixels:               top-1 {pixels:.1%}")
    print(f"   images     {folder / 'images'}")
    print(f"   workspace  {workspace}")
    print(f"   bundle     {workspace}/models/{trained['bundle'].replace('@', '/')}")


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


def write_images(digits: object, folder: Path) -> dict[str, int]:
    """Digits 5-9 as split/class/number.jpg; the split goes by the order of the images in each class."""
    counts = {"train": 0, "val": 0, "test": 0}
    for label in range(5, 10):
        for number, index in enumerate(np.flatnonzero(digits.target == label)):
            split = "train" if number < TRAIN_PER_CLASS else "val" if number < 2 * TRAIN_PER_CLASS else "test"
            path = folder / split / str(label) / f"{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            as_image(digits.images[index], seed=index).save(path, quality=95)
            counts[split] += 1
    return counts


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


def pretrain(digits: object, path: Path) -> None:
    """A plain loop: 8 epochs of Adam on the digits 0-4, each at four places, in half a minute at most."""
    known = np.repeat(np.flatnonzero(digits.target < 5), 4)
    images = [np.asarray(as_image(digits.images[index], seed=place)) for place, index in enumerate(known)]
    images_BHW = torch.from_numpy(np.stack(images)).float().div(255).sub(MEAN).div(STD)
    images_BCHW = images_BHW.unsqueeze(1).expand(-1, 3, -1, -1)
    labels_B = torch.from_numpy(digits.target[known])
    network = build_network(BackboneConfig(arch=ARCH, weights="random", num_classes=5)).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        for rows in torch.randperm(len(labels_B), generator=generator).split(32):
            optimizer.zero_grad()
            cross_entropy(network(images_BCHW[rows]), labels_B[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (network.eval()(images_BCHW).argmax(1) == labels_B).float().mean().item()
    torch.save(network.state_dict(), path)
    print(f"   {len(labels_B)} images, training accuracy {accuracy:.1%}")


def write_config(folder: Path, weights: Path) -> Path:
    path = folder / "cache.digits.yaml"
    path.write_text(f"dataset: digits-5-9\n{network_section(weights)}taps: [c3, f6]\n")
    return path


def write_train_config(folder: Path, weights: Path) -> Path:
    path = folder / "train.digits.yaml"
    path.write_text(
        "name: digits-5-9\ndataset: digits-5-9\nstrategy: linear_probe\n"
        f"{network_section(weights)}tap: f6\nhead:\n  kind: softmax\n"
    )
    return path


def network_section(weights: Path) -> str:
    normalisation = f"mean: [{MEAN}, {MEAN}, {MEAN}], std: [{STD}, {STD}, {STD}]"
    return (
        f"backbone:\n  arch: {ARCH}\n  weights: {weights}\n  num_classes: 5\n"
        f"  preset: {{resize_px: null, crop_px: {SIDE_PX}, {normalisation}}}\n"
    )


def pixel_baseline(images: Path) -> float:
    """Top-1 of the same kind of head, with C chosen on the same val images, on raw pixels."""
    pixels, labels = {}, {}
    for split in ("train", "val", "test"):
        paths = sorted((images / split).glob("*/*.jpg"))
        pixels[split] = np.stack([np.asarray(Image.open(path)).reshape(-1) / 255 for path in paths])
        labels[split] = [path.parent.name for path in paths]
    heads = [
        LogisticRegression(C=c, max_iter=2000).fit(pixels["train"], labels["train"])
        for c in (0.01, 0.1, 1, 10)
    ]
    best = max(heads, key=lambda head: head.score(pixels["val"], labels["val"]))
    return float(best.score(pixels["test"], labels["test"]))


if __name__ == "__main__":
    main()
