"""Actors that live on the node of the process that makes them."""

from __future__ import annotations

from typing import Any


def actor_here(actor_class: type) -> Any:
    """A class as a Ray actor on this node, which no other node's loss takes away. It reserves no CPU."""
    # Whoever only plans must not wait for Ray.
    import ray  # noqa: PLC0415
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(actor_class)
