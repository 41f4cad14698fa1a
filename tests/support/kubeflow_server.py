"""Kubeflow Pipelines' REST API (v2beta1) over HTTP on loopback, as far as our client needs it: it keeps what it is
told.

Every request is held against the released description, from the shared folder: its path, its query, its body down to
the last field; and so is every answer of ours. A request that does not fit is refused and noted in `broken`. Skipped
where the description is missing.
"""

import functools
import json
import re
import ssl
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from support.kubernetes_server import SHARED

DESCRIPTION = SHARED / "crds/kubeflow-pipelines-2.17.0/kfp_api_v2beta1.swagger.json"
PAGE = 2  # items of a list, whatever is asked for


@functools.cache
def _api() -> dict:
    return _strict(json.loads(DESCRIPTION.read_text()))


def _strict(node):
    """The description as JSON Schema: no field beside those it names; int64 as text or number, which gRPC's gateway
    takes alike."""
    if isinstance(node, list):
        return [_strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "string" and node.get("format") in ("int64", "uint64"):
        return {"anyOf": [{"type": "string", "pattern": "^-?[0-9]+$"}, {"type": "integer"}]}
    made = {key: _strict(value) for key, value in node.items()}
    if isinstance(made.get("properties"), dict) and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def _faults(schema: dict, value) -> list[str]:
    import jsonschema

    whole = {**schema, "definitions": _api()["definitions"]}
    return [f"{list(e.absolute_path)}: {e.message[:200]}" for e in jsonschema.Draft7Validator(whole).iter_errors(value)]


class Kubeflow:
    """url; token: what is asked for, None for nothing. runs, recurring, experiments: by id. calls: (operation, body).
    broken: what did not keep to the description. states: of runs, a list for each id whose head is told and then
    left."""

    def __init__(self, token: str | None = None):
        self.token, self.experiments, self.runs, self.recurring = token, {}, {}, {}
        self.calls, self.broken, self.states, self.url = [], [], {}, ""
        self._ticks = 0

    def operations(self) -> list[str]:
        return [operation for operation, _ in self.calls]

    def answer(self, method: str, target: str, headers, body: bytes) -> tuple[int, dict]:
        parts = urlsplit(target)
        found = self._operation(method.lower(), parts.path)
        if found is None:
            return self._refuse(404, f"no such path: {method} {parts.path}")
        if self.token is not None and headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error": "Unauthorized", "code": 16, "message": "Request not authenticated"}
        about, given = found
        known = {p["name"] for p in about.get("parameters", []) if p["in"] == "query"}
        if unknown := set(parse_qs(parts.query)) - known:
            return self._refuse(400, f"{about['operationId']}: no query parameter {unknown}")
        value = json.loads(body) if body else None
        for parameter in about.get("parameters", []):
            if parameter["in"] == "body" and (faults := _faults(parameter["schema"], value)):
                return self._refuse(400, f"{about['operationId']}: {faults}")
        self.calls.append((about["operationId"], value))
        code, told = getattr(self, about["operationId"].partition("_")[2])(value, parse_qs(parts.query), *given)
        if code == 200 and (faults := _faults(about["responses"]["200"]["schema"], told)):
            return self._refuse(500, f"answer of {about['operationId']}: {faults}")
        return code, told

    def _operation(self, method: str, path: str) -> tuple[dict, tuple[str, ...]] | None:
        for template, operations in _api()["paths"].items():
            pattern = re.sub(r"\\{[^}]+\\}", "([^/:]+)", re.escape(template))
            if method in operations and (match := re.fullmatch(pattern, path)):
                return operations[method], match.groups()
        return None

    def _refuse(self, code: int, why: str) -> tuple[int, dict]:
        self.broken.append(why)
        return code, {"error": why, "code": 3, "message": why}

    def _now(self) -> str:
        self._ticks += 1
        return f"2026-11-26T03:00:{self._ticks % 60:02d}Z"

    def GetHealthz(self, body, query):
        return 200, {"multi_user": False}

    def ListExperiments(self, body, query):
        wanted = json.loads(query["filter"][0])["predicates"][0]["stringValue"] if "filter" in query else None
        return 200, {"experiments": [e for e in self.experiments.values() if wanted in (None, e["display_name"])]}

    def CreateExperiment(self, body, query):
        made = body | {"experiment_id": str(uuid.uuid4()), "created_at": self._now()}
        self.experiments[made["experiment_id"]] = made
        return 200, made

    def CreateRun(self, body, query):
        if body["experiment_id"] not in self.experiments:
            return 404, {"error": "no such experiment", "code": 5, "message": "no such experiment"}
        made = body | {"run_id": str(uuid.uuid4()), "state": "PENDING", "created_at": self._now()}
        self.runs[made["run_id"]] = made
        return 200, made

    def GetRun(self, body, query, id):
        if id not in self.runs:
            return 404, {"error": f"Run {id} not found", "code": 5, "message": f"Run {id} not found"}
        states = self.states.get(id, [])
        if states:
            self.runs[id] |= states.pop(0)
        return 200, self.runs[id]

    def CreateRecurringRun(self, body, query):
        made = body | {
            "recurring_run_id": str(uuid.uuid4()), "created_at": self._now(),
            "status": "ENABLED" if body["mode"] == "ENABLE" else "DISABLED",
        }  # fmt: skip
        self.recurring[made["recurring_run_id"]] = made
        return 200, made

    def ListRecurringRuns(self, body, query):
        mine = [r for r in self.recurring.values() if r["experiment_id"] == query["experiment_id"][0]]
        start = int((query.get("page_token") or ["0"])[0] or 0)
        more = {"next_page_token": str(start + PAGE)} if start + PAGE < len(mine) else {}
        return 200, {"recurringRuns": mine[start : start + PAGE], "total_size": len(mine), **more}

    def DeleteRecurringRun(self, body, query, id):
        if self.recurring.pop(id, None) is None:
            return 404, {"error": "not found", "code": 5, "message": "not found"}
        return 200, {}


@contextmanager
def serving(token: str | None = None, certificate: tuple[str, str] | None = None) -> Iterator[Kubeflow]:
    """certificate: (certificate, key), with which it speaks TLS."""
    if not DESCRIPTION.exists():
        pytest.skip(f"no description of Kubeflow Pipelines' API in {SHARED}: set UNLEARN_SHARED")
    state, lock = Kubeflow(token), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *about): ...

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                code, told = state.answer(self.command, self.path, self.headers, body)
            data = json.dumps(told).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = handle_any

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
