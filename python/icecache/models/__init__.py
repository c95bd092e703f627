"""Small real models for the demo and the tests, fetched on first use."""

from icecache.models.smollm2 import smollm2

__all__ = ["smollm2"]
