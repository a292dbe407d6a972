"""BatchNorm folded into the convolution before it: the same function in eval mode, with a pass over all maps less."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from convoy.core.errors import ConfigError
from convoy.vision.call_trace import record_calls, run_on_shapes


def fold_batch_norms(network: nn.Module, *, input_px: int) -> None:
    """Fold each BatchNorm of a network that has its final weights into the convolution that feeds it, and only it.

    The network is in eval mode and stays there. Modules keep their names, so that taps stay where they are. Outputs
    change by rounding: in float32 by 1e-6 of their range or less. A network that does not run any more, as it looks
    into its BatchNorms, gets them back. Raises ConfigError like `record_calls`.
    """
    replaced: dict[str, nn.Module] = {}
    for conv_name, norm_name in _pairs(network, input_px):
        conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d), "so it was chosen"
        assert isinstance(norm, nn.BatchNorm2d), "so it was chosen"
        replaced |= {conv_name: conv, norm_name: norm}
        network.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        network.set_submodule(norm_name, _without_norm(norm))
    try:
        run_on_shapes(network, num_images=2, input_px=input_px)
    except (ConfigError, AttributeError):
        for name, module in replaced.items():
            network.set_submodule(name, module)


def _pairs(network: nn.Module, input_px: int) -> Iterator[tuple[str, str]]:
    """The names of convolutions and of the BatchNorms behind them; each is called once, and under one name.

    Hooks may have a part in what a module computes: weight_norm's has.
    """
    trace, norms = record_calls(network, input_px=input_px), _norms()
    num_calls = Counter(call.module for call in trace.calls)
    num_names = Counter(module for _, module in network.named_modules(remove_duplicate=False))
    single = [
        call
        for call in trace.calls
        if num_calls[call.module] == num_names[call.module] == 1
        and not (call.module._forward_pre_hooks or call.module._forward_hooks)
    ]
    convolutions = {call.output: call for call in single if type(call.module) is nn.Conv2d}
    for norm in single:
        if type(norm.module) in norms and norm.module.track_running_stats:
            conv = convolutions.get(norm.input)
            if conv is not None and trace.is_read_within(conv.output, norm):
                yield conv.name, norm.name


def _norms() -> tuple[type[nn.Module], ...]:
    """The classes of BatchNorms that can be folded. Where a network has one of timm's, timm is imported."""
    layers = sys.modules.get("timm.layers")
    return (nn.BatchNorm2d,) if layers is None else (nn.BatchNorm2d, layers.BatchNormAct2d)


def _without_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """What a BatchNorm does beside its normalisation: timm's drops and activates."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
