"""Ways to forget: what a method is, the registry, one file a family of methods."""
