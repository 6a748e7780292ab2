"""What must not leave this machine, taken out of what is written: keys and passwords, and the path of the home folder.

`redact` goes over all that a run records, tracks or prints as an error. A secret becomes `***`. A path in the home
folder keeps its meaning as `~/...`, and `restore` makes it whole where a record is read back: a record still says which
files a run read.

What counts as a secret: the value of an environment variable whose name says so (`HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`),
the password of a proxy in the environment, user and password in a URL, a field of such a name in a URL, a value under a
key of such a name, and text in the form of a known kind of token.

Invariant: `redact` changes nothing that it returned itself. Cost: one pass over the text. What it cannot do: know a
secret that has none of these marks, or find a home path that is written in another way (a link that leads there).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
_SHORTEST = 8
"""Shorter values of the environment are words ("true", "EMPTY") rather than secrets."""
_SECRET_WORD = re.compile(
    r"(?i)(?:.*_)?(?:keys?|apikey|accesskey|tokens?|secrets?|passw(?:or)?d|passphrase|pass|credentials?|auth|pat)(?:_.*)?"
)
_SECRET_KEY = re.compile(
    r"(?i)(?:(?:api|access|secret|private)[_-]?key|(?:client[_-]?)?secret|passw(?:or)?d|passphrase|authorization"
    r"|(?:(?:access|auth|api|hf|hub|refresh|bearer|session)[_-])?token|credentials)"
)
_IN_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s?#\"'@]+@")
_IN_QUERY = re.compile(
    r"(?i)([?&;](?:[a-z0-9_-]*(?:token|key|secret|password|passwd|signature|credential)|sig|auth)=)[^&;#\s\"']+"
)
_KNOWN = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bwandb_v1_[A-Za-z0-9_-]{20,}|\bnvapi-[A-Za-z0-9_-]{20,}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"
)
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_SHORT_HOME = re.compile(r"(?<![\w.~/-])~/")


def redact(value: Any) -> Any:
    """A copy of text, or of mappings and lists of it, without secrets and with `~/` for the home folder."""
    return _mapped(value, _redactor(), hide_keys=True)


def restore(value: Any) -> Any:
    """A copy of what `redact` returned, with this machine's home folder for `~/`; secrets stay hidden."""
    home = os.path.expanduser("~").rstrip("/") + "/"
    return _mapped(value, lambda text: _SHORT_HOME.sub(lambda _: home, text), hide_keys=False)


def _mapped(value: Any, change: Callable[[str], str], *, hide_keys: bool) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            _mapped(key, change, hide_keys=hide_keys): HIDDEN
            if hide_keys and isinstance(one, str) and one and _SECRET_KEY.fullmatch(str(key))
            else _mapped(one, change, hide_keys=hide_keys)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_mapped(one, change, hide_keys=hide_keys) for one in value)
    return value


def _redactor() -> Callable[[str], str]:
    """What `redact` does to one text, by the environment as it is now."""
    secrets, homes = _secrets(), _homes()

    def change(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, HIDDEN)
        text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
        text = _IN_QUERY.sub(rf"\1{HIDDEN}", text)
        text = _KNOWN.sub(HIDDEN, text)
        return homes.sub("~/", text) if homes else text

    return change


def _secrets() -> list[str]:
    """Secret values of the environment, the longest first: one may be part of another."""
    found = set[str]()
    for name, value in os.environ.items():
        if name.lower() in _PROXIES:
            password = value.rpartition("@")[0].rpartition("/")[2].partition(":")[2]
            found |= {password, unquote(password)}
        elif _SECRET_WORD.fullmatch(name) and not value.startswith(("/", "~", ".")):
            found.add(value)  # else it says where the secret lies
    return sorted((one for one in found if len(one) >= _SHORTEST), key=len, reverse=True)


def _homes() -> re.Pattern[str] | None:
    """The home folder at the start of a path, by its name and by what the name leads to."""
    home = os.path.expanduser("~")
    names = {name.rstrip("/") for name in (home, os.path.realpath(home)) if os.path.isabs(name)} - {""}
    if not names:
        return None
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(rf"(?<![\w.-])(?:{either})(?:/+|(?![\w.-]))")
