"""`convoy bench near_duplicates`: how many planted near duplicates are found, and how many others with them.

    python tests/benchmarks/near_duplicates.py [key=value ...]

Real images are compressed again, resized and cropped, one copy an original, and put among the others. Features are
those that `convoy inspect` takes, of a CIFAR-10 ResNet. Progress goes to stderr; the last line on stdout is the report
as JSON. The keys are the fields of `NearDuplicatesBench`.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from images import real_data
from machine import describe_machine, machine_facts
from measuring import BenchSettings, run_benchmark, say
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from convoy.core.embedding import NEAR_DUPLICATE_THRESHOLD, find_near_duplicates
from convoy.core.errors import ConfigError
from convoy.core.records import SampleRejected
from convoy.pipelines.near_duplicates import joined_taps, near_duplicate_taps
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image, quiet_decoders
from convoy.vision.presets import EvalPreset
from convoy.vision.tapping import TappedNetwork
from convoy.vision.views import normalise, prepare_view
from convoy.vision.weights import load_weights, read_state_dict

_WEIGHTS = "cifar10-resnets"
# 32 pixels are what these networks take; larger images are resized as any job would.
_PRESET = EvalPreset(resize_px=32, crop_px=32)
_BATCH = 128


class ImageSource(NamedTuple):
    """An archive of real images, the folder of those that are used, and how many of them."""

    archive: str
    folder: str
    num_images: int


SOURCES = {
    "ImageNet": ImageSource("imagenet-250.tar", "", 250),
    "CIFAR-10 JPEG, test": ImageSource("cifar10-jpeg.tar.gz", "test", 4000),
    "sign digits": ImageSource("sign-digits-jpeg.tar.gz", "", 1000),
}


class NearDuplicatesBench(BenchSettings):
    """What is measured: of each set, one copy of every `every`-th image, over `thresholds` and at the default one.

    `data` is the folder with the archives and weights; `scale_rows` made rows of `scale_features` are timed.
    """

    data: str | None = None
    weights: str = "resnet56"
    every: int = Field(default=10, gt=1)
    thresholds: tuple[float, ...] = (0.2, 0.25, 0.3, NEAR_DUPLICATE_THRESHOLD, 0.4, 0.45, 0.5)
    scale_rows: int = Field(default=20_000, ge=1000)
    scale_features: int = Field(default=512, gt=0)
    seed: int = Field(default=0, ge=0)


class Planted(NamedTuple):
    """Images among which copies are: of each image its bytes, its original's number, and what was done to it."""

    data: list[bytes]
    origin: list[int]
    change: list[str]


def plant(originals: Sequence[bytes], every: int, seed: int) -> Planted:
    """The originals, and behind them a changed copy of every so many of them, all changes in turn."""
    random = np.random.default_rng(seed)
    data, origin, change = list(originals), list(range(len(originals))), ["original"] * len(originals)
    for turn, number in enumerate(range(0, len(originals), every)):
        name = _CHANGES[turn % len(_CHANGES)]
        with Image.open(io.BytesIO(originals[number])) as image:
            copy = _changed(image.convert("RGB"), name, random)
        data.append(copy)
        origin.append(number)
        change.append(name)
    return Planted(data, origin, change)


_CHANGES = ("JPEG 60", "JPEG 30", "resized 50-80 %", "cropped to 95 %", "cropped to 90 %", "cropped to 80 %")


def _changed(image: Image.Image, name: str, random: np.random.Generator) -> bytes:
    kind, _, amount = name.partition(" ")
    if kind == "JPEG":
        return _jpeg(image, int(amount))
    if kind == "resized":
        share = random.uniform(0.5, 0.8)
        size = (max(8, round(image.width * share)), max(8, round(image.height * share)))
        return _jpeg(image.resize(size, Image.Resampling.BICUBIC), 90)
    share = int(amount.split()[1]) / 100
    width, height = round(image.width * share), round(image.height * share)
    left, top = random.integers(0, [image.width - width + 1, image.height - height + 1]).tolist()
    return _jpeg(image.crop((left, top, left + width, top + height)), 90)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def read_images(source: ImageSource, data: str | None, seed: int) -> list[bytes]:
    """Images of an archive that can be decoded, drawn by the seed."""
    archive = real_data(source.archive, data)
    if archive is None:
        raise ConfigError(
            f"there is no {source.archive}", where=data or "", next_step="name its folder by data=FOLDER"
        )
    with tarfile.open(archive) as tar:
        members = [one for one in tar.getmembers() if _is_image(one, source.folder)]
        chosen = np.random.default_rng(seed).permutation(len(members))[: source.num_images]
        # In the order of the archive: a compressed one is read once.
        wanted = {members[place].name for place in chosen}
        found = (tar.extractfile(one) for one in members if one.name in wanted)
        images = [file.read() for file in found if file is not None]
    return [image for image in images if _is_decodable(image)]


def _is_image(member: tarfile.TarInfo, folder: str) -> bool:
    path = PurePosixPath(member.name)
    return (
        member.isfile() and path.suffix.lower() in {".jpg", ".jpeg"} and (not folder or folder in path.parts)
    )


def _is_decodable(data: bytes) -> bool:
    try:
        decode_image(data, DecodeRule())
    except SampleRejected:
        return False
    return True


class Backbone:
    """A CIFAR-10 ResNet at the taps of the finder."""

    def __init__(self, name: str, data: str | None) -> None:
        folder = real_data(_WEIGHTS, data)
        files = sorted(folder.glob(f"{name}-*")) if folder else []
        if not files:
            raise ConfigError(
                f"there are no weights {name}", where=_WEIGHTS, next_step="name their folder by data=FOLDER"
            )
        config = BackboneConfig(arch=f"cifar_{name}", weights=str(files[0]), preset=_PRESET)
        network = build_network(config)
        load_weights(network, read_state_dict(files[0].read_bytes()))
        axis = depth_axis(config, network)
        self.taps = near_duplicate_taps(axis)
        self._tapped = TappedNetwork(network, axis, self.taps)

    @torch.no_grad()
    def features(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """Features as the cache holds them: in float16."""
        by_tap: dict[str, list[NDArray[np.float16]]] = defaultdict(list)
        for start in range(0, len(images), _BATCH):
            for tap, values in self._tapped(
                normalise(_batch(images[start : start + _BATCH]), _PRESET)
            ).items():
                by_tap[tap].append(values.numpy().astype(np.float16))
        return joined_taps([np.concatenate(by_tap[tap]) for tap in self.taps])


def _batch(images: Sequence[bytes]) -> torch.Tensor:
    batch_BCHW = torch.empty(len(images), 3, _PRESET.crop_px, _PRESET.crop_px, dtype=torch.uint8)
    for data, image_CHW in zip(images, batch_BCHW, strict=True):
        pixels_CHW = decode_image(data, DecodeRule()).pixels_CHW
        prepare_view(pixels_CHW, _PRESET, image_CHW, view=0, policy=None, content_id=b"")
    return batch_BCHW


def measure(features_ND: NDArray[np.float32], planted: Planted, threshold: float) -> dict[str, Any]:
    """Precision and recall over pairs of images in one group; `others` are pairs that were not planted.

    Some of these may be real: nobody looked for duplicates among the originals.
    """
    names = [str(row) for row in range(len(planted.data))]
    found = find_near_duplicates(features_ND, names, threshold)
    pairs = {
        tuple(sorted(map(int, pair))) for group in found.groups for pair in combinations(group.sample_ids, 2)
    }
    copies = [row for row, change in enumerate(planted.change) if change != "original"]
    hits = defaultdict(list)
    for row in copies:
        hits[planted.change[row]].append((planted.origin[row], row) in pairs)
    others = sorted(pair for pair in pairs if planted.origin[pair[0]] != planted.origin[pair[1]])
    true_pairs = len(pairs) - len(others)
    return {
        "threshold": threshold,
        "precision": true_pairs / len(pairs) if pairs else None,
        "recall": float(np.mean([hit for some in hits.values() for hit in some])),
        "recall_by_change": {change: float(np.mean(hits[change])) for change in _CHANGES if hits[change]},
        "pairs": len(pairs),
        "others": len(others),
    }


def measure_scale(settings: NearDuplicatesBench) -> dict[str, float]:
    """Seconds over made rows, on the threads that NumPy takes."""
    random = np.random.default_rng(settings.seed)
    features_ND = random.random((settings.scale_rows, settings.scale_features), np.float32)
    started_s = time.perf_counter()
    find_near_duplicates(features_ND, [str(row) for row in range(settings.scale_rows)])
    return {
        "rows": settings.scale_rows,
        "features": settings.scale_features,
        "seconds": time.perf_counter() - started_s,
    }


def run_near_duplicates_bench(settings: NearDuplicatesBench) -> dict[str, Any]:
    """For each set of images what is found at the default threshold, and at the others."""
    quiet_decoders()
    backbone = Backbone(settings.weights, settings.data)
    sets = {}
    for name, source in SOURCES.items():
        say(f"{name}: planting and computing features")
        planted = plant(read_images(source, settings.data, settings.seed), settings.every, settings.seed)
        features_ND = backbone.features(planted.data)
        curve = [measure(features_ND, planted, threshold) for threshold in settings.thresholds]
        sets[name] = {
            "images": len(planted.data),
            "planted": len(planted.change) - planted.change.count("original"),
            "default": measure(features_ND, planted, NEAR_DUPLICATE_THRESHOLD),
            "curve": curve,
        }
    say("timing made rows")
    return {
        "sets": sets,
        "taps": backbone.taps,
        "scale": measure_scale(settings),
        "machine": machine_facts(),
        "settings": settings.model_dump(mode="json"),
    }


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown."""
    path.write_text("\n".join(_page(report)) + "\n", encoding="utf-8")


def _page(report: dict[str, Any]) -> Iterator[str]:
    settings, scale = report["settings"], report["scale"]
    yield "# `convoy bench near_duplicates`"
    yield ""
    yield (
        f"Every {settings['every']}th image of three real sets was copied once: compressed again, resized or"
        f" cropped at a random place (JPEG 90 then). Features of a CIFAR-10 {settings['weights']} at"
        f" {', '.join(report['taps'])}, at 32 pixels, in float16. Default threshold: {NEAR_DUPLICATE_THRESHOLD}."
    )
    yield ""
    yield (
        f"- {scale['rows']} made rows of {scale['features']} features: {scale['seconds']:.1f} s; time grows with the"
        " square of the rows"
    )
    yield from describe_machine(report["machine"])
    yield ""
    yield "At the default threshold; `others` are pairs that were not planted, some of which are real:"
    yield ""
    yield f"| images | copies | precision | recall | others | {' | '.join(_CHANGES)} |"
    yield f"| --- | ---: | ---: | ---: | ---: | {' | '.join(['---:'] * len(_CHANGES))} |"
    for name, one in report["sets"].items():
        cells = [name, str(one["planted"]), *_rates(one["default"])]
        cells += [
            f"{one['default']['recall_by_change'].get(change, float('nan')):.2f}" for change in _CHANGES
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "Precision / recall by threshold:"
    yield ""
    thresholds = settings["thresholds"]
    yield f"| images | {' | '.join(str(threshold) for threshold in thresholds)} |"
    yield f"| --- | {' | '.join(['---:'] * len(thresholds))} |"
    for name, one in report["sets"].items():
        yield f"| {name} | {' | '.join(_pairs(one['curve']))} |"


def _rates(measured: dict[str, Any]) -> list[str]:
    return [_share(measured["precision"]), _share(measured["recall"]), str(measured["others"])]


def _pairs(curve: Iterable[dict[str, Any]]) -> list[str]:
    return [f"{_share(one['precision'])} / {_share(one['recall'])}" for one in curve]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    run_benchmark(NearDuplicatesBench, run_near_duplicates_bench, write_page)
