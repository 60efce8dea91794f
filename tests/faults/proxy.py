"""A proxy before an object store that goes wrong on purpose: by rules, or by a seeded mixture of faults."""

import http.client
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
from clouds import Cloud

ALWAYS = 10**9
HOP = {"connection", "expect", "keep-alive", "transfer-encoding", "content-length"}  # between neighbours alone


@dataclass
class Request:
    """What a client sent.

    Attributes:
        method: such as PUT.
        path: with the query.
        client: its address and port, by which the process that sent it can be found.
        fault: name of what was done to it; empty where it passed.
    """

    method: str
    path: str
    client: tuple[str, int]
    fault: str = ""


class Exchange:
    """One request on its way, as the action of a rule sees it; an action that does nothing lets it pass.

    Attributes:
        request: what the client sent.
        ended: whether the client has its answer, or will get none.
    """

    def __init__(self, handler: BaseHTTPRequestHandler, server: tuple[str, int], request: Request) -> None:
        self._handler, self._server, self.request = handler, server, request
        self._size = int(handler.headers.get("Content-Length", 0))
        self._body: bytes | None = None
        self.ended = False

    def forward(self) -> tuple[int, list[tuple[str, str]], bytes]:
        """Send the request on and take the server's answer: status, headers, body."""
        with closing(self._send(self._whole_body())) as connection:
            found = connection.getresponse()
            return found.status, found.getheaders(), found.read()

    def forward_half(self) -> None:
        """Send on the head and half of the body, and close that connection."""
        self._send(self._whole_body()[: self._size // 2]).close()

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """Answer the client."""
        self._whole_body()  # left unread, it would be taken for the next request
        self._handler.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP or (self.request.method == "HEAD" and name.lower() == "content-length"):
                self._handler.send_header(name, value)
        if self.request.method != "HEAD":
            self._handler.send_header("Content-Length", str(len(body)))
        self._handler.end_headers()
        self._handler.wfile.write(b"" if self.request.method == "HEAD" else body)
        self.ended = True

    def cut(self) -> None:
        """Close the client's connection without an answer."""
        self.ended = self._handler.close_connection = True
        with suppress(OSError):  # the client may have gone
            self._handler.connection.shutdown(socket.SHUT_RDWR)

    def _whole_body(self) -> bytes:
        if self._body is None:
            self._body = self._handler.rfile.read(self._size)
        return self._body

    def _send(self, body: bytes) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(*self._server, timeout=60)
        connection.putrequest(self.request.method, self.request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self._handler.headers.items():
            if name.lower() not in HOP:
                connection.putheader(name, value)  # Host as it is: it is signed
        if "Content-Length" in self._handler.headers:
            connection.putheader("Content-Length", str(self._size))
        connection.endheaders(body)
        return connection


Action = Callable[[Exchange], None]


def cut_before(exchange: Exchange) -> None:
    """The server never hears of it."""
    exchange.cut()


def cut_in_body(exchange: Exchange) -> None:
    """The server gets half of it."""
    exchange.forward_half()
    exchange.cut()


def lose_answer(exchange: Exchange) -> None:
    """The server does it, the client does not learn that."""
    exchange.forward()
    exchange.cut()


def kill_sender(exchange: Exchange) -> None:
    """The server does it, and the process that asked is killed before it learns that."""
    exchange.forward()
    sender = next(
        connection.pid for connection in psutil.net_connections("tcp") if connection.laddr == exchange.request.client
    )
    os.kill(sender, signal.SIGKILL)
    exchange.cut()


def passing(exchange: Exchange) -> None:
    """Nothing goes wrong."""


def refuse(status: int, code: str) -> Action:
    """Answer with an error of S3's, such as 503 SlowDown or 404 NoSuchBucket."""
    body = f"<Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
    return named(
        f"{status} {code}", lambda exchange: exchange.answer(status, [("Content-Type", "application/xml")], body)
    )


def delay(seconds: float) -> Action:
    """Let it pass later."""
    return named("delay", lambda exchange: time.sleep(seconds))


def call(function: Callable[[Request], None]) -> Action:
    """Call a function, then let it pass."""
    return named("call", lambda exchange: function(exchange.request))


def in_turn(*actions: Action) -> Action:
    """Do one after the other."""

    def do(exchange: Exchange) -> None:
        for action in actions:
            action(exchange)

    return named("in turn", do)


def stale() -> Action:
    """Keep on giving the first answer that was got to each request."""
    first: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}

    def repeat(exchange: Exchange) -> None:
        if exchange.request.path not in first:
            first[exchange.request.path] = exchange.forward()
        exchange.answer(*first[exchange.request.path])

    return named("stale", repeat)


def mixture(seed: int, shares: Mapping[Action, float]) -> Action:
    """Draw for each request one of several faults, or none.

    Args:
        seed: with the request and how often it came, it alone decides, whatever the order of requests.
        shares: probability of each fault; they add up to less than one.
    """
    seen: Counter[tuple[str, str]] = Counter()

    def draw(exchange: Exchange) -> None:
        key = exchange.request.method, exchange.request.path
        seen[key] += 1
        drawn = random.Random(f"{seed} {key} {seen[key]}").random()
        action = passing
        for candidate, share in shares.items():
            if 0 <= drawn < share:
                action = candidate
            drawn -= share
        exchange.request.fault = action.__name__
        action(exchange)

    return named("mixture", draw)


def named(name: str, action: Action) -> Action:
    action.__name__ = name
    return action


@dataclass
class Rule:
    """What to do with which requests.

    Attributes:
        action: what to do; a request it does not answer passes.
        method: of the requests, a regular expression.
        path: found in their path with the query, a regular expression.
        after: so many of them pass before.
        times: it is done so often.
        done: how often it was.
    """

    action: Action
    method: str = ""
    path: str = ""
    after: int = 0
    times: int = ALWAYS
    done: int = 0

    def takes(self, request: Request) -> bool:
        """Count a request, and say whether it is one to do it to."""
        meant = re.match(self.method, request.method) and re.search(self.path, request.path)
        if not meant or self.done >= self.times:
            return False
        self.after -= 1
        self.done += self.after < 0
        return self.after < 0


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        cloud: the server as clients are to see it.
        server: the server behind.
        rules: the first that takes a request decides.
        requests: all so far, with what was done to them, in the order they came.
    """

    cloud: Cloud
    server: Cloud
    rules: list[Rule] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def rule(self, action: Action, **which) -> Rule:
        """Add a rule, of the latest importance."""
        self.rules.append(Rule(action, **which))
        return self.rules[-1]

    def clear(self) -> None:
        """Let everything pass, and forget what did."""
        self.rules.clear()
        self.requests.clear()

    def handle(self, exchange: Exchange) -> None:
        """Pass a request on, or do to it what a rule says."""
        with self._lock:
            self.requests.append(exchange.request)
            rule = next((rule for rule in self.rules if rule.takes(exchange.request)), None)
        if rule is not None:
            exchange.request.fault = rule.action.__name__
            rule.action(exchange)
        if not exchange.ended:
            exchange.answer(*exchange.forward())


@contextmanager
def proxied(cloud: Cloud) -> Iterator[Proxy]:
    """Put a proxy before a server."""
    there = cloud.endpoint.split("/")[2]
    host, port = there.split(":")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _pass(self) -> None:
            request = Request(self.command, self.path, self.client_address)
            try:
                proxy.handle(Exchange(self, (host, int(port)), request))
            except (ConnectionError, http.client.HTTPException):  # either side has gone
                self.close_connection = True

        def log_message(self, *_) -> None:
            """Not to the terminal."""

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler._pass)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # of a client that was killed
                super().handle_error(*_)

    server = Server(("127.0.0.1", 0), Handler)
    here = f"127.0.0.1:{server.server_port}"
    environment = {name: value.replace(there, here) for name, value in cloud.environment.items()}
    proxy = Proxy(Cloud(cloud.url, environment, cloud.endpoint.replace(there, here)), cloud)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
