"""Kubeflow's Model Registry: a release as a version of a registered model there, by its REST API (v1, and v1alpha3 of
older servers).

What is registered says where the model is and how to check it; the model itself is not copied, and no request or person
is named. Each part is looked for before it is made, so that a push can be repeated, and killed anywhere.
"""

import functools
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from unlearn.errors import ConfigError, ReleaseError
from unlearn.releases import registered
from unlearn.releases.release import Release
from unlearn.releases.store import Store

TOKEN = "UNLEARN_REGISTRY_TOKEN"
VERSIONS = ("v1", "v1alpha3")  # of the API, the newest first
TIMEOUT = 30  # seconds that a server may take for an answer
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Registry:
    """url: of the server. token: what gives the token, None where there is none. authority: a file with the
    certificates that are trusted, else ""."""

    url: str
    token: Callable[[], str] | None = None
    authority: str = ""

    def push(self, store: Store, version: str, name: str) -> tuple[str, bool]:
        """Register a release under a model's name; (its id there, whether anything was made now).

        Raises ReleaseError: it was withdrawn, the registry holds another model by this name and version, or it refuses;
        ConfigError.
        """
        release = registered.ready(store, version)
        properties, uri = _properties(store, release), registered.location(store, release)
        model, _ = self._made("registered_model", {"name": name})
        wanted = {"name": version, "registeredModelId": model["id"], "customProperties": properties}
        found, new = self._made("model_version", wanted, parentResourceId=model["id"])
        if changed := sorted(
            key for key in properties if found.get("customProperties", {}).get(key) != properties[key]
        ):
            raise ReleaseError(
                f"{self.url} has another {version} of {name} already ({', '.join(changed)} differ): give another --name"
            )
        artifact = {
            "name": release.folder,
            "artifactType": "model-artifact",
            "uri": uri,
            "modelFormatName": "safetensors",
        }
        there = (
            self._ask("GET", f"model_versions/{found['id']}/artifacts", params={"artifactType": "model-artifact"}) or {}
        )
        same = next((item for item in there.get("items", []) if item.get("name") == release.folder), None)
        if same is None:
            self._ask(
                "POST", f"model_versions/{found['id']}/artifacts", json=artifact | {"customProperties": properties}
            )
        elif same.get("uri") != uri:
            raise ReleaseError(
                f"{self.url} has {version} of {name} at {same.get('uri')}, and it is at {uri}: correct it there"
            )
        return str(found["id"]), new or same is None

    def _made(self, kind: str, wanted: dict[str, Any], **more: str) -> tuple[dict[str, Any], bool]:
        """(what has this name, whether it was made now); another client may make it between."""
        for _ in range(2):
            if found := self._ask("GET", kind, params={"name": wanted["name"], **more}):
                return found, False
            if made := self._ask("POST", f"{kind}s", json=wanted):
                return made, True
        raise ReleaseError(
            f"{self.url}: {kind} {wanted['name']} is there and cannot be found: is it another type's name?"
        )

    def _ask(self, method: str, path: str, **named: Any) -> dict[str, Any] | None:
        """The answer; None where what is looked for is not there, or what is to be made is there already. Raises
        ReleaseError."""
        code, answer = self._sent(method, f"{self._root}/{path}", **named)
        if code == {"GET": 404, "POST": 409}[method]:
            return None
        if code not in (200, 201) or not isinstance(answer, dict):
            raise ReleaseError(f"{self.url}: {method} {path}: {_why(code, answer)}")
        return answer

    @functools.cached_property
    def _root(self) -> str:
        """Of the newest API that the server has."""
        for api in VERSIONS:
            root = f"{self.url.rstrip('/')}/api/model_registry/{api}"
            code, answer = self._sent("GET", f"{root}/registered_models", params={"pageSize": "1"})
            if code == 200 and isinstance(answer, dict):
                return root
            if code not in (200, 404):
                raise ReleaseError(f"{self.url}: {_why(code, answer)}")
        raise ReleaseError(f"{self.url} is no Model Registry: it has neither API {' nor '.join(VERSIONS)}")

    @functools.cached_property
    def _session(self) -> requests.Session:
        where = urlsplit(self.url)
        if where.scheme not in ("http", "https") or not where.hostname or "@" in where.netloc:
            raise ConfigError("--to: give a URL without a password, as in https://registry.example.com")
        if self.token and where.scheme == "http" and where.hostname not in LOOPBACK:
            raise ConfigError(
                f"--to {self.url}: a token is sent by https:// alone, or anybody on the way could read it"
            )
        if self.authority:
            try:
                ssl.create_default_context(cafile=self.authority)
            except OSError:
                raise ConfigError(f"--ca {self.authority}: no file of certificates in PEM") from None
        session = requests.Session()
        again = Retry(3, backoff_factor=0.5, status_forcelist=(502, 503, 504), raise_on_status=False)
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=again))  # of what only reads
        if token := self.token:

            def bearer(request: requests.PreparedRequest) -> requests.PreparedRequest:
                request.headers["Authorization"] = f"Bearer {token()}"
                return request

            session.auth = bearer  # as a header a .netrc would take its place
        return session

    def _sent(self, method: str, url: str, **named: Any) -> tuple[int, Any]:
        trusted = self.authority or True
        try:
            answer = self._session.request(method, url, timeout=TIMEOUT, allow_redirects=False, verify=trusted, **named)
        except requests.exceptions.SSLError:
            raise ReleaseError(f"{self.url}: its certificate is not trusted: give the authority's with --ca") from None
        except requests.RequestException as e:
            raise ReleaseError(f"{self.url}: nobody answers ({type(e).__name__}); is it reachable from here?") from None
        try:
            return answer.status_code, answer.json()
        except ValueError:
            return answer.status_code, None


def _properties(store: Store, release: Release) -> dict[str, dict[str, str]]:
    about = registered.facts(store, release)
    return {name: {"metadataType": "MetadataStringValue", "string_value": value} for name, value in about.items()}


def _why(code: int, answer: Any) -> str:
    hints = {401: f"; set {TOKEN} or {TOKEN}_FILE", 403: "; this user may not do it there"}
    message = answer.get("message", "") if isinstance(answer, dict) else ""
    return f"{' '.join(str(message).split())[:300] or 'refused'} ({code}){hints.get(code, '')}"
