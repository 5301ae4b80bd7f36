"""Pictures of heatmaps: colours, overlays and boxes.

Arrays and Pillow images in, Pillow images out; nothing here reads a file.
"""

from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np
from PIL import Image, ImageDraw

__all__ = ["FOUND", "TRUTH", "blend", "colours", "draw_box", "fit", "grey"]

FOUND = "#ffffff"
"""Colour of the box that a heatmap gave: a solid line."""
TRUTH = "#00e5ff"
"""Colour of a ground-truth box: a dashed line, for whoever cannot tell the colours apart."""

_HALO = "#000000"
_GREY = (128, 128, 128)


def colours(shares: np.ndarray) -> np.ndarray:
    """Colours of values in [0, 1]: `[...]` to uint8 `[..., 3]`; perceptually even (inferno)."""
    return _table()[np.rint(shares.clip(0, 1) * 255).astype(np.uint8)]


@cache
def _table() -> np.ndarray:
    steps = np.arange(256, dtype=np.uint8)[:, None]
    return cv2.applyColorMap(steps, cv2.COLORMAP_INFERNO)[:, 0, ::-1]


def blend(photo: Image.Image, shares: np.ndarray) -> Image.Image:
    """Lay a heatmap over a photo, so that both stay readable.

    Where the map is low the photo fades to dark gray, where it is high it takes on the colour.

    Args:
        photo: of mode `RGB`, height and width as the map.
        shares: `[height, width]` in [0, 1]; NaN outside of the view, where the photo fades to
            white.
    """
    pixels = np.asarray(photo, dtype=np.float32)
    gray = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    inside = np.isfinite(shares)
    level = np.where(inside, shares, 0)
    strength = (0.3 + 0.35 * level)[..., None]
    mixed = (1 - strength) * (0.25 * pixels + 0.75 * gray[..., None]) + strength * colours(level)
    outside = 0.3 * gray[..., None] + 0.7 * 235
    return Image.fromarray(np.where(inside[..., None], mixed, outside).astype(np.uint8))


def draw_box(
    picture: Image.Image, box: Sequence[float], colour: str = FOUND, dashed: bool = False
) -> None:
    """Draw a half-open box x0, y0, x1, y1 onto a picture, inside its edges, with a dark halo."""
    width = max(2, round(max(picture.size) / 160))
    x0, y0, x1, y1 = (round(value) for value in box)
    x1, y1 = max(x1 - 1, x0), max(y1 - 1, y0)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x0, y0, x1, y1), outline=_HALO, width=width + 2)
    x0, y0, x1, y1 = x0 + 1, y0 + 1, max(x1 - 1, x0 + 1), max(y1 - 1, y0 + 1)
    if not dashed:
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=width)
        return
    dash = 4 * width
    for x in range(x0, x1 + 1, 2 * dash):
        end = min(x + dash, x1)
        draw.rectangle((x, y0, end, y0 + width - 1), fill=colour)
        draw.rectangle((x, y1 - width + 1, end, y1), fill=colour)
    for y in range(y0, y1 + 1, 2 * dash):
        end = min(y + dash, y1)
        draw.rectangle((x0, y, x0 + width - 1, end), fill=colour)
        draw.rectangle((x1 - width + 1, y, x1, end), fill=colour)


def fit(photo: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a photo to just fit into so many pixels, keeping its shape."""
    factor = min(width / photo.width, height / photo.height)
    size = max(1, round(photo.width * factor)), max(1, round(photo.height * factor))
    return photo.resize(size, Image.Resampling.LANCZOS)


def grey(width: int, height: int) -> Image.Image:
    """What stands for a photo that is gone."""
    return Image.new("RGB", (width, height), _GREY)
