"""Networks for a training: their first weights, and their records once they are trained."""

from __future__ import annotations

import contextlib

from torch import Tensor, nn

from convoy.core.errors import ConfigError
from convoy.pipelines.backbone_loading import keep_network, read_backbone_state
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig, NewLayers, WeightSource, is_factory, weight_source
from convoy.vision.backbones import build_network, depth_axis, native_px
from convoy.vision.call_trace import run_on_shapes
from convoy.vision.heads import Head
from convoy.vision.partial_reuse import PartialReuseNetwork
from convoy.vision.presets import EvalPreset
from convoy.vision.stages import DepthAxis, StageKind
from convoy.vision.weights import load_weights, read_state_dict, state_below, state_to_safetensors


class NewNetwork:
    """A network before its training: with the pretrained weights of another in it, or with random ones."""

    def __init__(self, config: BackboneConfig) -> None:
        self.config = config
        self.network = build_network(config)
        if is_factory(config.arch):
            _refuse_other_than_logits(self.network, config)
        self.axis: DepthAxis = depth_axis(config, self.network)
        if self.axis.num_classes != config.num_classes:
            ending = (
                f"in {self.axis.num_classes} outputs" if self.axis.num_classes else "without a classifier"
            )
            raise ConfigError(
                f"the network ends {ending} for {config.num_classes} classes",
                where=config.arch,
                next_step="let the factory take num_classes and end in a layer of so many outputs; or use linear_probe",
            )

    def take_weights(
        self, store: ObjectStore, pretrained: BackboneRecord, classes: tuple[str, ...]
    ) -> str | None:
        """Take the weights of a pretrained network; a note where one may wonder what became of its classifier.

        That is taken only where it is known to tell these very classes apart, in their order. Otherwise the classifier
        stays random, however many outputs there are: the ten classes of a file may be any ten. New layers that the
        pretrained network does not have just so stay random too. Raises ConfigError, with names and shapes, for
        weights that do not fit.
        """
        state = read_backbone_state(store, pretrained)
        learnt = learnt_layers(pretrained.config)
        if isinstance(self.network, PartialReuseNetwork) and self.config.new_layers != learnt:
            self.network.load_body(state if learnt is None else state_below(state, "body."))
            return None
        load_weights(
            self.network,
            state,
            new_classifier=self.axis[len(self.axis) - 1].parameter_names,
            num_new_classes=None if pretrained.classes == classes else len(classes),
        )
        return _classifier_note(pretrained, classes)

    @property
    def head_tap(self) -> str | None:
        """The tap whose features the classifier takes, or None where what is new is not one linear layer."""
        if self.axis.num_reused < len(self.axis) - 1:
            return None
        body, last = self.axis[len(self.axis) - 2], self.axis[len(self.axis) - 1]
        module = self.network.get_submodule(last.name)
        is_linear = isinstance(module, nn.Linear) and module.bias is not None
        if not is_linear or body.kind is not StageKind.VECTOR or module.in_features != body.channels:
            return None
        return body.name

    def take_head(self, head: Head) -> None:
        """Take a fitted linear head as the classifier."""
        layer = self.network.get_submodule(self.axis[len(self.axis) - 1].name)
        layer.load_state_dict(head.input_layer.state_dict())

    def to_safetensors(self) -> bytes:
        """The weights as they are now."""
        return state_to_safetensors(self.network.state_dict())


def _refuse_other_than_logits(network: nn.Module, config: BackboneConfig) -> None:
    """ConfigError for a network that returns more than one tensor, in train mode only perhaps, as Inception does."""
    input_px = native_px(config)
    outputs = {"eval": run_on_shapes(network, num_images=2, input_px=input_px)}
    # A network that looks at its random numbers cannot train without data, and need not return anything else.
    with contextlib.suppress(ConfigError):
        outputs["train"] = run_on_shapes(network, num_images=2, input_px=input_px, training=True)
    for mode, output in outputs.items():
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"in {mode} mode the network returns {type(output).__name__}, and not one tensor with its logits",
                where=config.arch,
                next_step="let its forward return the logits alone, in training too; or use linear_probe",
            )


def _classifier_note(pretrained: BackboneRecord, classes: tuple[str, ...]) -> str | None:
    """What became of the classifier of a pretrained network that has as many outputs as there are classes."""
    is_random = weight_source(pretrained.config) is WeightSource.RANDOM
    if is_random or pretrained.num_classes != len(classes):
        return None
    if pretrained.classes == classes:
        return "the classifier begins as that of the weights, whose classes are the dataset's"
    why = "do not name their classes" if pretrained.classes is None else "name others, or another order"
    return f"the classifier begins anew, though that of the weights has as many outputs: they {why}"


def learnt_layers(config: BackboneConfig) -> NewLayers | None:
    """The new layers that a pretrained network has weights of; published weights are those of a whole network."""
    return None if weight_source(config) is WeightSource.NAMED else config.new_layers


def keep_trained(
    store: ObjectStore,
    config: BackboneConfig,
    weights_key: str,
    *,
    preset: EvalPreset,
    classes: tuple[str, ...],
) -> BackboneRecord:
    """The record of a trained network whose weights lie under a key; they are kept where the record says."""
    network = build_network(config)
    load_weights(network, read_state_dict(store.get(weights_key).data))
    return keep_network(store, config, network, preset=preset, classes=classes)
