"""A proxy in front of an object store that does what networks and servers do to a client at their worst.

It passes requests on as they are (the signature of S3 covers the headers, `Host` among them), counts them, and puts
faults where rules say so.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_PIECE = 1 << 16
# What servers of S3 say, which clients look at.
_CODES = {403: "InvalidAccessKeyId", 404: "NoSuchKey", 429: "TooManyRequests", 503: "SlowDown"}
_ALONE = ("connection", "keep-alive", "transfer-encoding", "content-length")


class CutError(Exception):
    """The connection to the client ends here."""


@dataclass
class Rule:
    """A fault and the requests that it meets.

    Attributes:
        fault: a status (403, 404, 429, 503), ``reset`` (RST in mid-body), ``short`` (the promised length, half the
            body, a clean end), ``stall`` (silence for ``stall_s`` in mid-body) or ``flip`` (one bit in mid-body).
        match: a pattern in ``METHOD /path``.
        times: requests that it meets, at most.
        until: `time.monotonic` after which it meets none.
        met: requests that it has met.
    """

    fault: int | str
    match: str
    times: float = math.inf
    until: float = math.inf
    stall_s: float = math.inf
    met: int = 0


@dataclass
class Seen:
    """A request, and the bytes of body sent back so far."""

    method: str
    path: str
    sent: int = 0


class Proxy:
    """Listens on a port of its own and passes requests on to a port of this machine.

    Attributes:
        url: of the proxy.
        seen: requests so far, in the order in which they came.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.seen: list[Seen] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def inject(
        self, fault: int | str, match: str = r"^GET .*\.tar$", times: float = math.inf, seconds: float = math.inf,
        stall_s: float = math.inf,
    ) -> Rule:  # fmt: skip
        """Let ``fault`` meet the next ``times`` requests that match, or all within ``seconds``. See `Rule`."""
        rule = Rule(fault, match, times, time.monotonic() + seconds, stall_s)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Take all faults back, of those that stall the rest of the silence too."""
        with self._lock:
            self._rules.clear()
        self._ended.set()
        self._ended = threading.Event()

    def sent(self) -> dict[str, int]:
        """Bytes of tars sent, by file name."""
        found: dict[str, int] = {}
        for request in list(self.seen):
            name = request.path.rpartition("/")[2]
            if request.method == "GET" and name.endswith(".tar"):
                found[name] = found.get(name, 0) + request.sent
        return found

    def stop(self) -> None:
        """Refuse connections from now on."""
        self.clear()
        self._server.shutdown()
        self._server.server_close()

    def rule_for(self, request: str) -> Rule | None:
        """The first rule that meets a request, which counts as met."""
        with self._lock:
            for rule in self._rules:
                if rule.met < rule.times and time.monotonic() < rule.until and re.search(rule.match, request):
                    rule.met += 1
                    return rule
        return None

    def silence(self, seconds: float) -> None:
        """Nothing, for so long or until the faults are taken back."""
        self._ended.wait(min(seconds, threading.TIMEOUT_MAX))


def _spoilt(rule: Rule, proxy: Proxy, pieces: Iterator[bytes], length: int) -> Iterator[bytes]:
    """The body with the rule's fault at its middle byte."""
    place = 0
    for piece in pieces:
        at = length // 2 - place
        place += len(piece)
        if not 0 <= at < len(piece):
            yield piece
        elif rule.fault == "flip":
            yield piece[:at] + bytes([piece[at] ^ 4]) + piece[at + 1 :]
        else:
            yield piece[:at]
            if rule.fault != "stall":
                raise CutError(rule.fault)
            proxy.silence(rule.stall_s)
            yield piece[at:]


def _handler(proxy: Proxy) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

        def _pass_on(self) -> None:
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._seen = Seen(self.command, path)
            proxy.seen.append(self._seen)
            rule = proxy.rule_for(f"{self.command} {path}")
            try:
                if rule is not None and isinstance(rule.fault, int):
                    self._refuse(rule.fault)
                else:
                    self._answer(body, rule)
            except CutError as end:
                if str(end) == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                self.close_connection = True
            except (OSError, http.client.HTTPException):
                # Either side is gone; the other one learns of it by the end of its connection.
                self.close_connection = True

        def _refuse(self, status: int) -> None:
            text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{_CODES[status]}</Code></Error>'.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self._send([text] if self.command != "HEAD" else [])

        def _answer(self, body: bytes, rule: Rule | None) -> None:
            there = http.client.HTTPConnection("127.0.0.1", proxy.port)
            try:
                there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        there.putheader(name, value)
                there.endheaders(body or None)
                answer = there.getresponse()
                empty = self.command == "HEAD" or answer.status in (204, 304)
                length = answer.length
                # Listings come in chunks of unknown length.
                pieces: Iterator[bytes] = iter(lambda: answer.read(_PIECE), b"")
                if length is None and not empty:
                    whole = answer.read()
                    pieces, length = iter([whole]), len(whole)
                self.send_response_only(answer.status, answer.reason)
                for name, value in answer.getheaders():
                    if name.lower() not in _ALONE:
                        self.send_header(name, value)
                if answer.status != 204:
                    self.send_header("Content-Length", str(answer.headers.get("Content-Length", length or 0)))
                self.end_headers()
                if not empty and length is not None:
                    self._send(pieces if rule is None else _spoilt(rule, proxy, pieces, length))
                    if self._seen.sent < length:
                        raise CutError("the server is gone")
            finally:
                there.close()

        def _send(self, pieces: Iterator[bytes] | list[bytes]) -> None:
            for piece in pieces:
                self._seen.sent += len(piece)
                self.wfile.write(piece)

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

    return Handler
