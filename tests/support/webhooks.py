"""A server on loopback that takes webhooks."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

Came = list[tuple[dict[str, str], bytes]]


@contextlib.contextmanager
def receiving() -> Iterator[tuple[str, list[int], Came]]:
    """(its URL, the statuses that it answers with, 200 when there are none left, the headers and bodies that came)."""
    statuses: list[int] = []
    came: Came = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            headers = {name.lower(): value for name, value in self.headers.items()}
            came.append((headers, self.rfile.read(int(headers["content-length"]))))
            self.send_response(statuses.pop(0) if statuses else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/hook", statuses, came
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
