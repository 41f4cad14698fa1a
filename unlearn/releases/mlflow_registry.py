"""MLflow's registry of models: a release as a version of a registered model there, by MLflow's client (extra `mlflow`).

MLflow numbers versions itself, so the release is found by its tag. Each part is looked for before it is made, so that a
push can be repeated, and killed anywhere.
"""

import logging
import os
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from sqlalchemy import exc

from unlearn.errors import ConfigError, MissingExtra, ReleaseError
from unlearn.releases import registered
from unlearn.releases.store import Store

SCHEME = "mlflow:"  # before the URI of a server or a database; alone: as MLflow's variables say
VARIABLES = ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI")
TAG = "unlearn."  # before the names of our tags
# Read when MLflow is imported: its makers are told nothing, and a server that is gone is not asked for minutes.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}  # fmt: skip


@dataclass(frozen=True)
class Registry:
    """uri: of an MLflow server (http, https), or of a database, as MLflow writes it. Who pushes, and which certificates
    are trusted, MLflow's own variables say."""

    uri: str

    def push(self, store: Store, version: str, name: str) -> tuple[str, bool]:
        """Register a release under a model's name; (its number there, whether it was made now).

        Raises ReleaseError: it was withdrawn, the registry holds another model by this name and version, or it refuses;
        ConfigError, MissingExtra.
        """
        if not re.fullmatch(r"[^/:'\"`\\]+", name):
            raise ConfigError(f"--name {name}: MLflow takes no / and no :, and no quotes are taken here")
        release, client = registered.ready(store, version), self._client()
        source = registered.location(store, release)
        tags = {f"{TAG}{key}": value for key, value in registered.facts(store, release).items()}
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]  an extra

        try:
            try:
                client.create_registered_model(name)
            except MlflowException as e:
                if e.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            wanted = tags | {f"{TAG}version": version}
            there = self._there(client, name, version)
            made = None if there else client.create_model_version(name, source, tags=wanted, await_creation_for=0)
            there = there or self._there(client, name, version)[:1]  # of two pushes at once the first one counts
            if made and made.version != there[0].version:
                client.delete_model_version(name, made.version)
        except MlflowException as e:
            raise ReleaseError(f"{self._where}: {self._said(e)}") from None
        changed = sorted(key.removeprefix(TAG) for key, value in tags.items() if there[0].tags.get(key) != value)
        if changed or there[0].source != source:
            what = f"{', '.join(changed)} differ" if changed else f"it lies at {there[0].source}, and not at {source}"
            raise ReleaseError(f"{self._where} has another {version} of {name} already ({what}): give another --name")
        return str(there[0].version), bool(made) and made.version == there[0].version

    @staticmethod
    def _there(client: Any, name: str, version: str) -> list[Any]:
        """The versions in the registry that are this release, the first one first."""
        found = client.search_model_versions(f"name = '{name}' and tags.`{TAG}version` = '{version}'")
        return sorted(found, key=lambda each: int(each.version))

    def _client(self) -> Any:
        """MLflow's client, after a look whether a database is there at all: MLflow itself asks for minutes."""
        for key, value in SETTINGS.items():
            os.environ.setdefault(key, value)
        try:
            from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  an extra
        except ImportError:
            raise MissingExtra("mlflow-skinny", "mlflow", "MLflow's registry of models") from None
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if not self._is_server:
            try:
                engine = sa.create_engine(self.uri)
                sa.inspect(engine).get_table_names()
                engine.dispose()
            except (exc.SQLAlchemyError, ImportError) as e:
                raise ReleaseError(f"{self._where}: {self._said(getattr(e, 'orig', None) or e)}") from None
        return MlflowClient(self.uri, self.uri)

    @property
    def _is_server(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    @property
    def _where(self) -> str:
        """The address without what may be a password."""
        if self._is_server:
            parts = urlsplit(self.uri)
            return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        return sa.make_url(self.uri).render_as_string(hide_password=True)

    def _said(self, error: Exception) -> str:
        return " ".join(str(error).replace(self.uri.rstrip("/"), self._where).split())[:300]


def registry(to: str) -> Registry:
    """The registry that `mlflow:URI` names, or `mlflow:` and MLflow's own variables. Raises ConfigError."""
    uri = to.removeprefix(SCHEME)
    if re.match(r"[^/]*//([^/@]*:[^/]*@|.*[?&]password=)", uri):
        raise ConfigError(
            f"--to: a password does not belong on the command line: put the URI into {VARIABLES[0]} and give "
            f"{SCHEME}, or put name and password into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if not uri and not (uri := next(filter(None, map(os.environ.get, VARIABLES)), "")):
        raise ConfigError(f"--to {SCHEME}: neither {' nor '.join(VARIABLES)} is set: give {SCHEME}URI")
    if not re.match(r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://.", uri):
        raise ConfigError(f"--to {SCHEME}: write a server's URL, or a database's, as in {SCHEME}sqlite:///mlflow.db")
    return Registry(uri)
