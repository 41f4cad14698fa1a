"""Does it still know what it was to forget? Tests under one contract, each with figures for original, unlearned and
oracle."""
