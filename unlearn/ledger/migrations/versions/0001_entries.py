"""The entries, what their commitments stand for, and the triggers that keep entries as they are."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

SQLITE = [
    """CREATE TRIGGER ledger_entries_update BEFORE UPDATE ON ledger_entries
    BEGIN SELECT RAISE(ABORT, 'the entries of a ledger are append-only: UPDATE is refused'); END""",
    """CREATE TRIGGER ledger_entries_delete BEFORE DELETE ON ledger_entries
    BEGIN SELECT RAISE(ABORT, 'the entries of a ledger are append-only: DELETE is refused'); END""",
    # INSERT OR REPLACE deletes without asking the trigger above.
    """CREATE TRIGGER ledger_entries_insert BEFORE INSERT ON ledger_entries
    WHEN NEW.position IS NOT (SELECT coalesce(max(position) + 1, 0) FROM ledger_entries)
    BEGIN SELECT RAISE(ABORT, 'the entries of a ledger are append-only: the next position is the only one'); END""",
]
POSTGRESQL = [
    """CREATE FUNCTION ledger_entries_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'the entries of a ledger are append-only: % is refused', TG_OP; END $$""",
    """CREATE TRIGGER ledger_entries_change BEFORE UPDATE OR DELETE ON ledger_entries
    FOR EACH ROW EXECUTE FUNCTION ledger_entries_refuse()""",
    """CREATE TRIGGER ledger_entries_truncate BEFORE TRUNCATE ON ledger_entries
    FOR EACH STATEMENT EXECUTE FUNCTION ledger_entries_refuse()""",
]


def upgrade() -> None:
    position = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "ledger_entries",
        sa.Column("position", position, primary_key=True, autoincrement=False),
        sa.Column("request", position, nullable=True),
        sa.Column("event", sa.String(16), nullable=False),
        sa.Column("due", sa.String(10), nullable=True),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("leaf", sa.LargeBinary, nullable=False),
    )
    op.create_index("ledger_entries_request", "ledger_entries", ["request", "position", "event"])
    op.create_table(
        "ledger_disclosures",
        sa.Column("position", position, primary_key=True, autoincrement=False),
        sa.Column("field", sa.String(16), primary_key=True),
        sa.Column("salt", sa.String(32), nullable=False),
        sa.Column("value", sa.Text, nullable=False),
    )
    for statement in SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL:
        op.execute(statement)
