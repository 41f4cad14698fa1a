"""The two tables of the ledger. They are made by the migrations; here is how the code sees them."""

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()
# In SQLite only INTEGER names the row's own number.
Position = BigInteger().with_variant(Integer, "sqlite")

# Append-only: triggers refuse UPDATE and DELETE. The document is what is hashed; request, event and due repeat parts of
# it, to be searched by. leaf: the leaf's hash in the Merkle tree, 32 bytes.
entries = Table(
    "ledger_entries",
    metadata,
    Column("position", Position, primary_key=True, autoincrement=False),
    Column("request", Position, nullable=True),
    Column("event", String(16), nullable=False),
    Column("due", String(10), nullable=True),
    Column("document", Text, nullable=False),
    Column("leaf", LargeBinary, nullable=False),
)
# What the commitments of an entry stand for, and the salt of each. A row can be deleted: the tree does not need it.
disclosures = Table(
    "ledger_disclosures",
    metadata,
    Column("position", Position, primary_key=True, autoincrement=False),
    Column("field", String(16), primary_key=True),
    Column("salt", String(32), nullable=False),
    Column("value", Text, nullable=False),
)
