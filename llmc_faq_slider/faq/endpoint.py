"""HTTP client of an OpenAI-compatible server: address, key, retries, size limits.

The key comes from the environment and is sent in a header only: it is part of no file,
log line or error message, and errors that quote the server have it blanked out.
"""

import ipaddress
import os
import threading
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import httpx
from loguru import logger
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    stop_any,
    stop_when_event_set,
    wait_random_exponential,
)

KEY_VARIABLE = "LLMC_FAQ_SLIDER_API_KEY"

#: statuses that another attempt may cure, besides every 5xx
RETRIED_STATUSES = frozenset({408, 409, 425, 429})
#: the server closed, reset or never took the connection; a read that times out is
#: not among them, because the server may still be at work on it
DROPPED = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ReadError,
    httpx.WriteError,
    httpx.RemoteProtocolError,
)
#: statuses that concern one request, not the server or the key
REFUSED_STATUSES = frozenset({400, 404, 405, 413, 415, 422, 501})

MAX_REPLY_BYTES = 64 << 20
_QUOTED = 300


class EndpointError(RuntimeError):
    """The server cannot be used as it is."""


class RequestRefused(EndpointError):
    """The server is there and declines this one request."""


class InvalidReply(EndpointError):
    """The server's reply is not what the protocol says; never asked for again."""


class _Retriable(EndpointError):
    def __init__(self, message: str, after: float | None = None):
        super().__init__(message)
        self.after = after


@dataclass(frozen=True)
class Address:
    """Where a server is and how it may be spoken to.

    :param url: base URL, up to and with ``/v1``
    :param key_variable: environment variable that holds the key, if any
    :param timeout: seconds to wait for one answer
    :param attempts: tries of one request, the first one included
    :param longest_wait: seconds between two tries at most
    """

    url: str
    key_variable: str = KEY_VARIABLE
    timeout: float = 600.0
    attempts: int = 6
    longest_wait: float = field(default=60.0, repr=False)

    @classmethod
    def parse(cls, url: str, **options: Any) -> Self:
        """Check a URL given by a user.

        :raises ValueError: for another scheme, a missing host, or a user name,
            password or query in the URL
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"endpoint {url!r} is no http or https URL. Give the base URL of an "
                "OpenAI-compatible server, such as http://127.0.0.1:8000/v1."
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"the endpoint URL for {parts.hostname} holds a user name, password, "
                "query or fragment. Give the plain base URL, and the key in the "
                f"environment variable {options.get('key_variable', KEY_VARIABLE)}."
            )
        path = parts.path.rstrip("/")
        base = urlunsplit((parts.scheme, parts.netloc, path or "/v1", "", ""))
        return cls(base, **options)

    @property
    def host(self) -> str:
        return str(urlsplit(self.url).hostname)

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine by its very name, without a look-up."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def check_privacy(address: Address, private: bool, allow_remote: bool) -> None:
    """Refuse to send private data to another machine unless that is allowed.

    :param private: the seeds are the user's own
    :raises ValueError: naming the host and what allows it
    """
    if private and not allow_remote and not address.is_loopback:
        raise ValueError(
            f"FAQModifier: the seeds would be sent to {address.host}, which is not "
            "this machine. Set `allow_remote: true` if they may leave it, or use a "
            "server on this machine (127.0.0.1)."
        )


class Endpoint:
    """Sends JSON to one server and returns the JSON it replies.

    Can be used by several threads at once. Close it after use.
    """

    def __init__(self, address: Address, connections: int = 1):
        self.address = address
        self._ended = threading.Event()
        self._key = os.environ.get(address.key_variable, "").strip()
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        if self._key and address.url.startswith("http:") and not address.is_loopback:
            logger.warning(f"FAQ: the API key goes to {address.host} unencrypted")
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(address.timeout, connect=30),
            limits=httpx.Limits(max_connections=connections),
            # a proxy set for the outside must not see what stays on this machine
            trust_env=not address.is_loopback,
        )
        self._retrying = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, _Retriable)),
            stop=stop_any(
                stop_after_attempt(address.attempts), stop_when_event_set(self._ended)
            ),
            wait=self._wait,
            sleep=sleep_using_event(self._ended),
            reraise=True,
        )

    def give_up(self) -> None:
        """No request is tried again from now on."""
        self._ended.set()

    def close(self) -> None:
        self._ended.set()
        self._client.close()

    def get(self, path: str) -> bytes:
        """Body of a GET.

        :raises RequestRefused: when the server has no such thing
        :raises EndpointError: when it cannot be reached or refuses the key
        """
        return self._retrying(self._send, "GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """Body of the reply to a JSON request.

        :raises RequestRefused: for a status that concerns this request alone
        :raises InvalidReply: for a reply beyond the size limit
        :raises EndpointError: when the server cannot be reached, fails for good or
            refuses the key
        """
        return self._retrying(self._send, "POST", path, body)

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        url = self.address.url + path
        try:
            with self._client.stream(method, url, json=body) as response:
                content = _read(response, url)
        except DROPPED as error:
            raise _Retriable(f"{url}: {_name(error)}") from error
        except httpx.TimeoutException as error:
            raise EndpointError(
                f"{url}: no answer within {self.address.timeout:g} s "
                f"({_name(error)}). Raise the request timeout or lower the concurrency."
            ) from error
        except httpx.DecodingError as error:
            raise InvalidReply(f"{url}: {_name(error)}") from error
        except httpx.HTTPError as error:
            raise EndpointError(f"{url}: {_name(error)}") from error
        if response.is_success:
            return content
        raise self._failure(response, url, content)

    def _failure(
        self, response: httpx.Response, url: str, content: bytes
    ) -> EndpointError:
        status = response.status_code
        said = content.decode("utf-8", "replace")
        if self._key:
            said = said.replace(self._key, "***")
        message = f"{url}: status {status}: {said[:_QUOTED]}"
        if status in RETRIED_STATUSES or (status >= 500 and status != 501):
            return _Retriable(message, _retry_after(response))
        if status in REFUSED_STATUSES:
            return RequestRefused(message)
        if status in (401, 403):
            variable = self.address.key_variable
            state = "was sent" if self._key else "is empty"
            message += f" (the key in the environment variable {variable} {state})"
        return EndpointError(message)

    def _wait(self, state: RetryCallState) -> float:
        """Exponential with jitter, or as long as the server asks."""
        longest = self.address.longest_wait
        error = state.outcome.exception() if state.outcome else None
        asked = error.after if isinstance(error, _Retriable) else None
        backoff = wait_random_exponential(multiplier=1, max=longest)
        wait = max(backoff(state), min(asked or 0.0, longest))
        logger.debug(f"FAQ: {error}; next try in {wait:.1f} s")
        return wait


def _read(response: httpx.Response, url: str) -> bytes:
    content = bytearray()
    for part in response.iter_bytes():
        content += part
        if len(content) > MAX_REPLY_BYTES:
            raise InvalidReply(f"{url}: reply of more than {MAX_REPLY_BYTES} bytes")
    return bytes(content)


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers.get("retry-after", "")))
    except ValueError:
        return None


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_QUOTED]
