"""One run of a network on shapes alone: every module call, and how activations flow between them."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convoy.core.errors import ConfigError


def record_calls(network: nn.Module, *, input_px: int) -> CallTrace:
    """The trace of one run in eval mode. Costs no arithmetic and no memory, and leaves the network as it was.

    Raises ConfigError if the network cannot take images of that size, or cannot run without data.
    """
    trace = CallTrace(shape_parameters(network), input_px)
    with contextlib.ExitStack() as hooks:
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(trace.entering(name), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(trace.leaving))
        with trace:
            # Two images, so that nothing mistakes the batch for a dimension of size one.
            run_on_shapes(network, num_images=2, input_px=input_px, parameters=trace.parameters)
    return trace


def run_on_shapes(
    network: nn.Module,
    *,
    num_images: int,
    input_px: int,
    parameters: dict[str, Tensor] | None = None,
    training: bool = False,
) -> Any:
    """What a network returns for tensors without data, so for nothing; dispatch modes see every operation.

    It runs in eval mode, or in train mode where it is `training`. `parameters` are what to run with instead of a
    fresh set of `shape_parameters`. Raises ConfigError if the network cannot take RGB images of that size, or cannot
    run without data.
    """
    stand_ins = shape_parameters(network) if parameters is None else parameters
    buffers = {name: buffer.to("meta") for name, buffer in network.named_buffers()}
    images_BCHW = torch.empty(num_images, 3, input_px, input_px, device="meta")
    try:
        with _in_mode(network, training=training), torch.no_grad(), torch.device("meta"):
            return torch.func.functional_call(network, {**stand_ins, **buffers}, (images_BCHW,))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"the network cannot take images of {input_px} px: {error}",
            where=type(network).__name__,
            next_step="correct the size; a network of your own must also run on the meta device",
        ) from error


def shape_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Tensors without data in place of the parameters, by name."""
    return {name: parameter.detach().to("meta") for name, parameter in network.named_parameters()}


@dataclass(slots=True, eq=False, kw_only=True)
class Call:
    """The `index`-th call of a module: its tensors, the calls inside it, and when it began and ended.

    It brings a weight if it is the first to read a parameter of two or more dimensions.
    """

    name: str
    module: nn.Module
    index: int
    start: int
    inputs: tuple[Tensor, ...]
    end: int = 0
    outputs: tuple[Tensor, ...] = ()
    brings_weight: bool = False
    children: list[Call] = field(default_factory=list)

    @property
    def input(self) -> Tensor:
        """The first tensor that the module is given."""
        return _first(self.inputs, self.name)

    @property
    def output(self) -> Tensor:
        """The first tensor that the module returns."""
        return _first(self.outputs, self.name)


@dataclass(frozen=True, slots=True)
class _Op:
    """One operation on activations: when, and the storages it read and returned."""

    time: int
    reads: frozenset[int]
    returns: frozenset[int]


class CallTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The calls in order of their start, the first of the root, and when each parameter was first read."""

    def __init__(self, parameters: dict[str, Tensor], input_px: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = parameters
        self.input_px = input_px
        self.calls: list[Call] = []
        self.first_reads: dict[str, int] = {}
        self._ops: list[_Op] = []
        self._clipped_kernels: list[int] = []
        self._clock = itertools.count()
        self._last_weight_read = -1
        self._stack: list[Call] = []
        self._parameter_names = {_storage(tensor): name for name, tensor in parameters.items()}
        self._activations: set[int] = set()
        # Held to the end of the run, because a freed storage's number is given out again.
        self._held: list[Tensor] = []

    def entering(self, name: str) -> Any:
        """The hook that notes the start of each call of the module `name`."""
        indices = itertools.count()

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(
                name=name,
                module=module,
                index=next(indices),
                start=next(self._clock),
                inputs=tuple(_tensors((args, kwargs))),
            )
            if self._stack:
                self._stack[-1].children.append(call)
            else:
                self._activations.add(_storage(call.input))
            self._stack.append(call)
            self.calls.append(call)

        return enter

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook that notes the end of a call."""
        call = self._stack.pop()
        call.end = next(self._clock)
        call.outputs = tuple(_tensors(output))
        call.brings_weight = self._last_weight_read > call.start

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and note which activations it read and returned."""
        result = func(*args, **(kwargs or {}))
        time = next(self._clock)
        given, returned = _tensors((args, kwargs)), _tensors(result)
        self._held += given + returned
        reads = {_storage(tensor) for tensor in given}
        self._note_parameters(reads, time)
        if func is torch.ops.aten.convolution.default and args[1].shape[-1] > args[0].shape[-1]:
            self._clipped_kernels.append(time)
        if reads & self._activations:
            returns = frozenset(_storage(tensor) for tensor in returned)
            self._activations |= returns
            self._ops.append(_Op(time, frozenset(reads & self._activations), returns))
        return result

    def _note_parameters(self, reads: set[int], time: int) -> None:
        for storage in reads & self._parameter_names.keys():
            name = self._parameter_names[storage]
            if name not in self.first_reads:
                self.first_reads[name] = time
                if self.parameters[name].ndim >= 2:
                    self._last_weight_read = time

    def is_block(self, call: Call) -> bool:
        """Whether more than one activation is still needed where one of the call's children returns."""
        first_seen: dict[int, int] = {}
        last_read: dict[int, int] = {}
        for op in self._ops_between(call.start, call.end):
            last_read |= dict.fromkeys(op.reads, op.time)
            first_seen |= dict.fromkeys(op.reads - first_seen.keys(), call.start)
            first_seen |= dict.fromkeys(op.returns - first_seen.keys(), op.time)
        last_read |= dict.fromkeys(map(_storage, call.outputs), call.end)
        return any(
            sum(first_seen.get(storage, call.start) < child.end < time for storage, time in last_read.items())
            > 1
            for child in call.children
        )

    def has_clipped_kernel(self, start: int, end: int) -> bool:
        """Whether a convolution between two times had a kernel larger than its maps."""
        return any(start < time < end for time in self._clipped_kernels)

    def returned_between(self, tensor: Tensor, start: int, end: int) -> bool:
        """Whether an operation returned this activation, or a view of it, between two times."""
        return any(_storage(tensor) in op.returns for op in self._ops_between(start, end))

    def is_read_within(self, tensor: Tensor, call: Call) -> bool:
        """Whether no operation but those of a call reads this activation, or a view of it."""
        storage = _storage(tensor)
        return all(call.start < op.time < call.end for op in self._ops if storage in op.reads)

    def _ops_between(self, start: int, end: int) -> Sequence[_Op]:
        low, high = (bisect.bisect(self._ops, time, key=lambda op: op.time) for time in (start, end))
        return self._ops[low:high]


@contextlib.contextmanager
def _in_mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode inside, every module's own mode again outside."""
    modes = [(module, module.training) for module in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _first(tensors: Sequence[Tensor], module_name: str) -> Tensor:
    if not tensors:
        raise ConfigError(
            "a module takes or gives no tensor, where the depth axis needs one",
            where=module_name,
            next_step="give the network's layers tensors as arguments and results",
        )
    return tensors[0]


def _storage(tensor: Tensor) -> int:
    """What tells activations apart: views and in-place results have the same."""
    return int(tensor.untyped_storage()._cdata)
