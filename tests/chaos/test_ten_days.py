"""Ten days on real images, with all that can go wrong with data: what was recomputed, and what was promoted or held."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cifar_images import ROOT, WEIGHTS, unpack_test_split
from command_lines import convoy, last_json, settings_arguments
from convoy.storage.registry import Alias, read_aliases
from convoy.storage.stores import open_store

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(3600)]

NAME = "cifar10-days"
LATE_CLASS = "truck"
FIRST_DAY, A_DAY = 1800, 540


@dataclass(frozen=True, slots=True)
class Images:
    """Files of the test split by class, taken in order."""

    by_class: dict[str, list[Path]]
    folder: Path

    def arrive(self, num_images: int, *classes: str, wrong_by: int = 0) -> None:
        """Some images of each class come in, in the folder of their own class or of another one."""
        names = sorted(classes)
        for index, name in enumerate(names):
            target = self.folder / names[(index + wrong_by) % len(names)]
            target.mkdir(parents=True, exist_ok=True)
            for _ in range(num_images // len(names)):
                path = self.by_class[name].pop(0)
                path.rename(target / f"{name}-{path.name}")

    def put_right(self) -> None:
        """A person moves images of another class to the folder of their own, and takes away what is no image."""
        for path in sorted(self.folder.rglob("*.jpg")):
            name = path.name.partition("-")[0]
            if name == "corrupt":
                path.unlink()
            else:
                path.rename(self.folder / name / path.name)

    def arrive_corrupt(self, num_images: int, name: str) -> None:
        """Files that are no images come in."""
        for number in range(num_images):
            (self.folder / name / f"corrupt-{number}.jpg").write_bytes(
                b"\xff\xd8\xff\xe0 cut off %d" % number
            )


@pytest.fixture
def images(tmp_path: Path) -> Images:
    test = unpack_test_split(tmp_path / "aside") / "test"
    by_class = {folder.name: sorted(folder.iterdir()) for folder in sorted(test.iterdir())}
    return Images(by_class, tmp_path / "images")


def retrain(tmp_path: Path, day: int) -> dict[str, Any]:
    """One day, by the config that we ship."""
    config = ROOT / "jobs" / "configs" / "retrain.cifar_days.yaml"
    settings = settings_arguments(
        f"source={json.dumps(str(tmp_path / 'images'))}", f"backbone.weights={json.dumps(str(WEIGHTS))}"
    )
    arguments = ("--config", str(config), *settings, "--workspace", str(tmp_path / "workspace"))
    finished = convoy("retrain", *arguments, "--date", f"2026-01-{day:02d}", "--json")
    assert finished.returncode in (0, 5), finished.stderr
    return last_json(finished)


def begin(day: int, images: Images) -> None:
    """What happens to the folder before a day's retraining."""
    early = [name for name in images.by_class if name != LATE_CLASS]
    if day == 1:
        images.arrive(FIRST_DAY, *early)
    elif day == 4:
        images.arrive(A_DAY, *early, wrong_by=1)
    elif day == 6:
        images.arrive_corrupt(A_DAY, early[0])
    elif day == 9:
        images.arrive(2 * A_DAY, *early, LATE_CLASS)
    elif day != 7:
        if day in (5, 8):
            images.put_right()
        images.arrive(A_DAY, *early)


def test_ten_days_cost_their_new_images_and_promote_nothing_worse(tmp_path: Path, images: Images) -> None:
    ledger = []
    for day in range(1, 11):
        begin(day, images)
        ledger.append((retrain(tmp_path, day), sum(1 for _ in (tmp_path / "images").rglob("*.jpg"))))

    for report, num_images in ledger:
        print(report["date"], report["decision"], report["recomputed"], num_images, report["reason"])
    decisions = [report["decision"] for report, _ in ledger]
    assert decisions[0] == "promoted"
    assert decisions[3] == decisions[5] == "held"
    # Nothing came in, and nobody answered.
    assert (decisions[6], ledger[6][0]["reason"]) == ("held", ledger[5][0]["reason"])
    # What a person put right is new beside what came in, and no date is held for it.
    assert [ledger[day - 1][0]["data"]["objections"] for day in (5, 8)] == [[], []]
    assert ledger[8][0]["data"]["new_classes"] == [LATE_CLASS]
    # Its test rows judge from the day after its promotion.
    assert decisions[8] == "promoted"
    found = (
        re.fullmatch(r"(\d+) test rows of (\w+) joined the holdout", note) for note in ledger[9][0]["notes"]
    )
    joined = {match[2]: int(match[1]) for match in found if match}
    # Of other classes too, where the first night drew few: that depends on where the files lie.
    assert LATE_CLASS in joined
    assert sum(joined.values()) == ledger[9][0]["holdout_rows"] - ledger[8][0]["holdout_rows"]
    # No promotion was one to a worse model on the frozen holdout.
    for report, _ in ledger[1:]:
        if report["decision"] == "promoted":
            ours, theirs = report["steps"][-1]["evidence"]["holdout"]["top1"]
            assert ours >= theirs
    recomputed = sum(report["recomputed"] for report, _ in ledger)
    # Besides what is there: the corrupt files, and the wrong ones in the folders that they were moved from.
    assert recomputed == ledger[-1][1] + 2 * A_DAY
    assert sum(num_images for _, num_images in ledger) >= 5 * recomputed
    record = read_aliases(open_store(str(tmp_path / "workspace")), NAME)
    assert len(record.history) == 9
    assert record.aliases[Alias.CHAMPION] in {
        path.parent.name for path in (tmp_path / "workspace/models" / NAME).glob("*/digests.json")
    }
