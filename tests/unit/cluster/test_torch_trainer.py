"""What Convoy changes in Ray Train's controller, on Ray's own code without its processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.worker_group import placement_group_handle, worker_group

from convoy.cluster.torch_trainer import tell_of_reservations


@dataclass
class Events:
    """What happened, in its order."""

    seen: list[str] = field(default_factory=list)

    def wait(self, timeout_s: float) -> bool:
        """As a reservation for which there is no room."""
        self.seen.append("waited")
        return False


def test_a_reservation_is_told_of_before_its_workers_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events()
    group_class = worker_group.WorkerGroup
    # Undone at the end of the test, with what is wrapped around it.
    monkeypatch.setattr(group_class, "_create_placement_group", group_class._create_placement_group)
    monkeypatch.setattr(worker_group, "placement_group", lambda **asked: events)
    monkeypatch.setattr(placement_group_handle, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(
        group_class, "_check_cluster_resources_and_raise_if_insufficient", lambda *resources: None
    )
    context = SimpleNamespace(
        resources_per_worker={"CPU": 1}, num_workers=1, placement_strategy="PACK", label_selector=None
    )
    run = SimpleNamespace(
        run_config=SimpleNamespace(storage_context=None), scaling_config=ScalingConfig(), backend_config=None
    )
    tell_of_reservations(lambda reservation: events.seen.append("told"))
    with pytest.raises(WorkerGroupStartupTimeoutError):
        group_class.create(run, context)
    assert events.seen == ["told", "waited"]
