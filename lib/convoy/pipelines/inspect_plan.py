"""The pieces of an inspection: which pictures are drawn, of which rows, at which stages; and what cannot be shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from convoy.cluster.inspection_spec import CamLook, Piece, PieceKind, SheetLine
from convoy.core.batching import batched
from convoy.core.errors import ConfigError
from convoy.pipelines.classifiers import Classifier
from convoy.pipelines.inspect_config import InspectConfig, Section
from convoy.pipelines.inspect_findings import Findings
from convoy.pipelines.near_duplicates import last_of_sizes
from convoy.vision.inspection_options import Unit
from convoy.vision.stages import DepthAxis, Stage, StageKind, resolve_tap

_UNITS_A_PIECE = 8
_IMAGES_A_PIECE = 6
_GROUPS_SHOWN, _MEMBERS_SHOWN = 8, 6
_MOST_STAGES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPiece:
    """A piece, and the rows of the manifest that it shows, or None where it shows no images."""

    piece: Piece
    rows: pa.Table | None = None


def chosen_stages(config: InspectConfig, axis: DepthAxis) -> list[Stage]:
    """The stages that the config names, each once, or the last of each size of maps, the four deepest."""
    if config.stages is None:
        return last_of_sizes(axis, _MOST_STAGES)
    named = {(stage := resolve_tap(axis, tap)).name: stage for tap in config.stages}
    return sorted(named.values(), key=lambda stage: stage.index)


def chosen_classes(config: InspectConfig, classifier: Classifier) -> tuple[str, ...]:
    """The classes that are maximised. ConfigError for one that the model does not have."""
    classes = classifier.classes
    names = config.classes or classes[: config.num_classes]
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ConfigError(
            f"the model has no class '{unknown[0]}'",
            where="classes",
            next_step=f"choose among {', '.join(classes[:10])}",
        )
    return names


def plan_pieces(config: InspectConfig, classifier: Classifier, found: Findings) -> list[PlannedPiece]:
    """All pieces of the sections that are asked for; what cannot be drawn becomes one of the notes."""
    planner = _Planner(config, classifier, found)
    parts = {
        Section.FILTERS: planner.filters,
        Section.CLASSES: planner.class_units,
        Section.CHANNELS: planner.channel_units,
        Section.CAMS: planner.cams,
        Section.FEATURE_MAPS: planner.feature_maps,
        Section.NEIGHBOURS: planner.neighbours,
        Section.NEAR_DUPLICATES: planner.near_duplicates,
    }
    return [piece for section, plan in parts.items() if section in config.sections for piece in plan()]


class _Planner:
    def __init__(self, config: InspectConfig, classifier: Classifier, found: Findings) -> None:
        self._config, self._classifier, self._found = config, classifier, found
        self._sample = found.sample
        self._axis = classifier.backbone.axis
        self._stages = chosen_stages(config, self._axis)
        self._shown = found.sample.shown(config.sample.num_shown, config.sample.sample_ids)
        self._ids = found.sample.sample_ids()

    def filters(self) -> Iterator[PlannedPiece]:
        yield PlannedPiece(
            piece=Piece(
                name="filters",
                kind=PieceKind.FILTERS,
                title="Filters of the first layer",
                caption="Weights of the first convolution; grey is zero, each filter is scaled by its largest weight.",
            )
        )

    def class_units(self) -> Iterator[PlannedPiece]:
        classes = self._classifier.classes
        names = chosen_classes(self._config, self._classifier)
        if len(names) < len(classes):
            self._note(f"{len(names)} of {len(classes)} classes are maximised: name others with `classes`")
        for number, some in enumerate(batched(names, _UNITS_A_PIECE)):
            yield PlannedPiece(
                piece=Piece(
                    name=f"classes-{number:02d}",
                    kind=PieceKind.CLASSES,
                    title="What the classes look like to the model",
                    caption="Images made by gradient ascent that maximise the logit of a class.",
                    units=tuple(Unit(index=classes.index(name)) for name in some),
                    unit_names=tuple(some),
                )
            )

    def channel_units(self) -> Iterator[PlannedPiece]:
        for stage in self._stages:
            wanted = self._config.channels or range(min(self._config.num_channels, stage.channels))
            channels = [channel for channel in wanted if 0 <= channel < stage.channels]
            if len(channels) < len(list(wanted)):
                self._note(
                    f"stage {stage.name} has {stage.channels} channels: others that were named are left out"
                )
            for number, some in enumerate(batched(channels, _UNITS_A_PIECE)):
                yield PlannedPiece(
                    piece=Piece(
                        name=f"channels-{stage.index:03d}-{number:02d}",
                        kind=PieceKind.CHANNELS,
                        title=f"What channels of {stage.name} look for",
                        caption="Images made by gradient ascent that maximise the mean of a channel's map.",
                        stages=(stage.name,),
                        units=tuple(Unit(index=channel, stage=stage.name) for channel in some),
                        unit_names=tuple(f"channel {channel}" for channel in some),
                    )
                )

    def cams(self) -> Iterator[PlannedPiece]:
        tap = resolve_tap(self._axis, self._classifier.tap)
        stages = []
        for stage in self._stages:
            if stage.kind is not StageKind.SPATIAL:
                self._note(f"no Grad-CAM at {stage.name}: it gives a vector an image, and no maps")
            elif stage.index > tap.index:
                self._note(f"no Grad-CAM at {stage.name}: it lies behind {tap.name}, where the head reads")
            else:
                stages.append(stage.name)
        if not stages:
            self._note("no Grad-CAM: name stages with maps, in front of the head, with `stages`")
            return
        for number, rows in enumerate(batched(self._shown, _IMAGES_A_PIECE)):
            looks = [look for place, row in enumerate(rows) for look in self._looks(place, row)]
            yield PlannedPiece(
                piece=Piece(
                    name=f"cams-{number:02d}",
                    kind=PieceKind.CAMS,
                    title="Where the model looks",
                    caption="Grad-CAM of the predicted class, and under errors of the labelled one; yellow speaks"
                    " for it most.",
                    stages=tuple(stages),
                    looks=tuple(looks),
                ),
                rows=self._rows(rows),
            )

    def feature_maps(self) -> Iterator[PlannedPiece]:
        stages = tuple(stage.name for stage in self._stages if stage.kind is StageKind.SPATIAL)
        if not stages:
            self._note("no feature maps: name stages with maps with `stages`")
            return
        for number, row in enumerate(self._shown[: self._config.sample.num_maps]):
            yield PlannedPiece(
                piece=Piece(
                    name=f"feature_maps-{number:02d}",
                    kind=PieceKind.FEATURE_MAPS,
                    title=f"Feature maps of {self._ids[row]}",
                    caption="The channels with the largest mean at each stage, each scaled from its least to its"
                    " largest value.",
                    stages=stages,
                    lines=(self._line("", [row], ["image"]),),
                    num_channels=self._config.num_channels,
                ),
                rows=self._rows([row]),
            )

    def neighbours(self) -> Iterator[PlannedPiece]:
        near = self._found.neighbours
        if near is None:
            return
        number_near = near.rows_NK.shape[1]
        for number, rows in enumerate(batched(self._shown, _IMAGES_A_PIECE)):
            lines, all_rows = [], []
            for row in rows:
                others = near.rows_NK[row].tolist()
                similarities = [f"{value:.4f}" for value in near.similarities_NK[row].tolist()]
                lines.append(self._line(self._described(row), [row, *others], ["image", *similarities]))
                all_rows += [row, *others]
            yield PlannedPiece(
                piece=Piece(
                    name=f"neighbours-{number:02d}",
                    kind=PieceKind.NEIGHBOURS,
                    title="Nearest neighbours in feature space",
                    caption="The images of the sample that are most like the first, by the cosine of their features.",
                    lines=tuple(lines),
                    columns=("image", *(f"nearest {rank + 1}" for rank in range(number_near))),
                ),
                rows=self._rows(all_rows),
            )

    def near_duplicates(self) -> Iterator[PlannedPiece]:
        report, rows = self._found.duplicates, self._found.duplicate_rows
        if report is None or rows is None or not report.examples:
            return
        row_of = {sample_id: row for row, sample_id in enumerate(rows["sample_id"].to_pylist())}
        lines, all_rows = [], []
        for group in report.examples[:_GROUPS_SHOWN]:
            members = group.samples[:_MEMBERS_SHOWN]
            notes = [f"{one.split}, {one.label or 'no label'}" for one in members]
            lines.append(
                SheetLine(
                    name=" | ".join(dict.fromkeys(notes)),
                    sample_ids=tuple(one.sample_id for one in members),
                    notes=tuple(notes),
                )
            )
            all_rows += [row_of[one.sample_id] for one in members]
        width = max(len(line.sample_ids) for line in lines)
        yield PlannedPiece(
            piece=Piece(
                name="near_duplicates",
                kind=PieceKind.NEAR_DUPLICATES,
                title="Near duplicates",
                caption="Groups of images that show one picture; those with different labels or splits come first.",
                lines=tuple(lines),
                columns=tuple(str(place + 1) for place in range(width)),
            ),
            rows=rows.take(pa.array(all_rows)),
        )

    def _looks(self, place: int, row: int) -> Iterator[CamLook]:
        predicted, label = int(self._sample.predicted_N[row]), int(self._sample.labels_N[row])
        yield CamLook(row=place, class_index=predicted, name=self._described(row))
        if label >= 0 and label != predicted:
            yield CamLook(row=place, class_index=label, name=f"for {self._sample.classes[label]}")

    def _described(self, row: int) -> str:
        """What the model says of an image, and what it is labelled as where that differs."""
        sample = self._sample
        said = f"{sample.classes[int(sample.predicted_N[row])]} {sample.scores_N[row]:.2f}"
        return f"{said}, is {sample.classes[int(sample.labels_N[row])]}" if sample.wrong_N[row] else said

    def _line(self, name: str, rows: Sequence[int], notes: Sequence[str]) -> SheetLine:
        return SheetLine(name=name, sample_ids=tuple(self._ids[row] for row in rows), notes=tuple(notes))

    def _rows(self, rows: Sequence[int]) -> pa.Table:
        return self._sample.rows.take(pa.array(rows))

    def _note(self, text: str) -> None:
        if text not in self._found.notes:
            self._found.notes.append(text)
