"""Ray's TorchTrainer, whose workers' reservation is given back however the training ends, with or without dashboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.util.placement_group import PlacementGroup

from convoy.cluster.reservation_keeper import ReservationKeeper

_RAYS_OWN = "PlacementGroupCleanerCallback"


class KeptTrainer(TorchTrainer):  # type: ignore[misc] # Ray has no types
    """A TorchTrainer with a cleaner that asks the controller itself whether it lives.

    Ray Train's own asks the dashboard. Where there is none it frees nothing, and the training waits 12 s for it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [*(one for one in callbacks if type(one).__name__ != _RAYS_OWN), _KeptReservation()]


def tell_of_reservations(told: Callable[[PlacementGroup], object]) -> None:
    """From now on tell of what each group of workers of this process reserves, before anyone waits for it.

    Ray Train's own callbacks come when the workers have started: what is killed while they start stayed reserved.
    """
    create = getattr(WorkerGroup, "_create_placement_group", None)
    if create is None:
        # Another Ray: a test says so, and trainings hear of a reservation when its workers have started.
        return

    def create_and_tell(group: WorkerGroup, *args: Any, **kwargs: Any) -> Any:
        handle = create(group, *args, **kwargs)
        told(handle.placement_group)
        return handle

    WorkerGroup._create_placement_group = create_and_tell


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
        tell_of_reservations(self._keep)

    def after_worker_group_start(self, worker_group: Any) -> None:
        # By now the keeper has started too, beside the workers.
        ray.get(self._keep(worker_group.get_worker_group_state().placement_group_handle.placement_group))

    def _keep(self, reservation: PlacementGroup) -> Any:
        return self._keeper.keep.remote(reservation)

    async def before_controller_shutdown(self) -> None:
        ray.kill(self._keeper)

    def before_controller_abort(self) -> None:
        ray.kill(self._keeper)
