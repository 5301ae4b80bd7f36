"""The picture of one image: the photo, its top classes as bars, and its heatmaps beside it."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Cell", "Panel", "sheet", "shorten"]

_INK, _PALE_INK, _PAPER, _BAR, _PALE_BAR = "#1a1a1a", "#666666", "#ffffff", "#7b2d8b", "#eeeeee"
_GAP, _CAPTION, _BAR_LINE, _TEXT_WIDTH, _MIN_WIDTH = 12, 29, 40, 240, 140


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
