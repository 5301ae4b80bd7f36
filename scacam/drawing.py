"""Pictures of heatmaps: colours, overlays, boxes, and the picture of one image.

Arrays and Pillow images in, Pillow images out; nothing here reads a file.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "FOUND",
    "TRUTH",
    "Cell",
    "Panel",
    "blend",
    "colours",
    "draw_box",
    "fit",
    "grey",
    "sheet",
    "shorten",
]

FOUND = "#ffffff"
"""Colour of the box that a heatmap gave: a solid line."""
TRUTH = "#00e5ff"
"""Colour of a ground-truth box: a dashed line, for whoever cannot tell the colours apart."""

_HALO = "#000000"
_INK, _PALE_INK, _PAPER, _BAR, _PALE_BAR = "#1a1a1a", "#666666", "#ffffff", "#7b2d8b", "#eeeeee"
_GREY = (128, 128, 128)
_GAP, _CAPTION, _BAR_LINE, _TEXT_WIDTH, _MIN_WIDTH = 12, 29, 40, 240, 140


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


class Cell(NamedTuple):
    """One picture of a sheet and the words above it."""

    picture: Image.Image
    caption: str


class Panel(NamedTuple):
    """One row of a sheet: a title, shares to show as bars, and its pictures.

    Attributes:
        title: such as the name of a network.
        bars: words and their shares in [0, 1], such as the top classes and their probabilities.
        note: a line below the bars, or nothing.
        cells: pictures of one size.
    """

    title: str
    bars: Sequence[tuple[str, float]]
    note: str
    cells: Sequence[Cell]


def sheet(photo: Cell, panels: Sequence[Panel], columns: int = 4) -> Image.Image:
    """One picture: a photo, and for each panel its bars and its cells beside one another.

    Args:
        photo: the photo, in the size of all cells, and the words above it.
        panels: the rows below one another.
        columns: how many cells stand in a line before the next line begins.
    """
    width, height = max(photo.picture.width, _MIN_WIDTH), photo.picture.height
    rows = max((len(panel.bars) + bool(panel.note) for panel in panels), default=0)
    line = max(_CAPTION + height, _CAPTION + rows * _BAR_LINE) + _GAP
    lines = [max(1, -(-len(panel.cells) // columns)) for panel in panels]
    used = min(columns, max((len(panel.cells) for panel in panels), default=0))
    canvas = Image.new(
        "RGB",
        (_GAP + (width + _GAP) * (1 + used) + _TEXT_WIDTH + _GAP, _GAP + line * sum(lines)),
        _PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    _cell(canvas, draw, photo, (_GAP, _GAP, width))
    top = _GAP
    for panel, count in zip(panels, lines, strict=True):
        left = _GAP + width + _GAP
        _bars(draw, panel, (left, top))
        for index, cell in enumerate(panel.cells):
            x = left + _TEXT_WIDTH + _GAP + (index % columns) * (width + _GAP)
            _cell(canvas, draw, cell, (x, top + index // columns * line, width))
        top += count * line
    return canvas


def _cell(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, place: tuple[int, int, int]
) -> None:
    x, y, width = place
    draw.text((x, y), shorten(cell.caption, width), _INK, _font())
    canvas.paste(cell.picture, (x, y + _CAPTION))


def _bars(draw: ImageDraw.ImageDraw, panel: Panel, corner: tuple[int, int]) -> None:
    x, y = corner
    right = x + _TEXT_WIDTH
    draw.text((x, y), shorten(panel.title, _TEXT_WIDTH), _INK, _font())
    for index, (name, share) in enumerate(panel.bars):
        top = y + _CAPTION + _BAR_LINE * index
        percent = f"{share:.1%}"
        room = _TEXT_WIDTH - round(_font().getlength(percent)) - _GAP
        draw.text((x, top), shorten(name, room), _INK, _font())
        draw.text((right, top), percent, _PALE_INK, _font(), anchor="ra")
        draw.rectangle((x, top + 27, right, top + 31), fill=_PALE_BAR)
        draw.rectangle((x, top + 27, x + round(_TEXT_WIDTH * share), top + 31), fill=_BAR)
    top = y + _CAPTION + _BAR_LINE * len(panel.bars)
    draw.text((x, top), shorten(panel.note, _TEXT_WIDTH), _PALE_INK, _font())


def shorten(text: str, width: int) -> str:
    """Cut a line that would be wider than so many pixels, and end it with an ellipsis."""
    text = " ".join(text.split())
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


@cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(19)
