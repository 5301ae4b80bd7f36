"""What every HTML page of scacam shares: its pictures, its charts and its templates.

A page is one file. It holds no script and no address of anything outside of it.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from PIL import Image

__all__ = ["Picture", "encoded", "render"]


@dataclass(frozen=True)
class Picture:
    """A picture, held in the page itself.

    Attributes:
        data: the picture as a data URI.
        alt: what it shows, for those who cannot see it.
        lines: the words below it, the first one in bold.
    """

    data: str
    width: int
    height: int
    alt: str
    lines: Sequence[str] = ()


def encoded(image: Image.Image, alt: str, lines: Sequence[str] = ()) -> Picture:
    """Put an image into a page."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=72, method=4)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/webp;base64,{data}", image.width, image.height, alt, lines)


def render(template: str, content: Mapping[str, Any]) -> str:
    """Fill a template of this package; whatever comes from the run is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("scacam.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["decimal"] = _decimal
    environment.filters["number"] = "{:,}".format
    return environment.get_template(template).render(content)


def _percent(share: float, digits: int = 0) -> str:
    """A share as a percentage; a dash for what is unknown."""
    return "–" if share != share else f"{share:.{digits}%}"


def _decimal(value: float) -> str:
    """A number with two digits; a dash for what is unknown."""
    return "–" if value != value else f"{value:.2f}"
