"""A model as one graph in a file: uint8 images in, float32 logits out, nothing of Convoy needed to run it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from convoy.core.crop_policies import Averaging
from convoy.core.errors import ConfigError, DataError
from convoy.vision.presets import EvalPreset
from convoy.vision.readout import LogitsNetwork
from convoy.vision.stages import DepthAxis
from convoy.vision.views import normalise

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# uint8 images_BCHW on the CPU to float32 logits_BK.
Predictor = Callable[[Tensor], Tensor]


class ExportFormat(StrEnum):
    """The kinds of files that a classifier can be exported to."""

    ONNX = "onnx"
    TORCH = "torch"  # torch.export's .pt2


class ImageClassifier(nn.Module):
    """Normalisation, network up to a tap, and head (none where the tap gives the logits) as one module."""

    def __init__(
        self, network: nn.Module, axis: DepthAxis, preset: EvalPreset, *, tap: str, head: nn.Module | None
    ) -> None:
        super().__init__()
        self._network = LogitsNetwork(network, axis, tap=tap, readout=head)
        self.preset = preset

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Float32 logits_BK of uint8 images at the preset's crop size; what softmax makes of them is up to you."""
        logits_BK: Tensor = self._network(normalise(images_BCHW, self.preset))
        return logits_BK


@dataclass(frozen=True, slots=True, eq=False)
class ExportedMember:
    """A member of an ensemble; weights of all sum to 1. `class_order` is null where the classes are the ensemble's."""

    classifier: ImageClassifier
    weight: float
    temperature: float
    class_order: tuple[int, ...] | None


class ImageEnsemble(nn.Module):
    """The joint float32 logits_BK of an ensemble for uint8 images of one size, or of them and their mirror images.

    Those of `Committee` but for the last bits of float32: log-probabilities where probabilities are averaged. But a
    committee mirrors the image and then crops, the graph mirrors the crop that it is given: where an odd number of
    pixels is cut off, the mirrored view lies one pixel beside the committee's.
    """

    def __init__(
        self, members: Sequence[ExportedMember], *, averaging: Averaging, temperature: float, mirrors: bool
    ) -> None:
        super().__init__()
        self._classifiers = nn.ModuleList(member.classifier for member in members)
        self._members = tuple(members)
        self._averaging, self._temperature, self._mirrors = averaging, temperature, mirrors
        self.preset = members[0].classifier.preset

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Float32 logits_BK of uint8 images at the preset's crop size."""
        views = [images_BCHW, images_BCHW.flip(3)] if self._mirrors else [images_BCHW]
        parts = [
            self._part(number, view, 1 / len(views)) for view in views for number in range(len(self._members))
        ]
        stacked_PBK = torch.stack(parts)
        averages_probabilities = self._averaging is Averaging.PROBABILITIES
        joint_BK = stacked_PBK.logsumexp(0) if averages_probabilities else stacked_PBK.sum(0)
        return joint_BK / self._temperature

    def _part(self, number: int, images_BCHW: Tensor, share: float) -> Tensor:
        """What a member adds to the mean, or the logarithm of it where probabilities are averaged."""
        member = self._members[number]
        logits_BK: Tensor = self._classifiers[number](images_BCHW) / member.temperature
        if member.class_order is not None:
            logits_BK = logits_BK[:, torch.tensor(member.class_order)]
        weight = member.weight * share
        if self._averaging is Averaging.PROBABILITIES:
            # Of logarithms float32 keeps those of the smallest probabilities too.
            return logits_BK.log_softmax(1) + math.log(weight)
        return logits_BK * weight


def require_export_packages(format_: ExportFormat) -> None:
    """Raise ConfigError, with the command that helps, where packages that a format needs are missing."""
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if format_ is ExportFormat.ONNX and missing:
        raise ConfigError(
            f"ONNX files need packages that are not installed: {', '.join(missing)}",
            where="--to onnx",
            next_step="pip install convoy-vision[export], or use --to torch",
        )


def trace_classifier(classifier: ImageClassifier | ImageEnsemble) -> ExportedProgram:
    """The model as one functional graph for any number of images, without what lies behind its taps.

    Raises DataError for a network whose Python code cannot be traced, such as one that branches on its pixels.
    """
    size_px = classifier.preset.crop_px
    # Two images: torch.export takes a batch of one for a constant.
    images_BCHW = torch.zeros(2, 3, size_px, size_px, dtype=torch.uint8)
    try:
        traced = _trace(classifier, images_BCHW).run_decompositions({})
    except Exception as error:  # a network's own code may fail in any way
        raise DataError(
            f"the network cannot be traced as one graph: {error}",
            where=type(classifier).__name__,
            next_step="export another network, or make this one's code independent of its data",
        ) from error
    return _trace(_used_part(traced), images_BCHW)


def save_program(program: ExportedProgram, format_: ExportFormat, path: Path) -> None:
    """Write the graph with its weights as one file (ONNX: below 2 GiB); `require_export_packages` comes before."""
    if format_ is ExportFormat.TORCH:
        torch.export.save(program, path)
        return
    # The exporter prints its steps, and stdout belongs to the report.
    with _refusing_onnx(), contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            program,
            f=path,
            dynamo=True,
            external_data=False,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: "batch"},),
        )


def load_predictor(path: Path, format_: ExportFormat) -> Predictor:
    """The exported file, loaded as others load it: by torch.export or by ONNX Runtime, on the CPU."""
    if format_ is ExportFormat.TORCH:
        return torch.export.load(path).module()
    import onnxruntime  # noqa: PLC0415 (an optional extra)

    with _refusing_onnx():
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images_BCHW: torch.from_numpy(
        session.run([OUTPUT_NAME], {INPUT_NAME: images_BCHW.numpy()})[0]
    )


@contextlib.contextmanager
def _refusing_onnx() -> Iterator[None]:
    """Say what to do where ONNX cannot express a network, or one file of it cannot hold it."""
    try:
        yield
    except Exception as error:  # the exporter and the runtime promise no types
        said = str(error).strip().splitlines() or [repr(error)]
        raise DataError(
            f"ONNX cannot hold this network: {said[0]}",
            where=ExportFormat.ONNX.value,
            next_step="export it with --to torch",
        ) from error


def paired_logits(batches: Iterable[Tensor], first: Predictor, second: Predictor) -> tuple[Tensor, Tensor]:
    """The float32 logits_NK that two predictors give for the same uint8 images_BCHW; one batch is in memory."""
    first_logits, second_logits = [], []
    with torch.no_grad():
        for images_BCHW in batches:
            first_logits.append(first(images_BCHW))
            second_logits.append(second(images_BCHW))
    return torch.cat(first_logits), torch.cat(second_logits)


def _trace(module: nn.Module, images_BCHW: Tensor) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, (images_BCHW,), dynamic_shapes=({0: Dim("batch", min=1)},))


def _used_part(program: ExportedProgram) -> nn.Module:
    """The program's module without the operations, and the weights, that its result does not need."""
    module = program.module(check_guards=False)
    module.graph.eliminate_dead_code()
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(owner), attribute)
    module.recompile()
    return module
