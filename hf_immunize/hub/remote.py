"""The Hub as it answers: clear errors without secrets, a client that does not wait for ever, a tree that is checked."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import _http, set_client_factory

from hf_immunize.errors import HubError, ImmunizeError
from hf_immunize.hub.release import Release
from hf_immunize.report.text import clean

Answer = TypeVar("Answer")

_ADVICE = {
    400: "the Hub did not accept the request; its message says what to correct",
    401: "log in with 'hf auth login', or pass a token that is valid",
    403: "the token may not do this: use one with write access to this repository",
    404: "there is no such repository or revision, or the token may not see it: check the name",
    409: "somebody else is changing the same thing: try again",
    412: "somebody else published in between: look at their revision, then try again",
    429: "too many requests: wait for the time the Hub names, then try again",
}


def explain(error: BaseException, doing: str, token: str | None) -> HubError:
    """The client's error as one of ours: what was tried, what came, what to do. Tokens are blacked out."""
    status = _status(error)
    advice = _ADVICE.get(status or 0, "the Hub has trouble or cannot be reached: try again later")
    wait = _header(error, "retry-after")
    if status == 429 and wait:
        advice = f"too many requests: wait {wait} seconds, then try again"
    came = f"HTTP {status}" if status else type(_deepest(error)).__name__
    detail = redacted(" ".join(clean(str(_deepest(error))).split())[:400], token)
    return HubError(f"expected the Hub to {doing}, got {came} ({detail}): {advice}.")


def redacted(text: str, token: str | None) -> str:
    """The text without the token in use or the one stored on this machine."""
    for secret in {token, _stored_token()} - {None, ""}:
        text = text.replace(str(secret), "<token>")
    return text


def asked(doing: str, token: str | None, call: Callable[[], Answer]) -> Answer:
    """Call the Hub. Raises HubError without a chain: what it would carry could hold a header or an echoed token."""
    try:
        with warnings.catch_warnings(record=True):
            return call()
    except ImmunizeError:
        raise
    except Exception as error:  # the client raises a dozen kinds, from its own to the socket's
        told = explain(error, doing, token)
    raise told


def may_have_arrived(api: HfApi, repo_id: str, revision: str, parent: str | None, release: Release) -> str | None:
    """After a commit without an answer: the new head when it holds exactly the release, else None."""
    try:
        head = api.model_info(repo_id, revision=revision).sha
        return head if head and head != parent and not differences(api, repo_id, head, release) else None
    except Exception:
        return None


def differences(api: HfApi, repo_id: str, revision: str, release: Release) -> list[str]:
    """Files of a remote revision that are not those of the release, by the digests the Hub computed."""
    wanted = dict(release.digests)
    wrong = []
    for entry in api.list_repo_tree(repo_id, revision=revision, recursive=True):
        if not isinstance(entry, RepoFile) or entry.path not in wanted:
            continue
        digest = wanted.pop(entry.path)
        data = release.small.get(entry.path)
        if entry.lfs is not None:
            same = entry.lfs.sha256 == digest
        else:
            same = data is not None and entry.blob_id == _git_digest(data)
        if not same:
            wrong.append(entry.path)
    return sorted([*wrong, *wanted])


def _git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324  (git's own name of a file)


@contextmanager
def careful(seconds: float | None, token: str | None) -> Iterator[None]:
    """Talk to the Hub with a limit on silence and without the token in any log.

    By itself the client waits for ever, and the libraries below it log whatever headers a server sends back.
    """
    with _silent_about(token), _impatient(seconds):
        yield


@contextmanager
def _silent_about(token: str | None) -> Iterator[None]:
    """Every log record made meanwhile has the token blacked out, whichever library makes it."""
    before = logging.getLogRecordFactory()

    def factory(*given: Any, **named: Any) -> logging.LogRecord:
        record = before(*given, **named)
        told = record.getMessage()
        clean_text = redacted(told, token)
        if clean_text != told:
            record.msg, record.args = clean_text, ()
        return record

    logging.setLogRecordFactory(factory)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


@contextmanager
def _impatient(seconds: float | None) -> Iterator[None]:
    if seconds is None:
        yield
        return
    before = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)

    def factory() -> Any:
        client = before()
        client.timeout = seconds
        return client

    set_client_factory(factory)
    try:
        yield
    finally:
        set_client_factory(before)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _deepest(error: BaseException) -> BaseException:
    """The innermost of the client's own errors that says something."""
    told = [item for item in _chain(error) if str(item).strip()]
    answered = [item for item in told if _answer(item) is not None]
    return (answered or told or [error])[0 if answered else -1]


def _answer(error: BaseException) -> Any:
    return getattr(error, "response", None)


def _status(error: BaseException) -> int | None:
    found = [getattr(_answer(item), "status_code", None) for item in _chain(error)]
    return next((status for status in found if status is not None), None)


def _header(error: BaseException, name: str) -> str | None:
    answers = [_answer(item) for item in _chain(error)]
    return next((answer.headers.get(name) for answer in answers if answer is not None), None)


def _stored_token() -> str | None:
    try:
        return get_token()
    except Exception:
        return None
