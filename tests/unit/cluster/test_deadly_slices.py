"""Images that end workers are told from those that a dying worker only happened to have in hand."""

from __future__ import annotations

import pytest

from convoy.cluster.deadly_slices import ImageTrials
from kept_notes import KeptNotes


def trials(notes: KeptNotes) -> ImageTrials:
    """Those of one worker; the next one has the same notes."""
    return ImageTrials(notes, "0-000005/images")


def ended_with(notes: KeptNotes, *sample_ids: str) -> None:
    """A worker that tries some images, and ends with the last of them."""
    worker = trials(notes)
    for sample_id in sample_ids:
        worker.begin(sample_id)


def test_an_image_that_two_workers_ended_with_is_deadly() -> None:
    notes = KeptNotes()
    ended_with(notes, "a", "b")
    assert trials(notes).deadly == []
    ended_with(notes, "a", "b")
    assert trials(notes).deadly == ["b"]


def test_one_death_with_an_image_may_be_chance() -> None:
    notes = KeptNotes()
    ended_with(notes, "a")
    ended_with(notes, "a", "b")
    ended_with(notes, "a", "b", "c")
    assert trials(notes).deadly == []


def test_what_ends_a_worker_after_the_trials_is_none_of_the_images() -> None:
    notes = KeptNotes()
    for _worker in range(3):
        worker = trials(notes)
        worker.begin("a")
        worker.end()
    assert trials(notes).deadly == []


def test_a_deadly_image_stays_so_while_others_are_found() -> None:
    notes = KeptNotes()
    for sample_id in ("a", "a", "b", "c", "b"):
        ended_with(notes, sample_id)
    assert trials(notes).deadly == ["a", "b"]


@pytest.mark.parametrize("sample_id", ["images/ä 1.jpg", 'a"b', "", "a\nb"])
def test_any_id_can_be_noted(sample_id: str) -> None:
    notes = KeptNotes()
    ended_with(notes, sample_id)
    ended_with(notes, sample_id)
    assert trials(notes).deadly == [sample_id]
