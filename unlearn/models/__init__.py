"""Generators: the adapter every family meets, the families, their weights."""
