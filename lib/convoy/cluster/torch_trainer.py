"""Ray's TorchTrainer, whose workers' reservation is given back however the training ends, with or without dashboard."""

from __future__ import annotations

from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from convoy.cluster.reservation_keeper import ReservationKeeper

_RAYS_OWN = "PlacementGroupCleanerCallback"


class KeptTrainer(TorchTrainer):  # type: ignore[misc] # Ray has no types
    """A TorchTrainer with a cleaner that asks the controller itself whether it lives.

    Ray Train's own asks the dashboard. Where there is none it frees nothing, and the training waits 12 s for it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [*(one for one in callbacks if type(one).__name__ != _RAYS_OWN), _KeptReservation()]


class _KeptReservation(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Runs in the controller; leaves its reservations to a keeper on the head node, which is lost last."""

    def after_controller_start(self, train_run_context: Any) -> None:
        keeper = ray.remote(ReservationKeeper).options(
            num_cpus=0,
            resources={HEAD_NODE_RESOURCE_NAME: 0.001},
            scheduling_strategy="DEFAULT",
            lifetime="detached",
            max_concurrency=2,
        )
        self._keeper = keeper.remote(ray.get_runtime_context().current_actor)
        self._keeper.watch.remote()

    def after_worker_group_start(self, worker_group: Any) -> None:
        handle = worker_group.get_worker_group_state().placement_group_handle
        ray.get(self._keeper.keep.remote(handle.placement_group))

    async def before_controller_shutdown(self) -> None:
        ray.kill(self._keeper)

    def before_controller_abort(self) -> None:
        ray.kill(self._keeper)
