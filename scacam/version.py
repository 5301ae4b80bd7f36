"""The version, where packaging, `run.json` and users find it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
