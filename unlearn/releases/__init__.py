"""Releases of a model: published once, certified, judged by a gate, and named by one pointer. See
infra/docs/releases.md."""
