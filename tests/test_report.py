import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import Images, Said, evaluate, weigh, write_run
from memory import alone, most_held
from PIL import Image
from pyarrow import fs
from servers import BUCKET, ObjectStore

from scacam.jobs import audit
from scacam.jobs.command import run_job
from scacam.report.charts import lines

main = partial(run_job, "report")

JOB = Path(__file__).parent.parent / "jobs/report.py"
SECTIONS = {"ran", "same-image", "top-classes", "about"}
AUDITED = {"shortcuts", "classes", "one-class", "agreement"}
EVIL = "<script>alert('evil')</script>"


class _Page(HTMLParser):
    """The tags of a page, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    @property
    def sections(self) -> set[str | None]:
        return {attributes["id"] for tag, attributes in self.tags if tag == "section"}


def _run(
    folder: Path, count: int = 12, networks: int = 2, labelled: bool = True, **config: Any
) -> Path:
    """Photos of two classes; the maps of one of them always lie in a corner."""
    rng = np.random.default_rng(0)
    photos = folder / "photos"
    photos.mkdir(parents=True)
    uris = [str(photos / f"{i:03d} & 'co'.png") for i in range(count)]
    for uri in uris[:-1]:
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(uri)
    top = np.arange(count) % 2
    maps = rng.random((count, 2, 7, 7)).astype(np.float32)
    maps[top == 1, 0] *= 0.01
    maps[top == 1, 0, :2, :2] = 1
    said = [
        Said(
            np.stack([top, 1 - top], axis=1),
            np.stack([rng.uniform(0.6, 1, count), np.full(count, 0.1)], axis=1),
            {"grad_cam": maps - 0.2, "sca_cam": maps**2},
            [EVIL, "a \"quoted\" & 'odd' class"],
            weights="random" if index else "DEFAULT",
        )
        for index in range(networks)
    ]
    labels = top if labelled else np.full(count, -1)
    images = Images(uris, [(90, 60)] * count, labels, failed=[f"{EVIL}.jpg"])
    names = ["net", f"{EVIL}net", "third"][:networks]
    out = folder / "out"
    write_run(
        out, images, dict(zip([n.replace("/", "") for n in names], said, strict=True)), **config
    )
    return out


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it."""
    out = _run(tmp_path_factory.mktemp("evaluated"), ignored_files=3)
    evaluate(out)
    weigh(out, EVIL)
    audit.run(run=str(out))
    assert main(["--run", str(out)]) == 0
    return out / "report.html"


def test_every_section_is_there_when_the_run_has_its_data(evaluated: Path) -> None:
    page = _Page(evaluated.read_text())
    assert page.sections == SECTIONS | AUDITED | {"localization", "weights"}
    for words in (
        "MaxBoxAccV2",
        "within noise",
        "more than noise",
        "Looks off the objects".lower(),
        "random weights",
    ):
        assert words in page.words


def test_a_run_that_was_not_evaluated_has_no_localization(tmp_path: Path) -> None:
    out = _run(tmp_path, networks=1, labelled=False)
    assert main(["--run", str(out)]) == 0
    page = _Page((out / "report.html").read_text())
    assert page.sections == SECTIONS
    assert "has not been audited" in page.words
    audit.run(run=str(out))
    assert main(["--run", str(out)]) == 0
    page = _Page((out / "report.html").read_text())
    assert page.sections == SECTIONS | AUDITED
    assert "has not been audited" not in page.words
    assert "top-1 error" not in page.words
    assert "Do the networks agree" not in page.words
    assert "looks off the objects" not in page.words


def test_the_page_holds_no_address_and_nothing_that_runs(evaluated: Path) -> None:
    text = evaluated.read_text()
    page = _Page(text)
    assert "://" not in text
    assert "url(" not in text
    assert not {"script", "a", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or "href" in name]
        if "src" in attributes:
            assert tag == "img"
            assert str(attributes["src"]).startswith("data:image/webp;base64,")
    assert any(
        tag == "meta" and "default-src 'none'" in str(a.get("content")) for tag, a in page.tags
    )


def test_class_activation_weights_are_drawn_as_far_as_they_are_known(evaluated: Path) -> None:
    page = _Page(evaluated.read_text())
    charts = [str(a["aria-label"]) for tag, a in page.tags if tag == "svg"]
    of_weights = [alt for alt in charts if "threshold" not in alt]
    assert len([alt for alt in of_weights if alt.startswith("net:")]) == 4
    assert [alt for alt in of_weights if alt.startswith("bare:")] == [
        "bare: α of the same channels for different classes"
    ]
    assert "49 α" in page.words


def test_a_chart_says_names_as_they_are_and_leaves_out_what_is_beyond() -> None:
    x = np.arange(5.0)
    chart = str(lines({"<b>&$x_1$": (x, x)}, "x", "y", 'a "chart"', y_range=(0, 3)))
    page = _Page(chart)
    assert "<b>&$x_1$" in page.words
    assert page.tags[0][1]["aria-label"] == 'a "chart"'
    assert "xmlns" not in chart
    paths = [str(a["d"]) for tag, a in page.tags if "#0085d1" in str(a.get("style"))]
    assert max(len(re.findall("[ML]", path)) for path in paths) == 4  # of the five points


def test_names_are_shown_as_they_are(evaluated: Path) -> None:
    page = _Page(evaluated.read_text())
    assert f"{EVIL}.jpg" in page.words
    assert "a \"quoted\" & 'odd' class" in page.words
    assert "000 & 'co'.png" in page.words


def test_every_picture_has_words_for_those_who_cannot_see_it(evaluated: Path) -> None:
    page = _Page(evaluated.read_text())
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) > 60
    assert all(attributes["alt"] for attributes in pictures)
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert charts
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in charts)


def test_the_worst_class_comes_first_and_is_not_accused(evaluated: Path) -> None:
    words = _Page(evaluated.read_text()).words
    start = words.index("Classes to look at first")
    classes = words[start : words.index("Right for the wrong reason")]
    assert classes.index("a \"quoted\" & 'odd' class") < classes.index(f"{EVIL}6")
    assert "No class stands out among the 2 judged" in classes


def test_errors_are_counted_by_the_labels(evaluated: Path) -> None:
    words = _Page(evaluated.read_text()).words
    ran = words[words.index("What ran") : words.index("One image, every")]
    assert "top-2 error" in ran
    assert ran.count("0.0%") == 4


def test_photos_that_are_gone_are_counted(evaluated: Path) -> None:
    assert re.search(r"1 of the photos shown could not be read", _Page(evaluated.read_text()).words)


@pytest.mark.parametrize("count", [1, 2])
def test_runs_of_one_and_two_photos(tmp_path: Path, count: int) -> None:
    out = _run(tmp_path, count=count, networks=1)
    assert main(["--run", str(out)]) == 0
    audit.run(run=str(out))
    assert main(["--run", str(out)]) == 0
    page = _Page((out / "report.html").read_text())
    assert "nothing can be said about classes" in page.words


def test_images_of_a_missing_shard_are_counted_and_not_shown(tmp_path: Path) -> None:
    out = _run(tmp_path, networks=1, shards=3)
    evaluate(out)
    audit.run(run=str(out))
    for lost in (0, 2):
        (out / f"explanations/network=net/layer=features/{lost}.parquet").unlink()
    assert main(["--run", str(out)]) == 0
    words = _Page((out / "report.html").read_text()).words
    assert "were audited" not in words
    assert "000 & 'co'.png" not in words
    audit.run(run=str(out))
    assert main(["--run", str(out)]) == 0
    words = _Page((out / "report.html").read_text()).words
    assert "8 of 13 images have neither an error nor explanations of net that were" in words
    assert "000 & 'co'.png" not in words


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda out: shutil.rmtree(out / "explanations"), "has no explanations"),
        (lambda out: (out / "manifest.parquet").unlink(), "manifest.parquet"),
        (lambda out: (out / "run.json").write_text('{"schema_version": 7}'), "newer scacam"),
        (
            lambda out: next(out.glob("explanations/*/*/*.parquet")).write_bytes(b"PAR1PAR1"),
            "network=",
        ),
    ],
)
def test_broken_runs_get_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], break_it: Any, message: str
) -> None:
    out = _run(tmp_path)
    break_it(out)
    assert main(["--run", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("report: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_incomplete_run_is_reported_as_such(tmp_path: Path) -> None:
    out = _run(tmp_path, status="running")
    assert main(["--run", str(out)]) == 0
    assert "This run is running, not complete" in _Page((out / "report.html").read_text()).words


def _many(folder: Path, count: int) -> Path:
    """Two classes × two methods of each of so many images."""
    rng = np.random.default_rng(0)
    maps = rng.random((count, 2, 7, 7), dtype=np.float32)
    class_ids = rng.integers(0, 999, count)
    said = Said(
        np.stack([class_ids, class_ids + 1], axis=1),
        np.stack([rng.random(count), np.zeros(count)], axis=1),
        {"grad_cam": maps - 0.2, "sca_cam": maps},
        [f"class {i}" for i in range(1000)],
    )
    images = Images([f"gone/{i}.jpg" for i in range(count)], [(64, 64)] * count, class_ids)
    write_run(folder, images, {"net": said}, shards=max(1, count // 2000))
    return folder


def _report(out: Path) -> int:
    assert main(["--run", str(out)]) == 0
    return most_held()


@pytest.mark.long
def test_a_hundred_thousand_rows_take_no_more_memory(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for count in (5000, 25000):
        out = _many(tmp_path / str(count), count)
        peaks.append(alone(_report, out))
        sizes.append((out / "report.html").stat().st_size)
    assert peaks[1] < peaks[0] + 60e6
    assert sizes[1] < 2 * sizes[0] < 8e6


def _open(browser: Any, path: Path, width: int, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get_log("performance")
    browser.get(path.as_uri())
    time.sleep(0.1)


@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_all_and_asks_nobody(
    browser: Any, evaluated: Path, width: int, scheme: str
) -> None:
    _open(browser, evaluated, width, scheme)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in asked if not url.startswith("data:")} == {evaluated.as_uri()}

    run = browser.execute_script
    found = run("return [...document.querySelectorAll('section')].map(s => s.id)")
    assert set(found) == SECTIONS | AUDITED | {"localization", "weights"}
    assert run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert run("return document.documentElement.scrollWidth") <= width
    assert run("return document.querySelectorAll('script').length") == 0
    paper = run("return getComputedStyle(document.body).backgroundColor")
    ink = run("return getComputedStyle(document.querySelector('svg text')).fill")
    dark = [sum(map(int, re.findall(r"\d+", colour)[:3])) < 384 for colour in (paper, ink)]
    assert dark == [scheme == "dark", scheme == "light"]


@pytest.mark.long
def test_a_browser_prints_it(browser: Any, evaluated: Path) -> None:
    _open(browser, evaluated, 1280, "light")
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert len(pdf["data"]) > 50_000


@pytest.mark.long
def test_a_run_on_object_storage_is_read_and_reported_there(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    try:
        photo = tmp_path / "photo.png"
        Image.new("RGB", (90, 60), "red").save(photo)
        maps = np.random.default_rng(0).random((1, 1, 7, 7), dtype=np.float32)
        said = Said(np.zeros((1, 1), int), np.ones((1, 1)), {"sca_cam": maps}, ["cat"])
        images = Images([f"s3://{BUCKET}/photo.png"], [(90, 60)], np.array([0]))
        out = Path(write_run(tmp_path / "out", images, {"net": said}))
        bucket = fs.SubTreeFileSystem(BUCKET, store.filesystem())
        for path in (photo, *(path for path in out.rglob("*") if path.is_file())):
            name = str(path.relative_to(tmp_path))
            with bucket.open_output_stream(name) as file:
                file.write(path.read_bytes())
        environment = {**os.environ, **store.environment}
        for job in ("report.py", "pictures.py"):
            command = [sys.executable, str(JOB.with_name(job)), "--run", f"s3://{BUCKET}/out"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        with bucket.open_input_file("out/report.html") as file:
            page = _Page(file.read().decode())
        assert page.sections == SECTIONS
        assert "could not be read" not in page.words
        assert bucket.get_file_info("out/pictures/photo.png").size > 5000
    finally:
        store.stop()


def test_a_chart_of_points_draws_them():
    """Where they are, without a reference to a shape that stands elsewhere in the page."""
    points = {name: (np.array([x]), np.array([0.5])) for name, x in (("one", 0.25), ("two", 0.75))}
    chart = str(lines(points, "across", "up", "two points", points=True))
    places = [float(x) for x in re.findall(r'translate\(([\d.]+) [\d.]+\)"[^>]*><path d=', chart)]
    assert len(places) == 4  # and two in the legend
    assert places[0] < places[1]
    assert "href" not in chart
