"""Asks a server that speaks the OpenAI chat-completions format, and keeps the key to itself.

One POST per question, with Python's own HTTP client: temperature 0, no streaming. A server that is busy or out of
reach is asked again, later and later, as long as it asks for with `Retry-After`. Redirects are not followed, as the
key would go with them. What is raised never holds the key, even where the server repeats it.
https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import email.utils
import http.client
import json
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from evomerge.fitness.base import UnavailableError
from evomerge.measure_settings import ENDPOINT

LONGEST_PAUSE = 30.0
"""Seconds between two attempts, unless the server asks for more."""

LONGEST_WAIT = 300.0
"""Seconds that a server may ask to wait; the run stops instead of waiting longer."""

MAX_BYTES = 4 * 1024 * 1024
"""Largest reply."""

AGAIN = frozenset({408, 409, 425, 429})
"""Answers, beside all from 500 on, after which a question is asked again."""

REFUSED = frozenset({400, 413, 422})
"""Answers to a single question that the server does not take, one that is too long for it, for instance."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back.

    Attributes:
        text: What the model said; empty if it said nothing.
        refused: Why the server did not take the question, or empty.
    """

    text: str = ""
    refused: str = ""


class _BusyError(Exception):
    """The question may be asked again; `after` says in how many seconds, if the server says it."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Let a redirect be an error."""


class ChatClient:
    """Asks one model behind one server; threads may share it.

    Args:
        url: Where the server's interface begins.
        model: The model, as the server knows it.
        key: The key, or None for a server without.
        variable: Environment variable that the key comes from, for messages.
        max_tokens: Longest reply in tokens; None to leave that to the server.
        timeout: Longest wait for one reply in seconds.
        retries: How often a question is asked again.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        key: str | None,
        variable: str | None,
        max_tokens: int | None,
        timeout: float,
        retries: int,
    ) -> None:
        self._address = url + ENDPOINT
        self._model = model
        self._key = key
        self._variable = variable
        self._max_tokens = max_tokens
        self._timeout = timeout
        self._retries = retries
        self._opener = urllib.request.build_opener(_NoRedirects())

    def ask(self, prompt: str, given_up: threading.Event) -> Reply:
        """Ask a question.

        Args:
            prompt: The question.
            given_up: Set by another thread when there is no use in waiting any longer.

        Raises:
            UnavailableError: The server cannot be reached or does not work as it should.
        """
        for attempt in range(self._retries + 1):
            try:
                return self._once(prompt)
            except _BusyError as error:
                pause = min(2.0**attempt, LONGEST_PAUSE) if error.after is None else error.after
                if pause > LONGEST_WAIT:
                    raise self.unavailable(f"{error}; it asks to wait {pause:.0f} s") from None
                if attempt == self._retries:
                    times = "once" if attempt == 0 else f"{attempt + 1} times"
                    raise self.unavailable(f"{error} (asked {times})") from None
            if given_up.wait(pause):
                break
        raise self.unavailable("given up")

    def _once(self, prompt: str) -> Reply:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "stream": False,
        }
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "evomerge"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(  # noqa: S310 - the settings allow http and https only
            self._address, data=json.dumps(body).encode(), headers=headers, method="POST"
        )
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error)
        except ssl.SSLCertVerificationError as error:
            raise self.unavailable(f"its certificate is not valid: {error.verify_message}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise self.unavailable(f"its certificate is not valid: {reason.verify_message}") from None
            if isinstance(reason, TimeoutError):
                raise _BusyError(f"no reply within {self._timeout:g} s") from None
            raise _BusyError(self._safe(f"{type(reason).__name__}: {reason}")) from None

    def _read(self, response: Any) -> Reply:
        until = time.monotonic() + self._timeout
        data = b""
        while chunk := response.read1(1 << 16):
            data += chunk
            if len(data) > MAX_BYTES:
                raise self.unavailable(f"its reply is larger than {MAX_BYTES} bytes")
            if time.monotonic() > until:
                raise TimeoutError
        try:
            text = json.loads(data)["choices"][0]["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _BusyError(f"its reply is no chat completion: {self._start(data)}") from None
        return Reply(text=text if isinstance(text, str) else "")

    def _refused(self, error: urllib.error.HTTPError) -> Reply:
        """What an answer other than 200 means."""
        try:
            said = self._start(error.read(1 << 16))
        except (OSError, http.client.HTTPException):
            said = ""
        reason = f"it answers {error.code} {said}".rstrip()
        if error.code in REFUSED:
            return Reply(refused=reason)
        if error.code in AGAIN or error.code >= 500:
            raise _BusyError(reason, _seconds(error.headers.get("Retry-After")))
        if error.code in (401, 403):
            hint = (
                f"; check the key in the environment variable {self._variable}"
                if self._variable
                else "; it seems to want a key: name its environment variable in judge.api_key_env"
            )
            raise self.unavailable(reason + hint)
        if 300 <= error.code < 400:
            where = self._safe(str(error.headers.get("Location", "another address")))[:200]
            raise self.unavailable(f"it redirects to {where}, where nothing was sent; name that in judge.url")
        raise self.unavailable(reason)

    def unavailable(self, reason: str) -> UnavailableError:
        """The error that the server cannot be asked, to be raised."""
        return UnavailableError(f"the judge {self._model} at {self._address} cannot be asked: {reason}")

    def _start(self, data: bytes) -> str:
        """The beginning of what a server said, on one line and without the key."""
        text = self._safe(data.decode(errors="replace"))
        return re.sub(r"\s+", " ", text).strip()[:300]

    def _safe(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _seconds(header: str | None) -> float | None:
    """What `Retry-After` asks for: a number of seconds or a date; None where it says nothing."""
    if header is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
    except (TypeError, ValueError):
        return None
    return max(0.0, date.timestamp() - time.time())
