"""The page to look around in a run: a real server, asked by addresses and by a real browser."""

import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
from made_runs import Images, Said, evaluate, write_run
from moto.server import ThreadedMotoServer
from PIL import Image
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from scacam.browse import make_app
from scacam.browse.catalog import Catalog, Question
from scacam.runs.results import open_run

COUNT, CLASSES = 90, 5
EVIL = "<script>alert('evil')</script>"
NAMES = ["cat", "dog", EVIL, "bird", "fish"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks, one of which has maps of two layers; one photo is no image, one is gone."""
    folder = tmp_path_factory.mktemp("browse")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    uris = [str(folder / f"photos/{i:02d} & '<b>'.png") for i in range(COUNT)]
    for uri in uris[:-2]:
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(uri)
    Path(uris[-2]).write_text("the secret of another file")
    networks = {}
    for network in ("net", "other"):
        ids = np.stack([rng.permutation(CLASSES)[:2] for _ in range(COUNT)])
        probabilities = np.sort(rng.random((COUNT, 2)), axis=1)[:, ::-1] / [1, 2]
        maps = rng.random((COUNT, 2, 7, 7), dtype=np.float32)
        finer = rng.random((COUNT, 2, 14, 14), dtype=np.float32)
        networks[network] = Said(
            ids, probabilities, {"grad_cam": maps, "sca_cam": maps[::-1]}, NAMES,
            others={"stage": {"sca_cam": finer}} if network == "other" else {},
        )  # fmt: skip
    images = Images(uris, [(90, 60)] * COUNT, rng.integers(-1, CLASSES, COUNT), failed=["bad.jpg"])
    path = Path(write_run(folder / "out", images, networks, shards=3, errors={"corrupt": 1}))
    evaluate(path)
    kept = {"image_id": [4], "class_id": networks["net"].class_ids[4, :1], "channel_ids": [[3, 1]]}
    kept["channel_contributions"] = pa.array([np.array([2, 0.5], np.float16)])
    (path / "predictions/network=net").mkdir(parents=True)
    pq.write_table(pa.table(kept), path / "predictions/network=net/0.parquet")
    findings = [{"finding": 7, "network": "net", "class_name": EVIL, "kind": "border"}]
    pq.write_table(pa.Table.from_pylist(findings), path / "metrics/findings.parquet")
    suspects = [{"finding": 7, "image_id": i, "score": i / 10} for i in range(0, COUNT, 9)]
    (path / "metrics/findings_images").mkdir()
    pq.write_table(pa.Table.from_pylist(suspects), path / "metrics/findings_images/0.parquet")
    return path


@pytest.fixture(scope="module")
def address(out: Path) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(make_app(open_run(str(out))), log_level="warning"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listening.close()


def get(address: str, path: str, headers: Any = None, **parameters: Any) -> Any:
    query = urllib.parse.urlencode(parameters)
    request = urllib.request.Request(f"{address}{path}?{query}", headers=headers or {})
    with urllib.request.urlopen(request) as response:
        return response.read(), response.headers


def refused(address: str, path: str, headers: Any = None, **parameters: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as found:
        get(address, path, headers, **parameters)
    with found.value as response:
        return response.code, response.read().decode()


def asked(address: str, path: str, **parameters: Any) -> Any:
    return json.loads(get(address, path, **parameters)[0])


MAP = {"network": "net", "layer": "features", "method": "sca_cam"}


def tops(out: Path, network: str = "net") -> pd.DataFrame:
    table = pd.read_parquet(out / f"explanations/network={network}/layer=features")
    return table[(table["method"] == "sca_cam") & (table["rank"] == 1)].sort_values("image_id")


def test_what_there_is_to_choose_from(address: str, out: Path) -> None:
    about = asked(address, "api/run")
    assert (about["images"], about["labelled"], about["errors"]) == (
        COUNT + 1,
        True,
        {"corrupt": 1},
    )
    names = [(one["network"], one["layer"], one["name"]) for one in about["maps"]]
    assert names == [
        ("net", "features", "grad_cam"),
        ("net", "features", "sca_cam"),
        ("other", "features", "grad_cam"),
        ("other", "features", "sca_cam (features)"),
        ("other", "stage", "sca_cam (stage)"),
    ]
    counted = tops(out)["class_id"].value_counts()
    found = {row["class_id"]: row["images"] for row in about["classes"]["net"]}
    assert found == counted.to_dict()


@pytest.mark.parametrize(
    ("parameters", "chosen", "order"),
    [
        ({}, lambda rows: rows["label"] < 99, "image_id"),
        ({"outcome": "right"}, lambda rows: rows["label"] == rows["class_id"], "image_id"),
        ({"outcome": "wrong", "order": "sure"},
         lambda rows: rows["label"].notna() & (rows["label"] != rows["class_id"]), "-probability"),
        ({"class_id": 2, "order": "unsure"}, lambda rows: rows["class_id"] == 2, "probability"),
        ({"least": 0.4, "most": 0.8}, lambda rows: rows["probability"].between(0.4, 0.8),
         "image_id"),
        ({"finding": 7, "order": "score"}, lambda rows: rows["image_id"] % 9 == 0, "-image_id"),
    ],
)  # fmt: skip
def test_questions_are_answered_as_pandas_does(
    address: str, out: Path, parameters: dict[str, Any], chosen: Any, order: str
) -> None:
    rows = tops(out)
    wanted = rows[chosen(rows) | (rows["label"].isna() & (not parameters))]
    wanted = wanted.sort_values(order.strip("-"), ascending=order[0] != "-", kind="stable")
    first = asked(address, "api/images", **MAP, **parameters, limit=7)
    rest = asked(address, "api/images", **MAP, **parameters, limit=200, offset=7)
    assert first["total"] == rest["total"] == len(wanted) > 7
    found = [*first["rows"], *rest["rows"]]
    assert [row["image_id"] for row in found] == wanted["image_id"].tolist()
    assert [row["uri"] for row in found] == wanted["uri"].tolist()
    assert [row["class_name"] for row in found] == wanted["class_name"].tolist()
    for kind, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        table = read(io.BytesIO(get(address, f"selection.{kind}", **MAP, **parameters)[0]))
        assert table["uri"].tolist() == wanted["uri"].tolist()
    uris = get(address, "selection.txt", **MAP, **parameters)[0].decode().splitlines()
    assert uris == wanted["uri"].tolist()


def test_the_worst_overlap_comes_first(address: str) -> None:
    rows = asked(address, "api/images", **MAP, order="overlap")["rows"]
    assert [row["overlap"] for row in rows[:12]] == [i / 12 for i in range(12)]
    assert rows[12]["overlap"] is None  # not evaluated


def test_one_image_in_full(address: str) -> None:
    image = asked(address, "api/images/4")
    assert [network["network"] for network in image["networks"]] == ["net", "other"]
    assert [row["rank"] for row in image["networks"][0]["classes"]] == [1, 2]
    channels = [row["channels"] for one in image["networks"] for row in one["classes"]]
    assert channels == [[[3, 2.0], [1, 0.5]], [], [], []]


def test_pictures(address: str, out: Path) -> None:
    def picture(path: str, **parameters: Any) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(get(address, path, **parameters)[0])), dtype=int)

    layers = [
        picture("maps/3.webp", network="other", layer=layer, method="sca_cam")
        for layer in ("features", "stage")
    ]
    assert np.abs(layers[0] - layers[1]).mean() > 5
    photo = picture("photos/3.webp", size="large")
    assert photo.shape == (600, 900, 3)
    for image_id in (COUNT - 1, COUNT - 2):  # gone; no image
        assert np.ptp(picture(f"photos/{image_id}.webp")) <= 2


def test_nothing_else_is_served(address: str, out: Path) -> None:
    assert refused(address, "api/images", network="net")[1] == '{"error":"layer is missing"}'
    assert "nowhere" in refused(address, "api/images", **MAP | {"layer": "nowhere"})[1]
    assert "'up'" in refused(address, "api/images", **MAP, order="up")[1]
    assert "no finding 8" in refused(address, "api/images", **MAP, finding="8")[1]
    assert refused(address, "api/images", **MAP, least="much")[0] == 400
    assert refused(address, "maps/3.webp", network="nobody")[0] == 400
    assert refused(address, f"photos/{COUNT + 5}.webp")[0] == 404
    assert refused(address, "selection.exe", **MAP)[0] == 404
    for path in ("static/../server.py", "static/%2e%2e/server.py", "photos/..%2f..%2fetc.webp"):
        assert refused(address, path)[0] == 404
    assert refused(address, "", headers={"Host": "evil.example"})[0] == 400
    _, headers = get(address, "")
    assert headers["Content-Security-Policy"].startswith("default-src 'self'")


def test_in_a_store(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("ENDPOINT_URL", f"http://{host}:{port}"), ("REGION", "us-east-1"),
                        ("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret")):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    store = boto3.client("s3")
    store.create_bucket(Bucket="bucket")
    for path in out.rglob("*"):
        if path.is_file():
            store.upload_file(str(path), "bucket", f"out/{path.relative_to(out)}")
    catalog = Catalog(open_run("s3://bucket/out"))
    found = catalog.find(Question(**MAP, order="sure"))
    assert found.equals(Catalog(open_run(str(out))).find(Question(**MAP, order="sure")))
    assert catalog.located(found.slice(3, 2))["uri"].to_pylist()[0].endswith(".png")
    server.stop()


def test_the_command(out: Path) -> None:
    command = [sys.executable, "-m", "scacam", "browse", "--run", str(out), "--port", "0"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        line = process.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        assert asked(address, "api/run")["images"] == COUNT + 1
        taken = subprocess.run(
            [*command[:-1], address.split(":")[2][:-1]], capture_output=True, text=True
        )
        assert taken.returncode == 2
        assert "in use" in taken.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert "no longer shown" in process.stdout.read()


@pytest.mark.long
def test_a_browser_looks_around(browser: Any, address: str) -> None:
    def waits(found: Any) -> Any:
        waiting = WebDriverWait(browser, 20, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: found())

    def every(selector: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def counted() -> str:
        return every("#count")[0].text

    def sees(width: int, scheme: str) -> None:
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        screen = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    browser.get_log("performance"), browser.get_log("browser")
    sees(1280, "light")
    browser.get(address)
    waits(lambda: counted() == f"{COUNT} images")
    assert len(every("#grid li")) == 60
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    waits(lambda: len(every("#grid li")) == COUNT)

    # By the keyboard alone: a class, its first image, the next one, back.
    field = every("[name=class_name]")[0]
    field.send_keys(EVIL, Keys.TAB)
    waits(lambda: counted() != f"{COUNT} images")
    images = int(counted().split()[0])
    waits(lambda: all(EVIL in tile.text for tile in every("#grid .said")))
    every("#grid button")[0].send_keys(Keys.ENTER)
    waits(lambda: every("dialog[open] .maps img"))
    title = every("#title")[0].text
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    waits(lambda: every("#title") and every("#title")[0].text != title)
    waits(
        lambda: browser.execute_script(
            "return [...document.querySelectorAll('dialog .maps img')].slice(0, 2)"
            ".every(one => one.complete && one.naturalWidth > 0)"
        )
    )
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    waits(lambda: not every("dialog[open]"))
    assert browser.switch_to.active_element == every("#grid button")[1]

    # What is shown is in the address.
    shown = browser.current_url
    browser.get("about:blank")
    browser.get(shown)
    waits(lambda: counted() == f"{images} images")

    for width, scheme in ((390, "dark"), (1280, "light")):
        sees(width, scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 384) == (scheme == "dark")

    every("[name=class_name]")[0].clear()
    every("[name=show]")[0].send_keys("all errors")
    waits(lambda: "bad.jpg" in every("#grid")[0].text)

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert len(urls) > 70
    assert not [url for url in urls if not url.startswith((address, "about:"))]
    assert browser.get_log("browser") == []
