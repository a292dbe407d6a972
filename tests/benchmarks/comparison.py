"""From the runs of all ways to spreads and ratios."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import harmonic_mean, median
from typing import Any, TypeVar

import torch
from bounds import Bounds
from measuring import WayResult

from convoy.core.config import StrictModel
from convoy.vision.engine_options import Precision

OURS, OURS_FP32, RAY_DOCS = "ours", "ours_fp32", "ray_docs"
DATALOADER, DATALOADER_TUNED = "dataloader", "dataloader_tuned"

BoundsT = TypeVar("BoundsT", bound=StrictModel)


@dataclass(frozen=True, slots=True)
class Runs:
    """All results of one image set: of each way, and of the bounds, one for every repeat, in order."""

    ways: dict[str, list[WayResult]] = field(default_factory=lambda: defaultdict(list))
    bounds: list[Bounds] = field(default_factory=list)


def with_workers(way: str, workers: int) -> str:
    """The name of a DataLoader way with a number of worker processes."""
    return f"{way}_workers_{workers}"


def describe_runs(runs: Runs) -> dict[str, Any]:
    """Ratios first, then for every way and bound the lowest, median and highest value, and all of them."""
    return {
        "ratios": {name: spread(values) for name, values in _ratios(runs).items()},
        "best_workers": {way: _best(runs, way) for way in (DATALOADER, DATALOADER_TUNED)},
        "ways": {way: describe_way(results) for way, results in runs.ways.items()},
        "bounds": {
            name: spread([getattr(bounds, name) for bounds in runs.bounds])
            for name, rate in runs.bounds[0]
            if isinstance(rate, float)
        },
    }


def halfway(before: BoundsT, after: BoundsT) -> BoundsT:
    """The bounds between two looks at a machine that changes its pace: the mean of the seconds of an image."""
    return type(before).model_validate(_halfway(before.model_dump(), after.model_dump()))


def _halfway(before: Any, after: Any) -> Any:
    if isinstance(before, dict):
        return {key: _halfway(one, after[key]) for key, one in before.items()}
    return harmonic_mean([before, after]) if isinstance(before, float) else before


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Lowest, median and highest of some values, and the values in order."""
    return {"min": min(values), "median": median(values), "max": max(values), "all": list(values)}


def _ratios(runs: Runs) -> dict[str, list[float]]:
    """How many times as fast our job is; each repeat against its own neighbours, since machines change pace."""
    precisions = [Precision(result.details["precision"]) for result in runs.ways[OURS]]
    paired = list(zip(runs.bounds, precisions, strict=True))
    combined = [bounds.combined(precision) for bounds, precision in paired]
    shares = [result.details["others_share"] for result in runs.ways[OURS]]
    ours, ours_fp32 = _rates(runs, OURS), _rates(runs, OURS_FP32)
    peers = {way: _rates(runs, name) for way, name in _peers(runs).items()}
    walls = {way: [result.wall_s for result in runs.ways[name]] for way, name in _peers(runs).items()}
    our_walls = [result.wall_s for result in runs.ways[OURS]]
    return {
        "ratio_to_bound": divide(ours, [bounds.forward(precision) for bounds, precision in paired]),
        "ratio_to_combined_bound": divide(ours, combined),
        "ratio_to_remaining_bound": divide(ours, remaining_bounds(combined, shares)),
        **{f"ratio_to_{way}": divide(ours, rates) for way, rates in peers.items()},
        "fp32_ratio_to_bound": divide(ours_fp32, [bounds.forward_fp32 for bounds in runs.bounds]),
        **{f"fp32_ratio_to_{way}": divide(ours_fp32, peers[way]) for way in (RAY_DOCS, DATALOADER)},
        **{f"wall_ratio_to_{way}": divide(peer_walls, our_walls) for way, peer_walls in walls.items()},
    }


def _peers(runs: Runs) -> dict[str, str]:
    """Each peer, and the way that is its best."""
    return {RAY_DOCS: RAY_DOCS, **{way: _best(runs, way) for way in (DATALOADER, DATALOADER_TUNED)}}


def best_way(rates: Mapping[str, Sequence[float]], way: str) -> str:
    """The number of workers with the highest median rate, as the name of a way."""
    names = [name for name in rates if name.startswith(f"{way}_workers_")]
    return max(names, key=lambda name: median(rates[name]))


def _best(runs: Runs, way: str) -> str:
    return best_way({name: _rates(runs, name) for name in runs.ways}, way)


def _rates(runs: Runs, way: str) -> list[float]:
    return [result.images_per_s for result in runs.ways[way]]


def divide(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """The quotient of each pair."""
    return [one / other for one, other in zip(ones, others, strict=True)]


def remaining_bounds(bounds: Sequence[float], shares: Sequence[float | None]) -> list[float]:
    """What is left of bounds of cores, of which the driver and Ray take a share; a GPU's they do not touch."""
    if torch.cuda.is_available():
        return list(bounds)
    return [bound * (1 - (share or 0.0)) for bound, share in zip(bounds, shares, strict=True)]


def describe_way(results: Sequence[WayResult]) -> dict[str, Any]:
    """Lowest, median and highest of what the runs of a way measured, and their details."""
    described: dict[str, Any] = {
        name: spread([getattr(result, name) for result in results])
        for name in ("images_per_s", "first_row_s", "wall_s")
    }
    details = [result.details for result in results if result.details]
    return {**described, "details": details} if details else described
