"""The words that every floor shares: splits, reject codes, views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Split(StrEnum):
    """The part of a dataset that a sample belongs to."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class Stage(StrEnum):
    """Where in the operator a sample was rejected."""

    FETCH = "fetch"
    DECODE = "decode"
    FORWARD = "forward"


class RejectCode(StrEnum):
    """Why a sample could not be used. A public contract: codes are added, never renamed."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"
    TOO_SMALL = "too_small"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    GONE = "gone"
    CHANGED = "changed"
    ACCESS_DENIED = "access_denied"
    ARCHIVED = "archived"
    UNREADABLE = "unreadable"
    ENDS_WORKERS = "ends_workers"
    NOT_FINITE = "not_finite"


# Codes of the fetch stage.
FETCH_CODES = frozenset(
    {
        RejectCode.CHECKSUM_MISMATCH,
        RejectCode.GONE,
        RejectCode.CHANGED,
        RejectCode.ACCESS_DENIED,
        RejectCode.ARCHIVED,
        RejectCode.UNREADABLE,
        RejectCode.ENDS_WORKERS,
    }
)
# Those that another try may give. What was replaced seldom comes back, and the input of a run names its version.
RETRIED_CODES = FETCH_CODES - {RejectCode.CHANGED}


class SampleRejected(Exception):
    """One sample cannot be used; the job goes on without it.

    A decode-stage reject is a property of the bytes, one of stage forward of the bytes and the network: both are
    remembered, as long as neither changes. A fetch-stage reject may heal: the next job that needs the sample's
    features tries it again, while to a finished run of scores it stays a reject until a repair sets its slice aside.
    """

    def __init__(self, code: RejectCode, stage: Stage, reason: str) -> None:
        super().__init__(code, stage, reason)
        self.code = code
        self.stage = stage
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A row of the reject table."""

    sample_id: str
    uri: str
    etag: str
    content_id: bytes
    stage: Stage
    code: RejectCode
    reason: str


def codes_in_words(reject_codes: Mapping[str, int]) -> str:
    """How many rejects of each code there are, the most first."""
    return ", ".join(f"{number} {code}" for code, number in Counter(reject_codes).most_common())
