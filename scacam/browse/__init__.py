"""A local page in which to look around in a run."""

from scacam.browse.server import make_app

__all__ = ["make_app"]
