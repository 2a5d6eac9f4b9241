"""Questions to a language model at a chat-completions address.

Nothing is sent unless an address is given. The key is read from the environment when questions are asked, and
is kept nowhere.
"""

import hashlib
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jobs.errors import SpecError
from jobs.spec import canonical_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Whom to ask, and how patiently.

    Attributes:
        base_url: Address up to but without `/chat/completions`, such as `http://127.0.0.1:8000/v1`.
        model: The judge's name at that address.
        key_variable: Name of the environment variable that holds the key, in capitals; None = no key is sent.
            Over http:// it travels as plain text.
        request: Further fields of the request.
        timeout_seconds: Longest wait for the next bytes of a reply.
        attempts: How often a question is asked at most, if the address is busy or silent.
        concurrency: Questions under way at once.
    """

    base_url: str
    model: str
    key_variable: str | None = field(default=None, repr=False)
    request: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 512})
    timeout_seconds: float = 60.0
    attempts: int = 4
    concurrency: int = 4

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises SpecError if nobody can be asked so."""
        _check_address(self.base_url)
        if not self.model.strip():
            raise SpecError(f"judge: model={self.model!r}; it takes the model's name at the address")
        if self.key_variable is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", self.key_variable):
            raise SpecError(
                "judge: key_variable is not the name of an environment variable in capitals, such as "
                "JUDGE_KEY; it is not shown, in case it is the key itself"
            )
        if taken := sorted({"model", "messages", "stream", "n"} & set(self.request)):
            raise SpecError(
                f"judge: request has {taken}; the judge sets or needs them itself, leave them out"
            )
        try:
            canonical_json(dict(self.request))
        except (TypeError, ValueError) as error:
            raise SpecError(f"judge: request is not plain JSON: {error}") from error
        if self.attempts < 1 or self.concurrency < 1 or not 0 < self.timeout_seconds < math.inf:
            raise SpecError(
                f"judge: attempts={self.attempts}, concurrency={self.concurrency}, "
                f"timeout_seconds={self.timeout_seconds}; they take 1 or more, and seconds above 0"
            )


def _check_address(base_url: str) -> None:
    """Raises SpecError, without the address, which may hold a password, if it is not a plain one."""
    try:
        parts = urllib.parse.urlsplit(base_url)
        plain = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        plain = False
    if not plain or any(mark in base_url for mark in "@?#") or not base_url.isprintable():
        raise SpecError(
            "judge: base_url takes http:// or https://, a host and a path, without user, password, query or "
            "fragment, such as http://127.0.0.1:8000/v1; keys belong into the variable named by key_variable"
        )


class Answer(NamedTuple):
    """A reply, or why there is none.

    Attributes:
        reply: What was said; None if there is none.
        error: Why there is none, in one line without the key.
        again: Whether asking again may help.
        wait_seconds: How long the address asks to wait before.
        refused: Whether the address refuses whoever asks.
    """

    reply: str | None = None
    error: str | None = None
    again: bool = False
    wait_seconds: float = 0.0
    refused: bool = False


def ask(chat: Chat, messages: Sequence[str], *, pause: Callable[[float], None] = time.sleep) -> list[Answer]:
    """The reply to each message, in their order, each in a conversation of its own.

    After eight messages in a row without a reply, the rest are not sent.

    Args:
        chat: Whom to ask.
        messages: What to say.
        pause: Waits for the seconds given; between attempts.

    Raises:
        SpecError: If the key is absent or no key, or the address refuses the judge, the model or the key.
    """
    line = _Line(chat, _read_key(chat), pause)
    with ThreadPoolExecutor(max_workers=chat.concurrency) as pool:
        return list(pool.map(line.ask, messages))


def code_of(*texts: str) -> str:
    """Sixteen hexadecimal digits for tags around texts, computed from them: no text can hold its own tag.

    That keeps a text from posing as the frame; it does not keep a judge from being persuaded by what a text
    says, nor from obeying it.
    """
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


class _Key:
    """A secret that no repr, error or log shows."""

    __slots__ = ("_secret",)

    def __init__(self, secret: str) -> None:
        self._secret = secret.strip()

    @property
    def is_set(self) -> bool:
        return bool(self._secret)

    @property
    def fits_a_header(self) -> bool:
        """Whether http.client takes it, whose refusal would show it, and it is long enough to hide."""
        return len(self._secret) >= 8 and re.fullmatch("[!-~]*", self._secret) is not None

    def header(self) -> str:
        return f"Bearer {self._secret}"

    def redact(self, text: str) -> str:
        return text.replace(self._secret, "[key]")


def _read_key(chat: Chat) -> _Key | None:
    if chat.key_variable is None:
        return None
    key = _Key(os.environ.get(chat.key_variable, ""))
    if not key.is_set:
        raise SpecError(f"judge: the environment variable {chat.key_variable} is not set; it holds the key")
    if not key.fits_a_header:
        raise SpecError(
            f"judge: {chat.key_variable} holds no key: it takes 8 or more ASCII characters without spaces; "
            "where none is needed, leave out key_variable"
        )
    return key


_GIVE_UP_AFTER = 8  # questions in a row without a reply
_LONGEST_WAIT = 60.0  # seconds
_MOST_BYTES = 1 << 20  # of a response
_REFUSED = (401, 403, 404, 405)
_BUSY = (408, 429)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would carry the key to another host."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        """No request."""


class _Line:
    """One run of questions: retries, and gives up on an address that is gone."""

    def __init__(self, chat: Chat, key: _Key | None, pause: Callable[[float], None]) -> None:
        self.chat = chat
        self._key = key
        self._pause = pause
        self._opener = urllib.request.build_opener(_Stay)
        self._lock = threading.Lock()
        self._silent = 0

    def ask(self, message: str) -> Answer:
        """The reply to one message. Raises SpecError if the address refuses."""
        if self._silent >= _GIVE_UP_AFTER:
            return Answer(error=f"not asked: {self._silent} questions in a row got no reply")
        answer = self._attempt(message)
        for attempt in range(1, self.chat.attempts):
            if not answer.again:
                break
            self._pause(min(_LONGEST_WAIT, max(answer.wait_seconds, 2.0 ** (attempt - 1))))
            answer = self._attempt(message)
        if answer.refused:
            raise SpecError(
                f"judge: {self.chat.base_url} refuses: {answer.error}; mend model, address or key"
            )
        with self._lock:
            self._silent = self._silent + 1 if answer.again else 0
        return answer

    def _attempt(self, message: str) -> Answer:
        """One request. Errors come back as values: a chain of exceptions would hold the headers."""
        try:
            with self._opener.open(self._request(message), timeout=self.chat.timeout_seconds) as response:
                return self._read(response.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            return self._failed(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # a ValueError is an address that cannot be asked
            reason = self._clean(f"{type(error).__name__}: {error}")
            return Answer(error=reason, again=not isinstance(error, ValueError))

    def _request(self, text: str) -> urllib.request.Request:
        chat = self.chat
        message = {"role": "user", "content": text}
        body = {**chat.request, "model": chat.model, "messages": [message]}
        request = urllib.request.Request(
            chat.base_url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        if self._key is not None:
            request.add_header("Authorization", self._key.header())
        return request

    def _read(self, content: bytes) -> Answer:
        try:
            reply = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            return Answer(error=f"the response is no chat completion ({type(error).__name__})")
        if not isinstance(reply, str):
            return Answer(error=f"the response holds no text but a {type(reply).__name__}")
        return Answer(reply=reply if self._key is None else self._key.redact(reply))

    def _failed(self, error: urllib.error.HTTPError) -> Answer:
        try:
            said = error.read(_MOST_BYTES).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        after = error.headers.get("Retry-After", "")
        return Answer(
            error=self._clean(f"HTTP {error.code}: {said}"),
            again=error.code in _BUSY or error.code >= 500,
            wait_seconds=float(after) if re.fullmatch("[0-9]{1,6}", after) else 0.0,
            refused=error.code in _REFUSED or 300 <= error.code < 400,
        )

    def _clean(self, message: str) -> str:
        """A message in one line of at most 300 characters, without the key."""
        redacted = message if self._key is None else self._key.redact(message)
        return " ".join(redacted.split())[:300]
