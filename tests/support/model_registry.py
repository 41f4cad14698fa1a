"""Kubeflow's Model Registry over HTTP on loopback, as far as our push needs it: it keeps what it is told.

Every body is held against the models of the released client, down to the last field; what does not fit is refused and
noted.
"""

import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from mr_openapi import models
from pydantic import ValidationError

KINDS = {"registered_models": models.RegisteredModelCreate, "model_versions": models.ModelVersionCreate}


class Registry:
    """url; api: the version of its API; token: what is asked for. made: {kind: items}; calls: (method, path); broken:
    what did not keep to the description; lost: paths whose next answer to POST does not arrive."""

    def __init__(self, token: str | None = None, api: str = "v1"):
        self.token, self.api, self.url = token, api, ""
        self.made: dict[str, list[dict]] = {"registered_models": [], "model_versions": [], "artifacts": []}
        self.calls, self.broken, self.lost = [], [], []

    def answer(self, method: str, target: str, headers, body: bytes) -> tuple[int, dict]:
        parts = urlsplit(target)
        path, query = parts.path.removeprefix(f"/api/model_registry/{self.api}/"), dict(parse_qsl(parts.query))
        self.calls.append((method, path))
        if path == parts.path:
            return 404, {"code": "", "message": "no such path"}
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"code": "", "message": "Unauthorized"}
        if method == "POST":
            return self._create(path, json.loads(body))
        if path == "registered_models":
            return 200, {"items": self.made[path][:1], "size": 1, "pageSize": 1, "nextPageToken": ""}
        if path in ("registered_model", "model_version"):
            of = query.get("parentResourceId")
            for item in self.made[f"{path}s"]:
                if item["name"] == query["name"] and of in (None, item.get("registeredModelId")):
                    return 200, item
            return 404, {"code": "404", "message": "not found"}
        [version] = re.fullmatch(r"model_versions/(\d+)/artifacts", path).groups()
        items = [a for a in self.made["artifacts"] if a["of"] == version]
        return 200, {"items": items, "size": len(items), "pageSize": 20, "nextPageToken": ""}

    def _create(self, path: str, given: dict) -> tuple[int, dict]:
        kind = path.rpartition("/")[2]
        schema = KINDS.get(kind, models.ModelArtifactCreate)
        known = {field.alias or name for name, field in schema.model_fields.items()}
        try:
            schema.model_validate(given)
            wrong = sorted(set(given) - known)
        except ValidationError as e:
            wrong = [str(e)]
        if wrong:
            self.broken.append(f"{path}: {wrong}")
            return 400, {"code": "400", "message": "does not fit"}
        parent = given.get("registeredModelId")
        if any(i["name"] == given["name"] and i.get("registeredModelId") == parent for i in self.made[kind]):
            return 409, {"code": "409", "message": "already exists"}
        made = given | {"id": str(len(self.made[kind]) + 1), "of": path.split("/")[1] if "/" in path else ""}
        self.made[kind].append(made)
        return 201, made


@contextmanager
def serving(certificate: tuple[str, str] | None = None, **named) -> Iterator[Registry]:
    """certificate: (certificate, key), with which it speaks TLS."""
    state = Registry(**named)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *about): ...

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, told = state.answer(self.command, self.path, self.headers, body)
            if self.command == "POST" and self.path.rpartition("/")[2] in state.lost:
                state.lost.remove(self.path.rpartition("/")[2])
                return self.connection.close()
            data = json.dumps({key: value for key, value in told.items() if key != "of"}).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
