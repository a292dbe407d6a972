"""What every forward engine shares: the device, the normalised network, its compilation and its precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from convoy.core.errors import ConfigError
from convoy.vision.engine_options import Precision
from convoy.vision.presets import EvalPreset
from convoy.vision.views import normalise

# What one code is compiled for more often than this, Dynamo runs eagerly; its own limit is 8.
_MOST_COMPILATIONS = 64


class NormalisedNetwork(nn.Module):
    """Normalisation and network as one graph, so that a compiler fuses them: uint8 images_BCHW in."""

    def __init__(self, network: nn.Module, preset: EvalPreset) -> None:
        super().__init__()
        self._network = network
        self._preset = preset

    def forward(self, images_BCHW: Tensor) -> Any:
        """What the network makes of the normalised images."""
        return self._network(normalise(images_BCHW, self._preset))


class FittingForward:
    """A network on whole batches, or on parts of them from when the device first had no room for a whole one.

    Then halves, quarters and so on are tried, and what fitted is kept to. No image is left out; results may differ
    from those of whole batches in their last bits.
    """

    def __init__(self, forward: Callable[[Tensor], Any]) -> None:
        self._forward = forward
        self._most_rows: int | None = None

    @classmethod
    def of(cls, network: nn.Module, device: torch.device, *, compiled: bool) -> FittingForward:
        """What runs a network on its device: the network itself, or its compiled form."""
        return cls(_compile(network, device) if compiled else network)

    def __call__(self, images_BCHW: Tensor) -> Any:
        """What the network makes of a batch. Raises torch.OutOfMemoryError where one image is too much."""
        while True:
            num_rows = self._most_rows or len(images_BCHW)
            try:
                return _joined([self._forward(part) for part in torch.split(images_BCHW, num_rows)])
            except torch.OutOfMemoryError:
                if num_rows == 1:
                    raise
            # Not in the handler: the error's traceback holds what was allocated.
            self._most_rows = (num_rows + 1) // 2
            torch.cuda.empty_cache()


def _joined(outputs: Sequence[Any]) -> Any:
    """One output of several for consecutive rows: tensors, or dicts or named tuples of them."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, dict):
        return {name: torch.cat([output[name] for output in outputs]) for name in first}
    return type(first)(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


def best_device() -> torch.device:
    """The current GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_threads(num_threads: int) -> None:
    """Let torch compute with so many threads whatever the calling thread asks of it, and nothing else.

    They are kept for that thread: what two threads of a process compute in parallel by turns takes a fifth longer,
    as OpenMP sends threads to sleep at once where it holds more of them than the machine has cores.
    """
    torch.set_num_threads(num_threads)
    # Settles it: a thread's first parallel computation takes the number that any thread was the last to set.
    torch.get_num_threads()


def open_device(num_threads: int) -> torch.device:
    """That device, with so many threads of the CPU, set up so that float32 is computed as float32 on either.

    By default cuDNN rounds what it convolves to the 10 bits of TF32: features of a GPU were not those of a CPU.
    """
    use_threads(num_threads)
    torch.backends.cudnn.allow_tf32 = False
    return best_device()


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """The network itself, in evaluation mode, on the device and in channels_last."""
    return network.eval().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _compile(network: nn.Module, device: torch.device) -> Callable[[Tensor], Any]:
    """The network compiled for batches of one size; it is compiled when it first runs, which must be without gradients.

    On a CPU the weights become constants, a second copy in the layout and precision of its kernels, so that batch
    norms fold into the convolutions: ResNet-18 in bf16 takes 7 to 10 % less time.

    ConfigError where it does not compile: as it is, the network would give other bits than the run's other workers.
    """
    # The networks of a committee are compilations of one code.
    torch._dynamo.config.recompile_limit = _MOST_COMPILATIONS
    compiled: Callable[[Tensor], Any] = torch.compile(network, dynamic=False)

    def run(images_BCHW: Tensor) -> Any:
        # Whether weights are constants of a graph Dynamo asks the global setting, and not the options.
        is_frozen = device.type == "cpu"
        try:
            with torch._inductor.config.patch(freezing=True) if is_frozen else nullcontext():
                return compiled(images_BCHW)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            what = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"the network cannot be compiled: {what}",
                next_step="compute it as it is: --set extraction.compile=never, with --new-run",
            ) from error

    return run


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a network computes in that precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is Precision.BF16)


def casting_once(device: torch.device) -> AbstractContextManager[object]:
    """Within it a network's weights are cast to the precision of its passes once, not in each pass.

    autocast keeps what it has cast until the outermost context ends, which is this one; it casts nothing itself. A
    GPU casts in no time, and the copies would take the room of activations.
    """
    return torch.autocast(device.type, enabled=False) if device.type == "cpu" else nullcontext()


def new_images(shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """A reusable uint8 buffer images_BCHW of zeros in channels_last, pinned where the device is a GPU."""
    buffer = torch.zeros(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return buffer.pin_memory() if device.type == "cuda" else buffer
