"""A proxy before the S3 server of the tests: it notes every request, and loses or changes answers where a test asks it to."""

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}


class Proxy:
    """url: where it listens. requests: (method, path with its query) of every request so far, in order of arrival.

    faults: method -> what becomes of the answers to its next requests, in turn: "lost" (the server acts, the connection
    then breaks), "conflict" (the server is not asked, the answer is 409), "stall" (it waits for `go`), None (nothing).
    """

    def __init__(self, server: str):
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[str, list[str | None]] = {}
        self.sent: list[tuple[str, int]] = []  # (path, bytes) of every answer
        self.go = threading.Event()
        self._listening = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, urlsplit(server).netloc))
        self._listening.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._listening.server_port}"

    def count(self, method: str, ending: str = "") -> int:
        """Requests by that method for a name that ends so."""
        return sum(m == method and unquote(p.partition("?")[0]).endswith(ending) for m, p in list(self.requests))

    def bytes(self, ending: str) -> int:
        """Bytes of the answers for names that end so."""
        return sum(size for path, size in list(self.sent) if unquote(path.partition("?")[0]).endswith(ending))

    def fault(self, method: str) -> str | None:
        return self.faults[method].pop(0) if self.faults.get(method) else None

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
            proxy.requests.append((self.command, self.path))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = proxy.fault(self.command)
            if fault == "conflict":
                self.answer(409, [], b"<Error><Code>ConditionalRequestConflict</Code><Message>again</Message></Error>")
                return
            if fault == "stall":
                proxy.go.wait()
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
            kept = [(k, v) for k, v in found.getheaders() if k.lower() not in HOP_BY_HOP]
            self.answer(found.status, kept, data)

        def answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if not any(name.lower() == "content-length" for name, _ in headers):
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_) -> None:
            pass

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    return Handler
