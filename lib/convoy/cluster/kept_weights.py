"""Networks and heads with their weights from the workspace, compared with the digest that they are kept under."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from convoy.core.errors import ChecksumMismatch
from convoy.core.fingerprints import digest_bytes
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis, native_px, require_recorded
from convoy.vision.folding import fold_batch_norms
from convoy.vision.head_config import HeadSpec
from convoy.vision.heads import readout_of
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
    _require_same(weights_digest(state), key.split("/")[-2], store.uri(key))
    return state


def open_readout(
    store: ObjectStore,
    head: HeadSpec | None,
    head_key: str | None,
    output_groups: Sequence[Sequence[int]] | None,
) -> nn.Module | None:
    """As `readout_of`, with the tensors at `head_key`: `.../<digest>.safetensors`. ChecksumMismatch for other bytes."""
    data = None
    if head_key is not None:
        data = store.get(head_key).data
        wanted = head_key.rpartition("/")[2].partition(".")[0]
        _require_same(digest_bytes(data).hex(), wanted, store.uri(head_key))
    return readout_of(head, data, output_groups)


def _require_same(found: str, wanted: str, where: str) -> None:
    if found != wanted:
        raise ChecksumMismatch(
            f"the weights have the digest {found}, not the {wanted} that they are kept under",
            where=where,
            next_step="find out who changed the file; delete it, and the next job brings the weights again",
        )
