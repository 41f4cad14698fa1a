"""Drivers: what runs on a Ray cluster."""
