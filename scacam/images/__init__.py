"""From the bytes of an image to the pixels that a network sees.

An image is upright (its EXIF orientation applied) and RGB or gray before anything else happens.
The *view* is the rectangle of it, in its own pixels, that is resized to the network's input.
"""

from scacam.images.files import decode, see
from scacam.images.views import VIEWS, Preprocessing, Seen, View, ViewName, pixels, view_of

__all__ = [
    "VIEWS",
    "Preprocessing",
    "Seen",
    "View",
    "ViewName",
    "decode",
    "pixels",
    "see",
    "view_of",
]
