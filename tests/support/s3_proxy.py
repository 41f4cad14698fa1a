"""A proxy before the S3 server of the tests: it notes every request, and loses, cuts or changes answers where a test
asks it to, or is away for a while."""

import contextlib
import http.client
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}


class Proxy:
    """url: where it listens. requests: (method, path with its query) of every request so far, in order of arrival.

    faults: method -> what becomes of the answers to its next requests, in turn: "lost" (the server acts, the connection
    then breaks), "conflict" (the server is not asked, the answer is 409), "stall" (it waits for `go`), "cut" (half of
    the body, then the connection breaks), "flipped" (a byte of the body), "elsewhere" (307), "expired" (its keys are
    refused), a number (that status), None (nothing). certificate: (certificate, key), files: it speaks TLS.
    """

    def __init__(self, server: str, certificate: tuple[str, str] | None = None):
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []  # of every request
        self.faults: dict[str, list[str | int | None]] = {}
        self.away = False  # whether every connection breaks before it is answered
        self.sent: list[tuple[str, int]] = []  # (path, bytes) of every answer
        self.go = threading.Event()
        self._listening = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, urlsplit(server).netloc))
        self._listening.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._listening.socket = context.wrap_socket(self._listening.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self._listening.server_port}"

    def count(self, method: str, ending: str = "") -> int:
        """Requests by that method for a name that ends so."""
        return sum(m == method and unquote(p.partition("?")[0]).endswith(ending) for m, p in list(self.requests))

    def bytes(self, ending: str) -> int:
        """Bytes of the answers for names that end so."""
        return sum(size for path, size in list(self.sent) if unquote(path.partition("?")[0]).endswith(ending))

    def fault(self, method: str) -> str | int | None:
        return self.faults[method].pop(0) if self.faults.get(method) else None

    @contextlib.contextmanager
    def outage(self, seconds: float) -> Iterator[None]:
        """From now on it is away, for so long."""
        self.away = True
        back = threading.Timer(seconds, lambda: setattr(self, "away", False))
        back.start()
        try:
            yield
        finally:
            back.cancel()
            self.away = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["Proxy"]:
        thread = threading.Thread(target=self._listening.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.go.set()
            self._listening.shutdown()
            self._listening.server_close()


def _handler(proxy: Proxy, server: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            if proxy.away:
                self.close_connection = True
                return
            proxy.requests.append((self.command, self.path))
            proxy.headers.append(dict(self.headers))
            body = self.body()
            fault = proxy.fault(self.command)
            if fault == "conflict":
                self.answer(409, [], b"<Error><Code>ConditionalRequestConflict</Code><Message>again</Message></Error>")
                return
            if isinstance(fault, int):
                # Longer than a small range.
                code = "SlowDown" if fault == 503 else "InternalError"
                text = f"<Error><Code>{code}</Code><Message>{'later ' * 600}</Message></Error>"
                self.answer(fault, [], text.encode())
                return
            if fault == "elsewhere":
                self.answer(307, [("Location", "http://key:secret@elsewhere.test/data?token=1")], b"")
                return
            if fault == "expired":
                self.answer(400, [], b"<Error><Code>ExpiredToken</Code><Message>renew it</Message></Error>")
                return
            if fault == "stall":
                proxy.go.wait()
                self.close_connection = True
                return
            # The signature covers the Host header that the client sent: it is passed on as it is.
            headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
            upstream = http.client.HTTPConnection(server, timeout=120)
            try:
                upstream.request(self.command, self.path, body, headers)
                found = upstream.getresponse()
                data = found.read()
            finally:
                upstream.close()
            if fault == "lost":
                self.close_connection = True
                return
            proxy.sent.append((self.path, len(data)))
            if fault == "flipped":
                data = data[:-1] + bytes([data[-1] ^ 1])
            kept = [(k, v) for k, v in found.getheaders() if k.lower() not in HOP_BY_HOP]
            self.answer(found.status, kept, data, cut=fault == "cut")

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if not any(name.lower() == "content-length" for name, _ in headers):
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if cut:
                self.close_connection, data = True, data[: len(data) // 2]
            self.wfile.write(data)

        def log_message(self, *_) -> None:
            pass

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    return Handler
