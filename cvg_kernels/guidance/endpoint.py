"""One request to a chat endpoint, whose reply is bounded in size and time, and whose key shows nowhere."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.reading import parse_json

MOST_BYTES = 2**20


class _Refused(Exception):
    """A reply that is not read further; the message says why."""


def chat_address(url: str) -> str:
    """The address of chat completions.

    Args:
        url: url of the API, up to and including its version.

    Raises:
        ArgumentError: for what is no address of http or https, or holds a name, a password or a query.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ArgumentError("url must be the address of an API, got one that cannot be read") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ArgumentError(
            f"url must hold no name, password or query, got them with {parts.scheme}://{host}: give key="
        )
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not host or not plain:
        raise ArgumentError(f"url must begin with http:// or https:// and a host, got {url!r}")
    return url.rstrip("/") + "/chat/completions"


def post_json(address: str, body: Any, *, token: str | None, seconds: float) -> Any:
    """Posts JSON and returns the JSON of the reply.

    Args:
        address: as `chat_address` made it.
        body: JSON.
        token: a bearer token, or none.
        seconds: to wait at most, from the connection to the last byte.

    Raises:
        ArgumentError: if no JSON comes back in time; the token is in no message.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if token is not None and token.strip():
        token = token.strip()
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ArgumentError("key must be of printable ASCII characters without spaces, got others")
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    began, connections = time.monotonic(), []
    opener = urllib.request.build_opener(_NoRedirect, _Http(connections), _Https(connections))
    try:
        with _ended_after(seconds, connections), opener.open(request, timeout=seconds) as response:
            data = _read(response, began + seconds)
            kind = response.headers.get("Content-Type", "none")
        return _parsed(data, kind)
    except (OSError, http.client.HTTPException, ValueError, _Refused) as error:
        if time.monotonic() - began >= seconds:
            reason = f"it took longer than {seconds:g} seconds"
        else:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        if token:
            reason = reason.replace(token, "…")
    raise ArgumentError(f"the writer at {address} gave no states: {reason}")


def _read(response: Any, until: float) -> bytes:
    """The body, unless it is too long or takes too long."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise _Refused(f"its reply is encoded as {encoding[:40]!r}, which was not asked for")
    parts, size = [], 0
    while part := response.read1(2**16):
        size += len(part)
        if size > MOST_BYTES:
            raise _Refused(f"its reply has more than {MOST_BYTES} bytes")
        if time.monotonic() > until:
            raise TimeoutError
        parts.append(part)
    if time.monotonic() > until:  # the connection was ended
        raise TimeoutError
    if response.length:  # what it announced and did not send
        raise _Refused("its reply ended too early")
    return b"".join(parts)


def _parsed(data: bytes, kind: str) -> Any:
    try:
        return parse_json(data, "its reply")
    except ArgumentError as error:
        raise _Refused(f"{error} (its content type is {kind[:60]!r})") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go to another address than the one that the user gave."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> NoReturn:
        """Refuses."""
        place = urllib.parse.urlsplit(newurl)
        raise _Refused(f"it redirects to {place.scheme}://{place.hostname}{place.path[:80]}: give that address")


def _watched(kind: Any, connections: list, *args: Any, **options: Any) -> Any:
    """A connection that can be ended from outside."""
    connections.append(kind(*args, **options))
    return connections[-1]


class _Http(urllib.request.HTTPHandler):
    def __init__(self, connections: list) -> None:
        super().__init__()
        self._made = partial(_watched, http.client.HTTPConnection, connections)

    def http_open(self, req: Any) -> Any:
        return self.do_open(self._made, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, connections: list) -> None:
        super().__init__()
        self._made = partial(_watched, http.client.HTTPSConnection, connections)

    def https_open(self, req: Any) -> Any:
        return self.do_open(self._made, req)


@contextmanager
def _ended_after(seconds: float, connections: list) -> Iterator[None]:
    """Ends connections after a time, which a timeout of the socket does not: it begins anew with every byte."""

    def end() -> None:
        for one in connections:
            if one.sock is not None:
                with suppress(OSError):
                    one.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
