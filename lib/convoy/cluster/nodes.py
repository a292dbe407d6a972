"""The nodes of a cluster, as plans need to know them."""

from __future__ import annotations

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
