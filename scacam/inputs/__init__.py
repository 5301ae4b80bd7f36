"""From any input to one table of images, and to the bytes of each."""

from scacam.inputs.containers import read_image
from scacam.inputs.manifest import Manifest, read_manifest

__all__ = ["Manifest", "read_image", "read_manifest"]
