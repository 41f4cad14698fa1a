"""Where a ledger lies: SQLite in a file, or PostgreSQL, by URL; and its transactions.

A transaction that writes has the ledger for itself from its first statement on (SQLite: BEGIN IMMEDIATE; PostgreSQL: an
advisory lock), so the position of the next entry, which it reads, is its own.
"""

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event, exc

from unlearn.errors import LedgerError, MissingExtra

VARIABLE = "UNLEARN_LEDGER"
HEAD = "0001"  # the last migration
VERSIONS = "ledger_version"  # Alembic's table
PATIENCE = 60  # seconds that a writer waits for the others
SECRET = ("password", "sslpassword")  # parameters of a URL that are in no message and no file
_LOCK = 0x756E6C6561726E  # of PostgreSQL's advisory locks: "unlearn"


def place(url: str | None = None) -> sa.URL:
    """The ledger that is meant: `url`, else UNLEARN_LEDGER, else a file in the user's own data folder.

    A URL is sqlite:///FILE, a plain path, or postgresql://USER@HOST/DATABASE. Raises LedgerError for anything else.
    """
    text = url or os.environ.get(VARIABLE) or str(_default())
    if "://" not in text:
        return sa.URL.create("sqlite", database=os.path.abspath(os.path.expanduser(text)))
    try:
        parsed = sa.make_url(re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", text))
    except (exc.ArgumentError, ValueError):
        parsed = None
    if parsed is None or parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise LedgerError(
            f"the ledger's URL is not understood: write sqlite:///FILE or postgresql://USER@HOST/DATABASE"
            f" (--ledger, or {VARIABLE})"
        )
    if parsed.get_backend_name() == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise LedgerError("sqlite: name a file, as in sqlite:///ledger.sqlite: a ledger in memory is lost")
        return sa.URL.create("sqlite", database=os.path.abspath(parsed.database))
    return parsed.set(drivername="postgresql+psycopg")


def _shown(url: sa.URL) -> str:
    """The ledger in messages: without a password, wherever in the URL it is."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.set(drivername="postgresql").difference_update_query(SECRET).render_as_string(hide_password=True)


def _default() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share", "unlearn", "ledger.sqlite")


class Database:
    """Connections to the database of one ledger. create: make the ledger where there is none.

    Raises LedgerError where it is out of reach, or is none, or was made by a later version of this program.
    """

    def __init__(self, url: str | None = None, create: bool = False):
        self.url = place(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.name = _shown(self.url)
        if self.is_sqlite:
            self._file(create)
        self.engine = _engine(self.url, self.is_sqlite)
        self._writer = self.engine.execution_options(writing=True)
        version = self._version()
        if version is None and not create:
            raise LedgerError(f"{self.name}: there is no ledger yet; `unlearn request add` makes it")
        if version != HEAD:
            self._upgrade()

    def close(self) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the ledger, whatever others append meanwhile."""
        with self._told(), self.engine.connect() as connection:
            if not self.is_sqlite:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that no other writer overlaps; it is rolled back on an error."""
        with self._told(), self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.execute(sa.text(f"SET LOCAL lock_timeout = '{PATIENCE}s'"))
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            yield connection

    def purge(self, table: str) -> None:
        """Take what was deleted from a table out of the database's own files too, as far as the database can."""
        with self._told(), self.engine.connect() as connection:
            if self.is_sqlite:  # deleted content is overwritten (secure_delete), but the log may hold it
                raw = connection.connection.driver_connection
                assert isinstance(raw, sqlite3.Connection)
                raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            else:
                connection.execution_options(isolation_level="AUTOCOMMIT").execute(sa.text(f"VACUUM {table}"))

    def _file(self, create: bool) -> None:
        """The file, readable by its owner only; SQLite gives its log the same rights."""
        path = Path(self.url.database or "")
        if path.exists():
            return
        if not create:
            raise LedgerError(f"{path}: there is no ledger yet; `unlearn request add` makes it")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT, 0o600))
        except OSError as e:
            raise LedgerError(f"{path}: {e.strerror}") from None

    def _version(self) -> str | None:
        with self.reading() as connection:
            if not sa.inspect(connection).has_table(VERSIONS):
                return None
            return connection.execute(sa.text(f"SELECT version_num FROM {VERSIONS}")).scalar()

    def _upgrade(self) -> None:
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        settings = Config()
        settings.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
        with self.writing() as connection:  # of many processes that come at once, the first one does it
            settings.attributes.update(connection=connection, version_table=VERSIONS)
            try:
                command.upgrade(settings, "head")
            except CommandError:
                raise LedgerError(
                    f"{self.name}: this ledger was written by a later version of unlearn; update this one"
                ) from None

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn the database's errors into one LedgerError; no message holds a password, a statement or its values."""
        try:
            yield
        except exc.DBAPIError as e:
            cause = " ".join(str(e.orig).split())
            if "locked" in cause or "lock timeout" in cause:
                raise LedgerError(f"{self.name}: others have been writing for {PATIENCE} s; try again") from None
            if "readonly database" in cause:
                raise LedgerError(
                    f"{self.name}: this user cannot write there, and SQLite does even to read: copy the ledger, with "
                    "its -wal file where there is one, to a folder of yours"
                ) from None
            # After DETAIL PostgreSQL tells the values of a row that it refuses, after CONTEXT where in its functions.
            cause = re.split(r" (?:DETAIL|CONTEXT):", cause)[0]
            raise LedgerError(f"{self.name}: {cause[:300]}") from None


def _engine(url: sa.URL, is_sqlite: bool) -> sa.Engine:
    try:
        # A thread that needs a connection gets one: writers wait for the lock, not for the pool.
        engine = sa.create_engine(
            url, max_overflow=-1, connect_args={"timeout": PATIENCE} if is_sqlite else {}, hide_parameters=True
        )
    except ImportError:
        raise MissingExtra("psycopg", "postgres", "a ledger in PostgreSQL") from None
    if is_sqlite:
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # no BEGIN of its own: see _begin
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    writing = connection.get_execution_options().get("writing")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
