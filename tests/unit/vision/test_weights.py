from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convoy.core.errors import ChecksumMismatch, ConfigError, DataError, StoreUnavailable
from convoy.vision.architectures import CifarResNet, LeNet5
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_pretrained
from convoy.vision.weights import (
    adapt_published,
    load_weights,
    read_state_dict,
    require_digest,
    state_to_safetensors,
    weights_digest,
)

State = dict[str, Tensor]
CLASSIFIER = ("4.weight", "4.bias")
REAL_DATA = Path(os.environ.get("CONVOY_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))


def small_network(num_classes: int = 3) -> nn.Module:
    torch.manual_seed(num_classes)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )


@pytest.fixture
def state() -> State:
    return {name: tensor.clone() for name, tensor in small_network().state_dict().items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "pack",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "best_prec1": 91.7},
        lambda state: {"model": state, "model_ema": {}, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model_state": prefixed("module.", state)},
        lambda state: {"state_dict": {"model": prefixed("_orig_mod.", state)}},
        lambda state: prefixed("module._orig_mod.", state),
        lambda state: {"state_dict": {"0.weight": torch.zeros(1)}, "state_dict_ema": state},
        lambda state: {"model": {"0.weight": torch.zeros(1)}, "model_ema": prefixed("module.", state)},
        lambda state: {"state_dict": state, "state_dict_ema": None},
        lambda state: {"model_ema": {**prefixed("module.", state), "n_averaged": torch.tensor(9)}},
    ],
)
def test_state_dicts_are_found_in_what_training_programs_save(
    pack: Callable[[State], Any], state: State, tmp_path: Path
) -> None:
    assert same(read_state_dict(saved(pack(state), tmp_path / "weights.pth")), state)


def test_the_content_tells_the_format_and_not_the_name(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(state_to_safetensors(state))
    assert same(read_state_dict(path), state)
    assert same(read_state_dict(path.read_bytes()), state)


def test_the_old_format_of_torch_is_read(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.th", _use_new_zipfile_serialization=False)
    assert same(read_state_dict(tmp_path / "old.th"), state)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_bomb_does_not_run(state: State, tmp_path: Path) -> None:
    target = tmp_path / "exploded"
    files = [saved({**state, "bomb": Bomb(target)}, tmp_path / "new.pth"), tmp_path / "plain.pth"]
    files[1].write_bytes(pickle.dumps(Bomb(target), protocol=2))
    for path in files:
        with pytest.raises(DataError, match="could run code") as caught:
            read_state_dict(path)
        assert "weights_only" not in str(caught.value)
    assert not target.exists()
    pickle.loads(files[1].read_bytes())
    assert target.exists(), "the bomb must be live, or this test proves nothing"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>404</html>",
        b"PK\x03\x04 cut",
        b"\x80\x02}q\x00.",
        (9).to_bytes(8, "little") + b"{not json",
    ],
)
def test_bytes_that_are_no_weights_are_an_error(data: bytes) -> None:
    with pytest.raises(DataError, match="no plain state dict"):
        read_state_dict(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "it is empty"), (b"epoch,top1\n", "a file of another kind"), (b"\x80\x02.", "it is damaged")],
)
def test_what_is_no_weight_file_is_named_with_what_is_wrong_and_what_to_do(
    data: bytes, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(DataError, match=why) as caught:
            read_state_dict(source, where=str(path))
        assert caught.value.where == str(path)
        assert not caught.value.what.endswith(" ")
        assert "bring the file" in caught.value.next_step


@given(st.binary(max_size=64))
@settings(max_examples=50)
def test_no_bytes_raise_anything_but_our_error(data: bytes) -> None:
    with pytest.raises(DataError):
        read_state_dict(data)


def test_truncated_files_are_an_error(state: State, tmp_path: Path) -> None:
    for data in (state_to_safetensors(state), saved(state, tmp_path / "w.pt").read_bytes()):
        with pytest.raises(DataError):
            read_state_dict(data[: len(data) // 2])


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_state_dict(tmp_path / "absent.pt")


def test_loading_copies_everything(state: State) -> None:
    network = small_network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert load_weights(network, state) == ()
    assert same(dict(network.state_dict()), state)


@pytest.mark.parametrize("wrapper", ["backbone", "module"])
def test_a_prefix_that_all_names_share_matches_on_either_side(wrapper: str, state: State) -> None:
    inner = small_network(num_classes=3)
    wrapped = nn.Module()
    wrapped.add_module(wrapper, small_network(num_classes=3))
    assert load_weights(wrapped, state) == ()
    assert load_weights(inner, prefixed(f"{wrapper}.", state)) == ()


def test_files_without_batch_counters_load(state: State) -> None:
    del state["1.num_batches_tracked"]
    assert load_weights(small_network(), state) == ()


def test_a_difference_is_shown_and_nothing_is_copied(state: State) -> None:
    network = small_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state["5.bias"] = state.pop("4.bias")
    state["0.weight"] = torch.zeros(4, 3, 5, 5)
    with pytest.raises(ConfigError) as caught:
        load_weights(network, state)
    for line in (
        "missing in the weights: 4.bias",
        "unknown to the network: 5.bias",
        "0.weight (4, 3, 5, 5), in the network (4, 3, 3, 3)",
    ):
        assert line in caught.value.what
    assert same(dict(network.state_dict()), before)


def test_long_differences_are_cut() -> None:
    with pytest.raises(ConfigError, match=r"and \d+ more"):
        load_weights(CifarResNet(20), dict(LeNet5().state_dict()))


def test_a_classifier_of_several_layers_is_replaced_where_it_differs() -> None:
    """As that of RepViT, which has one more for distillation, each with a norm."""

    def network(num_classes: int) -> nn.Module:
        heads = {
            name: nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, num_classes))
            for name in ("head", "distilled")
        }
        return nn.ModuleDict({"stem": nn.Linear(2, 2), **heads})

    trained, new = network(3), network(7)
    nn.init.uniform_(trained["head"][0].weight)
    classifier = [name for name, _ in new.named_parameters() if not name.startswith("stem")]
    layers = ("head.1.weight", "head.1.bias", "distilled.1.weight", "distilled.1.bias")
    assert load_weights(new, trained.state_dict(), new_classifier=classifier) == layers
    assert torch.equal(new["head"][0].weight, trained["head"][0].weight)
    # As many classes, which are others.
    alike = network(3)
    assert load_weights(alike, trained.state_dict(), new_classifier=classifier, num_new_classes=3) == layers


def test_another_number_of_classes_is_refused_or_replaced(state: State) -> None:
    network = small_network(num_classes=7)
    head = network[4].weight.clone()
    with pytest.raises(ConfigError, match=r"4\.weight \(3, 4\), in the network \(7, 4\)"):
        load_weights(network, state)
    assert load_weights(network, state, new_classifier=CLASSIFIER) == CLASSIFIER
    assert torch.equal(network[4].weight, head)
    assert torch.equal(network[0].weight, state["0.weight"])


def test_as_many_other_classes_are_replaced_and_nothing_else(state: State) -> None:
    network = small_network()
    with torch.no_grad():
        network[4].weight.zero_()
        network[4].bias.zero_()
    assert load_weights(network, state, new_classifier=CLASSIFIER, num_new_classes=3) == CLASSIFIER
    assert not network[4].weight.any()
    assert torch.equal(network[0].weight, state["0.weight"])
    assert load_weights(network, state, new_classifier=CLASSIFIER) == ()
    assert torch.equal(network[4].weight, state["4.weight"])


def test_replacing_the_head_excuses_no_other_difference(state: State) -> None:
    narrow = nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    )
    with pytest.raises(ConfigError, match="of another shape"):
        load_weights(narrow, state, new_classifier=CLASSIFIER)
    del state["4.weight"]
    with pytest.raises(ConfigError, match=r"missing in the weights: 4\.weight"):
        load_weights(small_network(num_classes=7), state, new_classifier=CLASSIFIER)


def test_a_classifier_that_the_weights_lack_is_new(state: State) -> None:
    network = small_network()
    classifier = network[4].weight.clone()
    headless = {name: tensor for name, tensor in state.items() if name not in CLASSIFIER}
    with pytest.raises(ConfigError, match=r"missing in the weights: 4\.weight, 4\.bias"):
        load_weights(network, headless)
    assert load_weights(network, headless, new_classifier=CLASSIFIER) == CLASSIFIER
    assert torch.equal(network[4].weight, classifier)
    assert torch.equal(network[0].weight, state["0.weight"])
    wrapped = nn.Module()
    wrapped.add_module("backbone", network)
    assert (
        load_weights(wrapped, headless, new_classifier=("backbone.4.weight", "backbone.4.bias")) == CLASSIFIER
    )


@pytest.mark.parametrize("heads", [("aux1", "aux2"), ("AuxLogits",)])
def test_auxiliary_classifiers_of_a_file_are_left_out_where_the_network_has_none(
    heads: tuple[str, ...],
) -> None:
    with_heads = nn.ModuleDict({"fc": nn.Linear(2, 3), **{head: nn.Linear(2, 3) for head in heads}})
    published, network = with_heads.state_dict(), nn.ModuleDict({"fc": nn.Linear(2, 3)})
    with pytest.raises(ConfigError, match="unknown to the network"):
        load_weights(network, published)
    assert load_weights(network, adapt_published(published, network)) == ()
    assert torch.equal(network["fc"].weight, published["fc.weight"])
    assert same(adapt_published(published, with_heads), published)


def test_files_of_densenet_from_before_names_had_no_dots_load() -> None:
    with torch.device("meta"):
        network = torchvision.models.densenet121(weights=None)
    own = network.state_dict()
    published = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): own[name] for name in own}
    assert "features.denseblock1.denselayer1.norm.1.weight" in published
    assert adapt_published(published, network).keys() == own.keys()
    assert load_weights(network, adapt_published(published, network)) == ()


def test_a_pinned_digest_refuses_changed_weights(state: State) -> None:
    pin = weights_digest(state)
    assert require_digest(state, pin) == require_digest(state, None) == pin
    state["0.weight"][0, 0, 0, 0] += 1
    with pytest.raises(ChecksumMismatch, match=pin):
        require_digest(state, pin)


def test_the_digest_is_one_for_every_format(state: State, tmp_path: Path) -> None:
    files = [
        saved({"state_dict": prefixed("module.", state)}, tmp_path / "a.th"),
        saved(dict(reversed(state.items())), tmp_path / "b.pt"),
        tmp_path / "c.safetensors",
    ]
    files[2].write_bytes(state_to_safetensors(state))
    assert {weights_digest(read_state_dict(path)) for path in files} == {weights_digest(state)}


def test_the_digest_sees_names_types_shapes_and_values(state: State) -> None:
    changed = [
        {**state, "0.bias": state["0.bias"] + 1e-6},
        {**state, "0.bias": state["0.bias"].double()},
        {**state, "0.bias": state["0.bias"].reshape(2, 2)},
        {("9.bias" if name == "0.bias" else name): tensor for name, tensor in state.items()},
        {name: tensor for name, tensor in state.items() if name != "0.bias"},
    ]
    digests = {weights_digest(other) for other in (state, *changed)}
    assert len(digests) == 1 + len(changed)


def test_the_digest_is_fixed() -> None:
    """A public contract: feature caches are keyed by it."""
    state = {
        "w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "h": torch.ones(2, dtype=torch.bfloat16),
    }
    assert weights_digest(state) == "792b75a9e1e9e71f097741f08618c55d"


def test_safetensors_are_the_same_bytes_for_the_same_values() -> None:
    network = CifarResNet(20)
    first = state_to_safetensors(network.state_dict())
    shuffled = dict(reversed(list(network.to(memory_format=torch.channels_last).state_dict().items())))
    assert state_to_safetensors(shuffled) == first


def test_shared_tensors_are_written_under_both_names() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    read = safetensors.torch.load(state_to_safetensors(network.state_dict()))
    assert torch.equal(read["0.weight"], read["1.weight"])


def test_a_published_file_and_its_safetensors_twin_have_one_digest() -> None:
    path = REAL_DATA / "cifar10-resnets/resnet20-12fca82f.th"
    if not path.exists():
        pytest.skip(f"no real weights in {REAL_DATA}; set CONVOY_TEST_DATA")
    published = read_state_dict(path)
    network = CifarResNet(20)
    load_weights(network, published)
    twin = read_state_dict(state_to_safetensors(network.state_dict()))
    assert weights_digest(twin) == weights_digest(published)


def test_named_weights_of_an_unreachable_library_are_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable, match="could not be downloaded"):
        build_pretrained(BackboneConfig(arch="torchvision:squeezenet1_1"))
