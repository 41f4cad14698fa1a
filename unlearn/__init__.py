"""Make image-to-image generators forget chosen images, and prove it."""

__version__ = "0.1.0"
