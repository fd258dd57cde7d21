"""The Hub's answers: asked for again where that can help, told in one line with the fix where it cannot.

Every question, download and upload goes through `with_retries`.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from config import UserError
from data import DataError
from runtime.errors import BAD_PATH
from runtime.log import node_log, printable

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries; doubled each time
UNREACHED_MINUTES = 1.0  # for a Hub that never answered this process: most often there is no network at all
PASSING = (408, 409, 412, 416, 425, 429)  # of the answers 400 to 499, those that may be others the next time
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"

_answered = False  # whether the Hub ever did


class HubError(DataError):
    """What the Hub does not give, with the reason and the fix."""


class Refused(HubError):
    """What it would not give the next time either."""


def with_retries(action: Callable[[], T], what: str, minutes: float, stop: threading.Event | None = None) -> T:
    """The result of `action`; what may pass is tried again, with growing pauses, for `minutes`, or until `stop` is set.

    Raises HubError; Refused, at once, where trying again cannot help. A UserError of `action` itself is raised as it is.
    """
    global _answered
    from huggingface_hub import errors
    stop, begun, pause, told = stop or threading.Event(), time.monotonic(), FIRST_PAUSE, None
    while True:
        try:
            result = action()
        except UserError:
            raise
        except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
            cause = root_of(error)
        else:
            _answered = True
            return result
        _answered |= status_of(cause) is not None
        if is_final(cause):
            raise Refused(f"{what}: {explain(cause)}")
        patience = minutes if _answered or math.isinf(minutes) else min(minutes, UNREACHED_MINUTES)
        if time.monotonic() - begun + pause > 60 * patience:
            raise HubError(f"{what}: gave up after {patience:g} minutes ({explain(cause)}); try again when the Hub can be reached"
                           + (", or wait longer with data.dataset.patience_minutes" if patience == minutes else ""))
        message = f"{what}: {explain(cause)}; trying again {'in' if pause < LONGEST_PAUSE else 'every'} {pause:g} s"
        if message != told:  # at the longest pause, which may be for hours, once
            node_log.warning(message)
            told = message
        if stop.wait(pause):
            raise HubError(f"{what}: stopped")
        pause = min(2 * pause, LONGEST_PAUSE)


def fetch_folder(name: str, kind: str, patterns: list[str], minutes: float, revision: str | None = None) -> Path:
    """The files of a Hub repository (`kind`: model, dataset) that match `patterns`, in the client's own cache."""
    from huggingface_hub import snapshot_download
    return Path(with_retries(lambda: snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns),
                             name, minutes))


# ---- what an error says --------------------------------------------------------------------------------------------

def root_of(error: Exception) -> Exception:
    """The error behind the client's "not in the cache, and cannot be had"."""
    from huggingface_hub import errors
    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def status_of(error: Exception) -> int | None:
    """The status of the answer; None where none came."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_final(error: Exception) -> bool:
    """Whether trying again cannot help: no such thing, no access, no sense, offline by choice."""
    from huggingface_hub import constants, errors
    if (status := status_of(error)) is not None:
        return 400 <= status < 500 and status not in PASSING
    return constants.HF_HUB_OFFLINE or getattr(error, "errno", None) in BAD_PATH or isinstance(
        error, (errors.OfflineModeIsEnabled, errors.HFValidationError, errors.LocalTokenNotFoundError))


def explain(error: Exception) -> str:
    """The client's reason in one line, and what to do about it."""
    from huggingface_hub import constants, errors
    said = getattr(error, "server_message", None)
    said, status = f" ({_clean(said)})" if said else "", status_of(error)
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated{said}; request access at {_page(error)}, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository on the Hub, or a private one{said}; check the name, or {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no such revision{said}; check data.dataset.revision or --revision"
    if status == 401 or isinstance(error, errors.LocalTokenNotFoundError):
        return f"the Hub wants a valid token{said}; {LOGIN}"
    if status == 403:
        return f"the token may not do this{said}; give it the permission at {constants.ENDPOINT}/settings/tokens, or {LOGIN}"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it, or fetch this where there is a network"
    return f"{first_line(error)}{said}"


def first_line(error: Exception) -> str:
    """What an error says first that tells something, fit for a terminal, without what signs a link."""
    lines = [line for line in str(error).splitlines() if line.strip() and not re.match(r"\d{3} Client Error", line)]
    return _clean((lines or [type(error).__name__])[0])


def _clean(text: str) -> str:
    text = re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]+", r"\1", text)
    return printable(" ".join(text.split()))[:200]


def _page(error: Exception) -> str:
    """The repository's page, by the address that was asked."""
    found = re.match(r"(https?://[^/]+)/(?:api/)?(?:models/)?((?:datasets/)?[\w.-]+/[\w.-]+)", str(error.response.url))
    return "/".join(found.groups()) if found else "its page"
