"""The nodes of a cluster, as plans need to know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# What workers and operators leave of the CPUs that they use, so that Ray's own tasks always find room.
CPUS_LEFT = 0.5
_COUNTED = ("CPU", "GPU", "memory", "object_store_memory")


def alive_nodes() -> list[dict[str, float]]:
    """The `CPU`, `GPU`, and bytes of `memory` and `object_store_memory` of each node that is alive."""
    # Whoever only plans must not wait for Ray.
    import ray  # noqa: PLC0415

    return [
        {name: float(node["Resources"].get(name, 0)) for name in _COUNTED}
        for node in ray.nodes()
        if node["Alive"]
    ]


def worker_nodes(nodes: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Those that can hold a worker or an operator, which need a CPU: a GPU beside none is of no use to them."""
    return [node for node in nodes if node["CPU"] >= 1]
