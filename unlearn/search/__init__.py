"""Search for the trade-off: the sweep as one value, the figures of its trials, and their records."""
