"""A network's weights from the workspace, compared with the digest that they are kept under."""

from __future__ import annotations

from torch import Tensor

from convoy.core.errors import ChecksumMismatch
from convoy.storage.object_store import ObjectStore
from convoy.vision.weights import read_state_dict, weights_digest


def read_kept_weights(store: ObjectStore, key: str) -> dict[str, Tensor]:
    """The tensors at `models/backbones/<digest>/model.safetensors`.

    ChecksumMismatch if they have another digest: a run that goes on must not go on with other weights.
    """
    state = read_state_dict(store.get(key).data)
    wanted, found = key.split("/")[-2], weights_digest(state)
    if found != wanted:
        raise ChecksumMismatch(
            f"the weights have the digest {found}, not the {wanted} that they are kept under",
            where=store.uri(key),
            next_step="find out who changed the file; delete it, and the next job brings the network again",
        )
    return state
