"""State dicts: read from any usual file, checked against a network, written as safetensors, and digested."""

from __future__ import annotations

import argparse
import io
import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from convoy.core.errors import ChecksumMismatch, ConfigError, DataError
from convoy.core.fingerprints import digest, digest_bytes

# Under these keys training programs keep the state dict, beside optimiser states and counters. Averaged weights come
# first, as in timm: they are what the programs report.
_CONTAINERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "weights",
)
# DataParallel and AveragedModel put the first before every name, torch.compile the second.
_WRAPPERS = ("module.", "_orig_mod.")
# Networks with a head of their own keep what other programs call the whole network under this.
_BACKBONE = "backbone."
# BatchNorm counts its batches; no prediction depends on the count, and older files lack it.
_BATCH_COUNTER = "num_batches_tracked"
# The files of torchvision have names from before dots in them were forbidden, and heads that serve training only.
_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_AUXILIARY_HEADS = ("AuxLogits.", "aux1.", "aux2.")
_MAX_LISTED = 5


def read_state_dict(source: bytes | str | Path, *, where: str = "weights") -> dict[str, Tensor]:
    """The tensors of a weight file on the CPU, by name, without containers and the prefixes of wrappers.

    Where a file has the last weights of a training and their average (EMA), these are the average. Reads safetensors,
    and PyTorch files in the mode that runs no code. Raises ConfigError for a path that cannot be read, and DataError
    for anything that is no plain state dict, which names `where` bytes come from.
    """
    data = source if isinstance(source, bytes) else _read(Path(source))
    where = where if isinstance(source, bytes) else str(source)
    if not data:
        raise _no_state_dict("it is empty", where)
    content: Any = _load_safetensors(data, where) if _is_safetensors(data) else _load_pickle(data, where)
    tensors = _unpacked(content)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise _no_state_dict("it holds other things than named tensors", where)
    return _without_wrappers(tensors)


def adapt_published(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a published file for a network, as torchvision itself takes its own.

    Names of DenseNet's layers are those of today, and auxiliary classifiers that the network lacks are left out. What
    the network has under the file's names stays as it is.
    """
    own = network.state_dict().keys()
    named = {
        name if name in own else _DENSE_LAYER.sub(r"\1\2", name): tensor for name, tensor in state.items()
    }
    return {
        name: tensor for name, tensor in named.items() if name in own or not name.startswith(_AUXILIARY_HEADS)
    }


def load_weights(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    new_classifier: Collection[str] = (),
    num_new_classes: int | None = None,
) -> tuple[str, ...]:
    """Copy a state dict into a network; returns the names that kept their initial values, () if none did.

    All names and shapes are checked before anything is copied; a difference is a ConfigError that shows it.
    The parameters named by `new_classifier` may differ in the number of classes, or all be absent, and then keep their
    initial values. With `num_new_classes`, as many as the network has, those with a row for each class keep theirs in
    any case: the weights know other classes.
    """
    own = network.state_dict()
    bare = dict(zip(own, _without_prefixes(own, (*_WRAPPERS, _BACKBONE)), strict=True))
    state, targets = _comparable(state), _comparable(own)
    replaced = _replaced(targets, state, [bare[name] for name in new_classifier], num_new_classes)
    if differences := _differences(targets, state, replaced):
        raise ConfigError(
            "the weights do not fit the network:\n" + "\n".join(differences),
            where=type(network).__name__,
            next_step="correct backbone.arch or num_classes; another number of classes needs a new head",
        )
    with torch.no_grad():
        for name in targets.keys() - set(replaced):
            targets[name].copy_(state[name])
    return replaced


def state_to_safetensors(state: Mapping[str, Tensor]) -> bytes:
    """A state dict as a safetensors file; equal names and values give equal bytes.

    Names that share one tensor are written each for itself, so that any reader finds all of them.
    """
    tensors = {
        name: tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in _without_wrappers(state).items()
    }
    return bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def state_below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """32 hex digits over names, types, shapes and values: the same for every file format and order of names.

    Left out is what predictions do not depend on: prefixes of wrappers, and BatchNorm's counts of batches.
    """
    return digest(
        [
            [name, str(tensor.dtype), list(tensor.shape), digest_bytes(_raw_bytes(tensor))]
            for name, tensor in sorted(_comparable(state).items())
        ]
    )


def require_digest(state: Mapping[str, Tensor], pinned: str | None) -> str:
    """The digest of some weights; ChecksumMismatch if another one is pinned."""
    found = weights_digest(state)
    if pinned not in (None, found):
        raise ChecksumMismatch(
            f"the weights have the digest {found}, not the pinned {pinned}",
            where="backbone.weights_digest",
            next_step="find out who changed the weights; then correct the pin or the weights",
        )
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the weight file cannot be read: {error.strerror}",
            where=str(path),
            next_step="check backbone.weights",
        ) from error


def _is_safetensors(data: bytes) -> bool:
    """Whether the bytes begin as safetensors do: the length of a header in JSON, and the header."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _load_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise _no_state_dict(f"it is damaged: {error}", where) from error
    return tensors


def _load_pickle(data: bytes, where: str) -> Any:
    try:
        # Training programs like to store their arguments beside the weights; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises to load without protection.
        raise _no_state_dict("it is damaged, or holds Python objects that could run code", where) from error
    except Exception as error:
        # Bytes of another kind can make an unpickler fail in any way, often without words.
        why = f"it is damaged, or a file of another kind ({type(error).__name__}: {error})"
        raise _no_state_dict(why, where) from error


def _no_state_dict(why: str, where: str) -> DataError:
    return DataError(
        f"the weight file is no plain state dict: {why}",
        where=where,
        next_step="bring the file as a training wrote it; where you trust it, save its weights alone:"
        " torch.save(model.state_dict(), path)",
    )


def _unpacked(content: Any) -> dict[Any, Any]:
    """The innermost of nested containers, without what AveragedModel adds to a model's own names."""
    while isinstance(content, Mapping):
        mappings = (content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping))
        inner = next((mapping for mapping in mappings if mapping), None)
        if inner is None:
            return {name: value for name, value in content.items() if name != "n_averaged"}
        content = inner
    return {}


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without the prefixes that all their names share."""
    return _without_prefixes(tensors, _WRAPPERS)


def _comparable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What tells one state of a network from another, under names that do not depend on what is around it."""
    bare = _without_prefixes(tensors, (*_WRAPPERS, _BACKBONE))
    return {name: tensor for name, tensor in bare.items() if not name.endswith(_BATCH_COUNTER)}


def _without_prefixes(tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    names = list(tensors)
    while names and (shared := next((p for p in prefixes if all(n.startswith(p) for n in names)), "")):
        names = [name.removeprefix(shared) for name in names]
    return dict(zip(names, tensors.values(), strict=True))


def _replaced(
    targets: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    classifier: Sequence[str],
    num_new_classes: int | None,
) -> tuple[str, ...]:
    """The classifier's names, if the state has none of them; else those that differ in nothing but the classes."""
    if not any(name in state for name in classifier):
        return tuple(classifier)
    by_class = {name for name in classifier if targets[name].shape[:1] == (num_new_classes,)}
    differing = by_class.union(_misshapen(targets, state)).intersection(classifier, state)
    return tuple(
        name for name in targets if name in differing and state[name].shape[1:] == targets[name].shape[1:]
    )


def _differences(
    targets: Mapping[str, Tensor], state: Mapping[str, Tensor], replaced: Sequence[str]
) -> list[str]:
    """One line for each way in which the names and shapes differ."""
    absent = [name for name in targets if name not in state and name not in replaced]
    shapes = [
        f"{name} {tuple(state[name].shape)}, in the network {tuple(targets[name].shape)}"
        for name in _misshapen(targets, state)
        if name not in replaced
    ]
    return [
        *_listed("missing in the weights", absent),
        *_listed("unknown to the network", [name for name in state if name not in targets]),
        *_listed("of another shape", shapes),
    ]


def _misshapen(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    return [name for name in targets if name in state and state[name].shape != targets[name].shape]


def _listed(label: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return [f"  {label}: {', '.join(names[:_MAX_LISTED])}{more}"]


def _raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
