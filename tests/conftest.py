"""What the tests share: images that they make themselves, and one embedded Ray."""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver


def _photo(width: int = 300, height: int = 200, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photo() -> Callable[..., Image.Image]:
    """Makes smooth random images: `photo(width, height, seed)`."""
    return _photo


@pytest.fixture(scope="module")
def module_photo() -> Callable[..., Image.Image]:
    """The same for fixtures that a whole module shares."""
    return _photo


@pytest.fixture
def photo_bytes(photo: Callable[..., Image.Image]) -> Callable[..., bytes]:
    """The same as the bytes of a file: `photo_bytes(format, width, height, seed)`."""

    def make(format: str = "PNG", width: int = 300, height: int = 200, seed: int = 0) -> bytes:
        buffer = io.BytesIO()
        photo(width, height, seed).save(buffer, format)
        return buffer.getvalue()

    return make


@pytest.fixture
def photo_folder(tmp_path: Path, photo_bytes: Callable[..., bytes]) -> Callable[[int], Path]:
    """A folder of JPEGs of differing sizes: `photo_folder(count)`."""

    def make(count: int) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        for seed in range(count):
            data = photo_bytes("JPEG", 200 + 10 * (seed % 7), 180 + 15 * (seed % 5), seed)
            (folder / f"photo {seed:04d}.jpg").write_bytes(data)
        return folder

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium, without a window and without a network."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        assert not os.environ.get("CI"), "no chromium: .ci/run installs it"
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "about:blank",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()
