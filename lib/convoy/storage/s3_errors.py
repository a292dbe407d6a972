"""What S3 and its client say, in our own errors. Every code that Convoy reacts to is read here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import botocore.exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError
from botocore.httpsession import URLLib3SSLError

from convoy.core.errors import (
    AccessDenied,
    ConditionalWriteUnsupported,
    ConfigError,
    ConvoyError,
    CredentialsExpired,
    CredentialsRefused,
    ObjectArchived,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StorageFull,
    StoreUnavailable,
)

_Explanation = tuple[type[ConvoyError], str, str]

_NO_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or attach a role"
_EXPIRED: _Explanation = (
    CredentialsExpired,
    "the temporary credentials have expired",
    "renew them and run the same command again; finished work is kept",
)
_OTHER_REGION: _Explanation = (
    StorageError,
    "the bucket is in another region",
    "set AWS_DEFAULT_REGION to the region of the bucket",
)
_FULL: _Explanation = (
    StorageFull,
    "the store has no room left for this bucket",
    "free space or raise the quota, and run the same command again; finished work is kept",
)
_LATER = "run the same command again when the store answers; finished work is kept"
_DAMAGED: _Explanation = (StoreUnavailable, "the bytes did not arrive as they were sent", "")
_CONFLICT: _Explanation = (StoreUnavailable, "another conditional write was under way", "")
_THROTTLED: _Explanation = (
    StoreUnavailable,
    "the store asks to slow down",
    "use fewer workers, or try again later",
)
# Of the store or of the service with its keys, which says so with status 400.
_THROTTLES = (
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "TooManyRequestsException",
)

_OTHER_KEY = "store it under a key that can be used, or leave it out of the dataset"
_CUSTOMER_KEY: _Explanation = (
    AccessDenied,
    "the object is encrypted with its owner's key (SSE-C), without which it cannot be read",
    _OTHER_KEY,
)

_CODES: dict[str, _Explanation] = {
    "NoSuchBucket": (
        StorageError,
        "the bucket does not exist",
        "correct the URI, AWS_ENDPOINT_URL or AWS_DEFAULT_REGION, or create the bucket",
    ),
    "InvalidAccessKeyId": (
        CredentialsRefused,
        "the store does not know the access key id",
        _NO_CREDENTIALS,
    ),
    "SignatureDoesNotMatch": (
        CredentialsRefused,
        "the secret access key is not the one of the access key id",
        "correct AWS_SECRET_ACCESS_KEY or the profile",
    ),
    "InvalidToken": (
        CredentialsRefused,
        "the session token is not valid",
        "correct or unset AWS_SESSION_TOKEN",
    ),
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestTimeTooSkewed": (
        StorageError,
        "the clock of this machine and the clock of the store differ by more than 15 minutes",
        "set this machine's clock (timedatectl set-ntp true)",
    ),
    "AuthorizationHeaderMalformed": _OTHER_REGION,
    "PermanentRedirect": _OTHER_REGION,
    "InvalidRange": (StorageError, "the byte range lies beyond the end of the object", ""),
    "InvalidObjectState": (
        ObjectArchived,
        "the object is in an archive (Glacier) and cannot be read",
        "restore it, or leave it out of the dataset",
    ),
    "KMS.DisabledException": (AccessDenied, "the KMS key of the object is disabled", _OTHER_KEY),
    "KMS.NotFoundException": (AccessDenied, "the KMS key of the object does not exist", _OTHER_KEY),
    "KMS.KMSInvalidStateException": (
        AccessDenied,
        "the KMS key of the object cannot be used in its state, such as before its deletion",
        _OTHER_KEY,
    ),
    "QuotaExceeded": _FULL,
    "InsufficientStorage": _FULL,
    "XMinioStorageFull": _FULL,
    "ConditionalRequestConflict": _CONFLICT,
    "OperationAborted": _CONFLICT,
    "BadDigest": _DAMAGED,
    "XAmzContentSHA256Mismatch": _DAMAGED,
    "IncompleteBody": _DAMAGED,
    "RequestTimeout": (StoreUnavailable, "the store waited too long for the bytes", ""),
    **dict.fromkeys((*_THROTTLES, *(f"KMS.{code}" for code in _THROTTLES)), _THROTTLED),
}

_READ_PERMISSION = "s3:GetObject (and s3:ListBucket: without it a missing object looks forbidden)"
_PERMISSIONS = {
    "ListObjectsV2": "s3:ListBucket",
    "HeadObject": _READ_PERMISSION,
    "GetObject": _READ_PERMISSION,
    "PutObject": "s3:PutObject",
    **dict.fromkeys(("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"), "s3:PutObject"),
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObjects": "s3:DeleteObject",
}

_CREDENTIAL_ERRORS = (
    boto.NoCredentialsError,
    boto.NoAuthTokenError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.SSOError,
    boto.LoginError,
)
_CONFIG_ERRORS = (
    boto.ProfileNotFound,
    boto.ConfigParseError,
    boto.ConfigNotFound,
    boto.NoRegionError,
    boto.InvalidRegionError,
    boto.ParamValidationError,
    boto.InvalidEndpointConfigurationError,
)
_NO_ANSWER_ERRORS = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    URLLib3SSLError,  # botocore leaves it as it is when it comes in the middle of a body
)


@contextmanager
def s3_errors(where: str) -> Iterator[None]:
    """Raise what boto3 raises inside as a ConvoyError about the URI `where`.

    StoreUnavailable is what may pass, ObjectNotFound, ObjectArchived, AccessDenied, PreconditionFailed and
    ConditionalWriteUnsupported are what callers decide on. The original is not chained: its text may hold a
    password from an endpoint URL.
    """
    try:
        yield
    except ClientError as error:
        answer = error.response
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        raise error_of_answer(
            answer.get("Error", {}), status=status, operation=error.operation_name, where=where
        ) from None
    except (BotoCoreError, URLLib3SSLError) as error:
        raise _error_of_client(error, where) from None


def error_of_answer(answer: dict[str, Any], *, status: int, operation: str, where: str) -> ConvoyError:
    """The error for a refusal by the server: its "Code" and "Message", and the HTTP status (0 if unknown)."""
    code, message = str(answer.get("Code", "")), str(answer.get("Message", ""))
    # The code says nothing: one of another reason concerns all objects alike.
    is_customer_key = code == "InvalidRequest" and "Server Side Encryption" in message
    explained = _CUSTOMER_KEY if is_customer_key else _CODES.get(code)
    kind, what, next_step = explained or _by_status(code, status, operation)
    if what == "":
        what = f"the store refused {operation}: {code} {redacted(message)}".rstrip()
    return kind(what, where=where, next_step=next_step, code=code, status=status, operation=operation)


def _by_status(code: str, status: int, operation: str) -> _Explanation:
    if code == "AccessDenied" or status in {401, 403}:
        needed = _PERMISSIONS.get(operation, operation)
        return AccessDenied, "the credentials do not allow this", f"allow {needed}"
    if code == "NoSuchKey" or status == 404:
        return ObjectNotFound, "the object does not exist", ""
    if code == "PreconditionFailed" or status == 412:
        return PreconditionFailed, "the object is not in the expected state", ""
    if operation == "PutObject" and (code == "NotImplemented" or status == 501):
        return ConditionalWriteUnsupported, "the store has no such conditional write", ""
    if code in {"InternalError", "ServiceUnavailable"} or status == 429 or status >= 500:
        return StoreUnavailable, "", _LATER
    return StorageError, "", ""


def _error_of_client(error: Exception, where: str) -> ConvoyError:
    """The error for a request that had no answer, or was never sent."""
    text = redacted(str(error))
    if isinstance(error, _CREDENTIAL_ERRORS):
        return CredentialsRefused(f"no usable credentials: {text}", where=where, next_step=_NO_CREDENTIALS)
    if isinstance(error, _CONFIG_ERRORS):
        return ConfigError(text, where=where, next_step="correct the URI or the AWS settings")
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return StorageError(
            "the TLS certificate of the store is not trusted",
            where=where,
            next_step="set AWS_CA_BUNDLE to the file with its certificate authority",
        )
    if isinstance(error, _NO_ANSWER_ERRORS):
        return StoreUnavailable(
            f"the store did not answer in full: {text}",
            where=where,
            next_step="check AWS_ENDPOINT_URL and the network, then run the same command again",
        )
    return StorageError(f"{type(error).__name__}: {text}", where=where)


def redacted(text: str) -> str:
    """The text without user names and passwords in URLs."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)
