"""The ledger of deletion requests: append-only, under a Merkle tree."""
