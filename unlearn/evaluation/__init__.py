"""How well a model has forgotten and what it has kept: feature networks, metrics, pictures and the report."""
