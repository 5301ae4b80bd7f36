import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from made_runs import Images, Said, write_run
from PIL import Image

from scacam.drawing import FOUND, TRUTH, blend, colours, draw_box, fit
from scacam.jobs.command import run_job
from scacam.jobs.pictures import stem
from scacam.report.sheet import Cell, Panel, sheet, shorten

main = partial(run_job, "pictures")


def _lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*, worked out from sRGB."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)


def test_colours_grow_evenly_lighter() -> None:
    lightness = _lightness(colours(np.linspace(0, 1, 256)) / 255)
    steps = np.diff(lightness[::16])
    assert lightness[0] < 2
    assert lightness[-1] > 95
    assert steps.min() > 0
    assert steps.max() < 1.6 * np.median(steps)


def test_values_beyond_the_range_take_its_ends() -> None:
    assert (colours(np.array([-3.0, 7.0])) == colours(np.array([0.0, 1.0]))).all()


def test_the_photo_fades_to_white_outside_of_the_view() -> None:
    shares = np.full((4, 4), 0.5)
    shares[:, 2:] = np.nan
    mixed = np.asarray(blend(Image.new("RGB", (4, 4), (200, 10, 10)), shares)).astype(int)
    assert np.ptp(mixed[0, 3]) <= 1
    assert mixed[0, 3].min() > 180
    assert np.ptp(mixed[0, 0]) > 30


def test_a_box_is_half_open_and_has_a_dark_halo() -> None:
    picture = Image.new("RGB", (40, 30), (90, 90, 90))
    draw_box(picture, (10, 5, 30, 25))
    pixels = np.asarray(picture)
    assert pixels[15, 10].tolist() == [0, 0, 0]
    assert pixels[15, 11].tolist() == [255, 255, 255]
    assert pixels[15, 29].tolist() == [0, 0, 0]
    assert pixels[15, 30].tolist() == [90, 90, 90]
    assert pixels[15, 20].tolist() == [90, 90, 90]


def test_a_box_at_the_edges_and_one_without_extent_are_drawn() -> None:
    for box in ((0, 0, 40, 30), (-5, -5, 90, 90), (3, 3, 3, 3), (39.6, 29.6, 40, 30)):
        for dashed in (False, True):
            draw_box(Image.new("RGB", (40, 30)), box, TRUTH, dashed)


def test_true_and_found_boxes_differ_in_stroke_and_in_lightness() -> None:
    pictures = []
    for colour, dashed in ((FOUND, False), (TRUTH, True)):
        picture = Image.new("RGB", (160, 160), (120, 120, 120))
        draw_box(picture, (10, 10, 150, 150), colour, dashed)
        pictures.append(np.asarray(picture))
    solid, dashes = (picture[11, 20:140].max(-1) for picture in pictures)
    assert (solid == 255).all()
    assert 0.3 < (dashes == 255).mean() < 0.7
    white, blue = (
        _lightness(np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) / 255)
        for c in (FOUND, TRUTH)
    )
    assert white - blue > 10


@pytest.mark.parametrize("size", [(4000, 3000), (32, 32), (1000, 3), (1, 500)])
def test_fit_keeps_the_shape_and_the_bounds(size: tuple[int, int]) -> None:
    fitted = fit(Image.new("RGB", size), 320, 240)
    assert fitted.width == 320 or fitted.height == 240
    assert fitted.width <= 320
    assert fitted.height <= 240


def test_words_that_are_too_long_end_in_an_ellipsis() -> None:
    assert shorten("cat", 200) == "cat"
    short = shorten("Greater Swiss Mountain dog " * 3, 120)
    assert short.startswith("Greater S")
    assert short.endswith("…")
    assert "\n" not in shorten("a\nb", 100)


def test_a_sheet_has_a_line_per_panel_and_wraps_its_cells() -> None:
    cell = Cell(Image.new("RGB", (200, 100), "red"), "a caption")
    one = sheet(cell, [Panel("net", [("cat", 0.5)], "", [cell] * 4)])
    wrapped = sheet(cell, [Panel("net", [("cat", 0.5)], "", [cell] * 5)])
    two = sheet(cell, [Panel("net", [("cat", 0.5)], "label: cat", [cell] * 4)] * 2)
    assert one.width == wrapped.width == two.width
    assert wrapped.height > one.height
    assert (np.asarray(one) == (255, 0, 0)).all(-1).sum() == 5 * 200 * 100


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Three images, two of them of one name, one of them gone."""
    (tmp_path / "b").mkdir()
    uris = [str(tmp_path / "a.png"), str(tmp_path / "b/a.png"), "gone/<i>&.webp"]
    for uri in uris[:2]:
        Image.new("RGB", (90, 60), (80, 160, 60)).save(uri)
    maps = np.random.default_rng(0).normal(size=(3, 2, 7, 7)).astype(np.float32)
    said = Said(
        np.array([[0, 1]] * 3),
        np.array([[0.8, 0.1]] * 3),
        {"gap_cam": maps, "sca_cam": maps**2},
        ["cat", "dog"],
    )
    images = Images(uris, [(90, 60)] * 3, np.array([0, -1, 1]))
    return write_run(tmp_path / "out", images, {"net": said, "other": said})


def test_the_job_draws_one_picture_per_photo_without_ray(run: str) -> None:
    job = Path(__file__).parent.parent / "jobs/pictures.py"
    script = (
        "import runpy, sys; sys.argv = sys.argv[1:];\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'ray' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(job), "--run", run], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "0 False False", done.stderr
    pictures = sorted(path.name for path in (Path(run) / "pictures").iterdir())
    assert pictures == ["<i>&.png", "a.png", "a_1.png"]
    first = Image.open(Path(run) / "pictures/a.png")
    assert first.width > 900
    assert first.height > 400


def test_the_job_stops_at_the_limit(run: str) -> None:
    assert main(["--run", run, "--limit", "1"]) == 0
    assert [path.name for path in (Path(run) / "pictures").iterdir()] == ["a.png"]


def test_the_job_refuses_what_it_cannot_do(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", run, "--limit", "0"]) == 2
    assert main(["--run", str(tmp_path / "nothing")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "pictures: --limit must be at least 1, not 0"
    assert "no run.json" in errors[1]


def test_stems_are_file_names() -> None:
    assert stem("s3://bucket/some/photo.one.jpg") == "photo.one"
    assert stem("a/b.tar::inner/photo.jpg") == "photo"
    assert stem("nothing") == "nothing"
    assert len(stem("x" * 300 + ".jpg").encode()) <= 200
    assert len(stem("中" * 300 + ".jpg").encode()) <= 200
