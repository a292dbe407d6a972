from __future__ import annotations

import inspect
import pickle

import pytest

from convoy.core import errors
from convoy.core.errors import ConvoyError, ExitCode
from convoy.core.records import RejectCode, SampleRejected, Stage

ALL_ERRORS = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ConvoyError)
]


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_errors_survive_pickling_with_all_their_words(kind: type[ConvoyError]) -> None:
    error = kind("the disk is full", where="runs/1", next_step="free some space", size_bytes=7)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) == "the disk is full [runs/1]\n  next: free some space"
    assert again.fields == {"size_bytes": 7}
    assert again.exit_code in ExitCode


@pytest.mark.parametrize(
    "kind",
    [
        errors.StoreUnavailable,
        errors.StorageFull,
        errors.CredentialsExpired,
        errors.ReadingRefused,
        errors.NoRoom,
        errors.ClusterLost,
    ],
)
def test_what_the_same_command_goes_on_after_has_the_exit_code_of_a_stop(kind: type[ConvoyError]) -> None:
    assert kind.exit_code is ExitCode.STOPPED_RESUMABLE


def test_rejected_sample_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(SampleRejected(RejectCode.EMPTY, Stage.FETCH, "0 bytes")))
    assert (again.code, again.stage, again.reason) == (RejectCode.EMPTY, Stage.FETCH, "0 bytes")


def test_exit_codes_are_the_public_contract() -> None:
    assert [code.value for code in ExitCode] == [0, 1, 2, 3, 4, 5, 6]
