"""Changes of the ledger's tables, by Alembic; `database.py` applies them when a ledger is opened to write.

A new one is a file in versions/ whose `down_revision` is the one before; HEAD in database.py names the last. Entries
are never changed by a migration: their hashes are in checkpoints that lie elsewhere.
"""
