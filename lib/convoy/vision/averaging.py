"""Which weights a training keeps in the end: the last, the best, or an average of several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor, nn

from convoy.vision.freezing import BATCHNORMS, set_train_mode
from convoy.vision.presets import EvalPreset, at_resolution
from convoy.vision.stages import DepthAxis
from convoy.vision.training_config import Phase, Recipe, WeightAveraging
from convoy.vision.views import normalise

_State = dict[str, Tensor]


class WeightKeeper(Protocol):
    """Watches a training and keeps weights. `scores` are the validation scores of what it keeps, in order."""

    scores: list[float]

    def after_step(self, network: nn.Module) -> None:
        """Told of every update of the weights."""
        ...

    def after_epoch(self, network: nn.Module, *, score: float, epochs_left: int) -> None:
        """Told of every end of an epoch; `epochs_left` counts those still to come."""
        ...

    def kept(self) -> _State | None:
        """The weights to use instead of the network's own, or None to use those."""
        ...

    def tensors(self) -> _State:
        """All that it keeps, for a checkpoint."""
        ...

    def load(self, tensors: Mapping[str, Tensor], scores: list[float]) -> None:
        """Go on from a checkpoint."""
        ...


def build_keeper(recipe: Recipe) -> WeightKeeper:
    """The keeper that a recipe asks for."""
    if recipe.averaging is WeightAveraging.EMA:
        return MovingAverage(recipe.ema_decay)
    if recipe.averaging is WeightAveraging.SWA:
        return TailAverage(recipe.average_epochs)
    if recipe.averaging is WeightAveraging.LAST:
        return BestEpochs(0)
    return BestEpochs(recipe.average_epochs if recipe.averaging is WeightAveraging.SOUP else 1)


def first_kept_phase(averaging: WeightAveraging, phases: Sequence[Phase], preset: EvalPreset) -> int:
    """The number of the first phase whose epochs a keeper is told of.

    From there on all are measured alike: networks have other scores at another resolution. What averages epochs takes
    those of the last phase, as the weights of one before may lie far away: those of a head that was trained alone.
    """
    if averaging in (WeightAveraging.SWA, WeightAveraging.SOUP):
        return len(phases) - 1
    last = at_resolution(preset, phases[-1].resolution_px)
    alike = takewhile(lambda phase: at_resolution(preset, phase.resolution_px) == last, reversed(phases))
    return len(phases) - sum(1 for _ in alike)


class _RunningAverage:
    """An average of weights that moves with what is averaged, and how much that was."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self._num_averaged = 0
        self._average: _State = {}

    def kept(self) -> _State | None:
        """The average, once something is in it."""
        return self._average or None

    def tensors(self) -> _State:
        """The average, and how much is in it."""
        return {**self._average, "num_averaged": torch.tensor(self._num_averaged)}

    def load(self, tensors: Mapping[str, Tensor], scores: list[float]) -> None:
        """Go on from a checkpoint."""
        self._average = dict(tensors)
        self._num_averaged = int(self._average.pop("num_averaged"))


class MovingAverage(_RunningAverage):
    """Exponential moving average of weights and buffers over steps.

    The decay of the first steps is lower, (1 + n) / (10 + n), so that short trainings forget their start (the
    rule of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._decay = decay

    def after_step(self, network: nn.Module) -> None:
        """Move the average towards the new weights."""
        state = network.state_dict()
        if not self._average:
            self._average = {name: tensor.clone() for name, tensor in state.items()}
        self._num_averaged += 1
        decay = min(self._decay, (1 + self._num_averaged) / (10 + self._num_averaged))
        with torch.no_grad():
            for name, tensor in state.items():
                if tensor.is_floating_point():
                    self._average[name].lerp_(tensor, 1 - decay)
                else:
                    self._average[name].copy_(tensor)

    def after_epoch(self, network: nn.Module, *, score: float, epochs_left: int) -> None:
        """Nothing: the average moves with steps."""


class TailAverage(_RunningAverage):
    """The mean of the weights at the ends of the last epochs (SWA)."""

    def __init__(self, num_epochs: int) -> None:
        super().__init__()
        self._num_epochs = num_epochs

    def after_step(self, network: nn.Module) -> None:
        """Nothing: the mean moves with epochs."""

    def after_epoch(self, network: nn.Module, *, score: float, epochs_left: int) -> None:
        """Take the weights into the mean if they are among the last epochs."""
        if epochs_left >= self._num_epochs:
            return
        self._num_averaged += 1
        self._average = _moved(self._average, network.state_dict(), 1 / self._num_averaged)


class BestEpochs:
    """The mean of the weights of the epochs with the best validation scores; of none, the network's own."""

    def __init__(self, num_epochs: int) -> None:
        self.scores: list[float] = []
        self._num_epochs = num_epochs
        self._states: list[_State] = []

    def after_step(self, network: nn.Module) -> None:
        """Nothing: epochs are compared."""

    def after_epoch(self, network: nn.Module, *, score: float, epochs_left: int) -> None:
        """Keep the weights if the epoch is among the best; of equal scores the earlier ranks first."""
        rank = sum(kept >= score for kept in self.scores)
        if rank >= self._num_epochs:
            return
        self.scores.insert(rank, score)
        self._states.insert(rank, {name: tensor.clone() for name, tensor in network.state_dict().items()})
        del self.scores[self._num_epochs :], self._states[self._num_epochs :]

    def kept(self) -> _State | None:
        """The mean of the best epochs."""
        mean: _State = {}
        for number, state in enumerate(self._states):
            mean = _moved(mean, state, 1 / (number + 1))
        return mean or None

    def tensors(self) -> _State:
        """Each kept epoch's weights under its rank."""
        return {
            f"{rank}.{name}": tensor
            for rank, state in enumerate(self._states)
            for name, tensor in state.items()
        }

    def load(self, tensors: Mapping[str, Tensor], scores: list[float]) -> None:
        """Go on from a checkpoint."""
        self.scores = list(scores)
        self._states = [
            {
                name.partition(".")[2]: tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{rank}.")
            }
            for rank in range(len(scores))
        ]


@contextlib.contextmanager
def swapped_in(network: nn.Module, state: _State | None) -> Iterator[None]:
    """The network with other weights inside, and with its own again outside."""
    if state is None:
        yield
        return
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(state)
    try:
        yield
    finally:
        network.load_state_dict(own)


def _moved(average: _State, state: _State, share: float) -> _State:
    """The average with `share` of a new state in it; counters are the newest."""
    if not average:
        return {name: tensor.clone() for name, tensor in state.items()}
    return {
        name: average[name].lerp(tensor, share) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in state.items()
    }


@torch.no_grad()
def measure_batchnorm(
    network: nn.Module, axis: DepthAxis, freeze_depth: int, images: Iterable[Tensor], preset: EvalPreset
) -> None:
    """Give BatchNorm behind the frozen stages the statistics of some uint8 images_BCHW, on the network's device.

    Averaged weights make activations that none of the averaged networks had (Izmailov et al. 2018, section 3.2).
    All else is in eval mode, so that no statistic depends on a draw of dropout.
    """
    set_train_mode(network, axis, freeze_depth)
    norms = [module for module in network.modules() if isinstance(module, BATCHNORMS) and module.training]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    if norms:
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over batches
        for images_BCHW in images:
            network(normalise(images_BCHW, preset))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    network.eval()
