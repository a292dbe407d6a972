"""Finding what looks like a secret, so that it can be refused before it is written anywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from convoy.core.json_values import leaves

# Words of a key that holds a secret whatever its value looks like.
_SECRET_KEY = re.compile(
    r"(?:^|_)(?:password|passwd|passphrase|secrets?|tokens?|credentials?|(?:api|access|private|secret)_?key)(?:$|_)",
    re.IGNORECASE,
)
# Forms that are secrets under any key.
_SECRET_FORMS = (
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(r"[?&]X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)=", re.IGNORECASE),
    re.compile(r"[?&](?:Signature|sig|AWSAccessKeyId)=", re.IGNORECASE),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    re.compile(r"://[^/\s:@]*:[^/\s@]+@"),
    re.compile(r"\b(?:gh[pousr]_|github_pat_|hf_|glpat-|xox[abprs]-)[A-Za-z0-9_-]{20,}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\."),
)
# RAY_AUTH_TOKEN_PATH and its like hold no secret. The value does not tell: a secret key may begin with a slash.
_NAMES_A_FILE = re.compile(r"_(?:path|file|dir)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.IGNORECASE)
# A shorter value of a secret variable may be a word that settings use as well.
_SHORTEST_SECRET = 8


def find_secrets(settings: Any, environment: Mapping[str, str] | None = None) -> list[str]:
    """Where the settings hold what looks like a secret, as dotted keys with the reason; never the value itself.

    Looks at the names of keys, at the forms of values (access keys, signed URLs, private keys, passwords in URLs,
    tokens), and for the values of variables of the environment whose names speak of secrets.
    """
    known = _secrets_of(os.environ if environment is None else environment)
    return [f"{path}: {reason}" for path, value in leaves(settings) if (reason := _why(path, value, known))]


def _why(path: str, value: Any, known: Mapping[str, str]) -> str:
    if not isinstance(value, str) or not value:
        return ""
    for name, secret in known.items():
        if secret in value:
            return f"has the value of the variable {name}"
    if any(form.search(value) for form in _SECRET_FORMS):
        return "has the form of a secret"
    if any(_SECRET_KEY.search(key) for key in path.split(".")):
        return "has the name of a secret"
    return ""


def _secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if _SECRET_KEY.search(name) and len(value) >= _SHORTEST_SECRET and not _NAMES_A_FILE.search(name)
    }
