"""The path of a linear head: a point for each C, begun at the one before, and kept where a killed fit finds it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from convoy.core.fingerprints import digest, digest_bytes
from convoy.vision.head_config import HeadConfig
from convoy.vision.head_objectives import FeatureScale, LinearObjective


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PathPoint:
    """Where L-BFGS stopped for a value of C: `parameters_P` of the objective, in float64, and how it went.

    `converged`: it reached the gradient's tolerance, or float64's resolution, within `max_iterations`.
    """

    parameters_P: NDArray[np.float64]
    num_iterations: int
    converged: bool
    seconds: float


class KeptPoints(Protocol):
    """Where points outlive the process. `fit` names what was fitted, as far as the moments of its rows tell.

    Who keeps points vouches for the rest: that labels, and what a teacher says, are those of the rows.
    """

    def get(self, fit: str, c: float) -> PathPoint | None:
        """The point that was kept, None where there is none."""

    def put(self, fit: str, c: float, point: PathPoint) -> None:
        """Keep a point."""


def path_points(
    config: HeadConfig, objective: LinearObjective, scale: FeatureScale, kept: KeptPoints | None
) -> Iterator[tuple[float, PathPoint, bool]]:
    """Each C from strong to weak regularisation, its point, and whether it was kept from an earlier process.

    SciPy's L-BFGS-B rather than torch.optim.LBFGS: it works in float64, its line search (Moré and Thuente
    1994) survives the flat end of a path, and it says why it stopped.
    """
    fit = _fit_digest(config, objective, scale)
    parameters_P = np.zeros(objective.num_parameters)
    for c in sorted(set(config.C)):
        known = None if kept is None else kept.get(fit, c)
        point = known or _solve(config, objective, parameters_P, c)
        if kept is not None and known is None:
            kept.put(fit, c, point)
        parameters_P = point.parameters_P
        yield c, point, known is not None


def _solve(
    config: HeadConfig, objective: LinearObjective, start_P: NDArray[np.float64], c: float
) -> PathPoint:
    started_s = time.monotonic()
    result = minimize(
        objective.value_and_gradient,
        start_P,
        args=(c,),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": config.max_iterations,
            "maxfun": 20 * config.max_iterations,
            "maxls": 50,
            "gtol": config.gradient_tolerance,
            "ftol": 64 * np.finfo(np.float64).eps,
        },
    )
    return PathPoint(
        parameters_P=result.x,
        num_iterations=int(result.nit),
        converged=bool(result.success or np.abs(result.jac).max() <= config.gradient_tolerance),
        seconds=time.monotonic() - started_s,
    )


def _fit_digest(config: HeadConfig, objective: LinearObjective, scale: FeatureScale) -> str:
    """Of what determines the path, as far as one pass shows it; other sums of a last bit cost a fit, and no more."""
    moments = [digest_bytes(tensor.numpy().tobytes()) for tensor in (scale.mean_D, scale.std_D)]
    return digest([config, objective.num_parameters, scale.num_rows, scale.total_weight, moments])
