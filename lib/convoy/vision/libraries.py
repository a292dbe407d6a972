"""Where networks come from: torchvision, timm, Convoy's own classics, and any importable factory.

All four answer the same questions. torchvision and timm take seconds to import, and most configs are read by
commands that build no network: so the methods that need one of them import it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from convoy.core.errors import ConfigError
from convoy.vision.architectures import CIFAR_RESNET_DEPTHS, CifarResNet, LeNet5
from convoy.vision.backbone_config import DEFAULT_WEIGHTS_NAME, TIMM, TORCHVISION
from convoy.vision.factories import load_factory, unusable_factory
from convoy.vision.presets import EvalPreset, Interpolation

# Names, in every library, of the weight set that the library itself recommends.
DEFAULT_WEIGHTS = ("DEFAULT", "pretrained")


class NetworkLibrary(Protocol):
    """A source of networks by name. `weights` is a name of the library, or one of DEFAULT_WEIGHTS."""

    prefix: str

    def names(self) -> Sequence[str]:
        """All architectures that it knows."""
        ...

    def weight_names(self, name: str) -> Sequence[str]:
        """The weights that were published for an architecture."""
        ...

    def build(self, name: str, **options: Any) -> nn.Module:
        """A network with random weights from the global generator; takes `num_classes`."""
        ...

    def pretrained(self, name: str, weights: str) -> nn.Module:
        """The network as its weights were published, from the library's cache or by download.

        ConfigError for weights that it does not have; faults of the download are as the library raises them.
        """
        ...

    def preset(self, name: str, weights: str) -> EvalPreset:
        """The eval transform that the weights were trained with; ConfigError where it is not known."""
        ...

    def classes(self, name: str, weights: str) -> tuple[str, ...] | None:
        """The names of the weights' classes in the order of the logits, or None where they are not known."""
        ...

    def input_px(self, name: str) -> int:
        """The input size of the default weights, however images come to it; ConfigError where it is not known."""
        ...

    def num_outputs(self, name: str, weights: str) -> int:
        """How many outputs the network has with the weights, 0 without a classifier; ConfigError where it has none."""
        ...


class Torchvision:
    """The image classifiers of torchvision."""

    prefix = TORCHVISION

    # These two have auxiliary classifiers, which serve only the training recipes of their papers; and they
    # normalise to -1..1 a second time, inside the network, if and only if they load named weights. Here the
    # network stays plain and the preset says it, so that the transform travels with the weights.
    _two_of_their_own = ("googlenet", "inception_v3")
    _auxiliary_heads = ("AuxLogits", "aux1", "aux2")

    def names(self) -> Sequence[str]:
        """All classifiers; detection, segmentation and video are other modules of torchvision."""
        import torchvision  # noqa: PLC0415

        names: list[str] = torchvision.models.list_models(module=torchvision.models)
        return names

    def weight_names(self, name: str) -> Sequence[str]:
        """As torchvision's enum of the architecture's weights has them."""
        import torchvision  # noqa: PLC0415

        return list(torchvision.models.get_model_weights(name).__members__)

    def build(self, name: str, **options: Any) -> nn.Module:
        """A network with random weights, without auxiliary classifiers."""
        import torchvision  # noqa: PLC0415

        if name in self._two_of_their_own:
            options = {"aux_logits": False, "init_weights": True, **options}
        network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        return network

    def pretrained(self, name: str, weights: str) -> nn.Module:
        """A network with the named weights, their hash checked, without auxiliary classifiers."""
        import torchvision  # noqa: PLC0415

        member = self._member(name, weights)
        network: nn.Module = torchvision.models.get_model(name, weights=member, progress=False)
        for head in self._auxiliary_heads:
            if hasattr(network, head):
                setattr(network, head, None)
        return network

    def preset(self, name: str, weights: str) -> EvalPreset:
        """The transform that stands beside the weights in torchvision."""
        transform = self._member(name, weights).transforms()
        renormalised = name in self._two_of_their_own
        return EvalPreset(
            resize_px=transform.resize_size[0],
            crop_px=transform.crop_size[0],
            interpolation=Interpolation(transform.interpolation.value),
            mean=(0.5, 0.5, 0.5) if renormalised else tuple(transform.mean),
            std=(0.5, 0.5, 0.5) if renormalised else tuple(transform.std),
        )

    def classes(self, name: str, weights: str) -> tuple[str, ...] | None:
        """The categories that stand beside the weights in torchvision; None where only the features were published."""
        categories = self._member(name, weights).meta["categories"]
        return None if categories is None else tuple(categories)

    def input_px(self, name: str) -> int:
        """The crop of the default weights."""
        return self.preset(name, "DEFAULT").crop_px

    def num_outputs(self, name: str, weights: str) -> int:
        """One for each category. Those of which only the features were published have the usual classifier."""
        return len(self.classes(name, weights) or self.classes(name, DEFAULT_WEIGHTS_NAME) or ())

    def _member(self, name: str, weights: str) -> Any:
        import torchvision  # noqa: PLC0415

        named = torchvision.models.get_model_weights(name)
        members = named.__members__
        # torchvision takes its own names in full too: ResNet50_Weights.IMAGENET1K_V2.
        wanted = "DEFAULT" if weights in DEFAULT_WEIGHTS else weights.removeprefix(f"{named.__name__}.")
        if wanted not in members:
            raise _unknown_weights(self.prefix + name, weights, list(members))
        return members[wanted]


class Timm:
    """The models of timm; the weights are the tag behind the dot in timm's own names."""

    prefix = TIMM

    def names(self) -> Sequence[str]:
        """All architectures, without tags."""
        import timm  # noqa: PLC0415

        names: list[str] = timm.list_models()
        return names

    def weight_names(self, name: str) -> Sequence[str]:
        """The tags of the architecture."""
        import timm  # noqa: PLC0415

        return [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]

    def build(self, name: str, **options: Any) -> nn.Module:
        """A network with random weights."""
        import timm  # noqa: PLC0415

        network: nn.Module = timm.create_model(name, pretrained=False, **options)
        return network

    def pretrained(self, name: str, weights: str) -> nn.Module:
        """A network with the weights of a tag."""
        import timm  # noqa: PLC0415

        config = self._pretrained_config(name, weights)
        if not config.has_weights:
            raise _unknown_weights(self.prefix + name, weights, [])
        network: nn.Module = timm.create_model(name, pretrained=True, pretrained_cfg=config)
        return network

    def preset(self, name: str, weights: str) -> EvalPreset:
        """The transform of the tag at its training resolution."""
        import timm.data  # noqa: PLC0415

        config = self._pretrained_config(name, weights).to_dict()
        transform = timm.data.resolve_data_config({}, pretrained_cfg=config)
        if transform["crop_mode"] != "center":
            raise ConfigError(
                f"'{name}' wants images that are not cut but {transform['crop_mode']}",
                where="backbone.preset",
                next_step="set all keys of backbone.preset to the nearest transform that keeps the aspect",
            )
        crop_px = transform["input_size"][-1]
        return EvalPreset(
            resize_px=math.floor(crop_px / transform["crop_pct"]),
            crop_px=crop_px,
            interpolation=Interpolation(transform["interpolation"]),
            mean=transform["mean"],
            std=transform["std"],
        )

    def classes(self, name: str, weights: str) -> tuple[str, ...] | None:
        """The classes of the ImageNet subset that the number of logits tells.

        timm names them by their lemmas, which WordNet gives to several synsets: those are told apart by the synset,
        such as "crane (n02012849)".
        """
        import timm.data  # noqa: PLC0415

        config = self._pretrained_config(name, weights).to_dict()
        subset = timm.data.infer_imagenet_subset(config)
        if subset is None:
            return None
        info = timm.data.ImageNetInfo(subset)
        lemmas = info.label_descriptions()
        times = Counter(lemmas)
        return tuple(
            lemma if times[lemma] == 1 else f"{lemma} ({synset})"
            for lemma, synset in zip(lemmas, info.label_names(), strict=True)
        )

    def input_px(self, name: str) -> int:
        """The training resolution of the default tag, which may squash images to it."""
        size_px: int = self._pretrained_config(name, "DEFAULT").input_size[-1]
        return size_px

    def num_outputs(self, name: str, weights: str) -> int:
        """Those of the tag: 21,841 of ImageNet-22k, an embedding's width of CLIP, 0 of self-supervised weights."""
        num_outputs: int = self._pretrained_config(name, weights).num_classes
        return num_outputs

    def _pretrained_config(self, name: str, weights: str) -> Any:
        import timm  # noqa: PLC0415

        if weights in DEFAULT_WEIGHTS:
            return timm.get_pretrained_cfg(name)
        tags = self.weight_names(name)
        if weights not in tags:
            raise _unknown_weights(self.prefix + name, weights, tags)
        return timm.get_pretrained_cfg(f"{name}.{weights}")


class Classics:
    """Convoy's own architectures. They come without weights."""

    prefix = ""

    _builders: Mapping[str, Callable[..., nn.Module]] = {
        "lenet5": LeNet5,
        **{f"cifar_resnet{depth}": functools.partial(CifarResNet, depth) for depth in CIFAR_RESNET_DEPTHS},
    }

    def names(self) -> Sequence[str]:
        """LeNet-5 and the CIFAR ResNets."""
        return list(self._builders)

    def weight_names(self, name: str) -> Sequence[str]:
        """None."""
        return []

    def build(self, name: str, **options: Any) -> nn.Module:
        """A network with random weights."""
        return self._builders[name](**options)

    def pretrained(self, name: str, weights: str) -> nn.Module:
        """Always a ConfigError."""
        raise _unknown_weights(name, weights, [])

    def preset(self, name: str, weights: str) -> EvalPreset:
        """32 pixels; the CIFAR ResNets take them as they are, LeNet-5 after a resize."""
        return EvalPreset(resize_px=32 if name == "lenet5" else None, crop_px=32)

    def classes(self, name: str, weights: str) -> tuple[str, ...] | None:
        """Not known."""
        return None

    def input_px(self, name: str) -> int:
        """32 pixels."""
        return self.preset(name, "DEFAULT").crop_px

    def num_outputs(self, name: str, weights: str) -> int:
        """Always a ConfigError."""
        raise _unknown_weights(name, weights, [])


class Factories:
    """Any importable `package.module:function` that returns a torch.nn.Module. They come without weights."""

    prefix = ""

    def names(self) -> Sequence[str]:
        """Nothing: what can be imported is not known before."""
        return []

    def build(self, name: str, **options: Any) -> nn.Module:
        """What the factory returns."""
        factory = load_factory(name)
        try:
            network = factory(**options)
        except (ImportError, AttributeError, TypeError) as error:
            raise unusable_factory(name, error) from error
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"the factory returns {type(network).__name__}, not a torch.nn.Module",
                where=name,
                next_step="return the network",
            )
        return network

    def weight_names(self, name: str) -> Sequence[str]:
        """None."""
        return []

    def pretrained(self, name: str, weights: str) -> nn.Module:
        """Always a ConfigError."""
        raise _unknown_weights(name, weights, [])

    def preset(self, name: str, weights: str) -> EvalPreset:
        """Always a ConfigError."""
        raise ConfigError(
            f"nothing is known of how '{name}' wants its images",
            where="backbone.preset",
            next_step="set backbone.preset to the transform that its weights were trained with",
        )

    def classes(self, name: str, weights: str) -> tuple[str, ...] | None:
        """Not known."""
        return None

    def input_px(self, name: str) -> int:
        """Always a ConfigError."""
        return self.preset(name, "DEFAULT").crop_px

    def num_outputs(self, name: str, weights: str) -> int:
        """Always a ConfigError."""
        raise _unknown_weights(name, weights, [])


def _unknown_weights(arch: str, weights: str, known: Sequence[str]) -> ConfigError:
    others = [*known, "random", "the path or URI of a state dict"]
    return ConfigError(
        f"'{arch}' has no weights '{weights}'",
        where="backbone.weights",
        next_step=f"choose one of {', '.join(others)}",
    )
