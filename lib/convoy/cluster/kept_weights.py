"""Networks with their weights from the workspace, compared with the digest that they are kept under."""

from __future__ import annotations

from torch import Tensor, nn

from convoy.core.errors import ChecksumMismatch
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis, native_px, require_recorded
from convoy.vision.folding import fold_batch_norms
from convoy.vision.stages import DepthAxis
from convoy.vision.weights import load_weights, read_state_dict, weights_digest


def open_network(
    store: ObjectStore, backbone: BackboneConfig, weights_key: str, num_classes: int | None
) -> tuple[nn.Module, DepthAxis]:
    """A network that is to predict and nothing else, with its kept weights, and its depth axis.

    BatchNorms are folded into convolutions. `num_classes` are those of its record, where it has one. Raises
    VersionMismatch and ChecksumMismatch like `require_recorded` and `read_kept_weights`.
    """
    network = build_network(backbone)
    axis = depth_axis(backbone, network)
    if num_classes is not None:
        require_recorded(backbone, axis, num_classes)
    load_weights(network, read_kept_weights(store, weights_key))
    fold_batch_norms(network, input_px=native_px(backbone))
    return network, axis


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
