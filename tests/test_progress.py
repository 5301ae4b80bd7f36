"""What the workers report, and what is shown of it."""

import logging
import time
from collections import Counter

import pytest
import ray

from scacam.pipeline import progress
from scacam.pipeline.cluster import start_ray
from scacam.pipeline.progress import Held, Tally, shown, start_tally


@pytest.fixture
def nodes(monkeypatch) -> dict[str, bool]:
    """Two nodes of no cluster, and whether each is alive."""
    found = {"a": True, "b": True}
    seen = lambda: [{"NodeID": node, "Alive": alive} for node, alive in found.items()]  # noqa: E731
    monkeypatch.setattr(ray, "nodes", seen)
    return found


def test_deaths_are_counted_and_not_visits(nodes):
    tally = Tally()

    def enter(worker: str, node: str, block: int = 0) -> int:
        return len(tally.enter(worker, Held("explain", block, node)))

    assert enter("1", "a") == 0
    tally.leave("1", 0.5)
    assert enter("2", "a") == 0  # what it made was lost with a node: a visit
    assert enter("2", "a", block=512) == 0
    assert enter("3", "b", block=512) == 1  # 2 is dead, and its node is not
    tally.hold("3", 700)
    nodes["b"] = False
    assert enter("4", "a", block=512) == 1  # 3 went down with its node
    nodes["b"] = True
    assert [one.image for one in tally.enter("5", Held("explain", 512, "a"))] == [None, 700, None]
    tally.leave("5", 0.5)
    assert enter("6", "a", block=512) == 0
    assert tally.get().busy == {"explain": 1.0}


def test_what_is_done_twice_is_counted_once(nodes):
    tally = Tally()
    for worker, images in (("1", [32, 32]), ("2", [32, 1, 31, 36])):  # 1 died in its third batch
        tally.enter(worker, Held("explain", 0, "a"))
        for some in images:
            tally.advance(worker, some)
    tally.leave("2", 0.5)
    tally.enter("3", Held("explain", 100, "a"))
    tally.advance("3", 50)
    tally.enter("4", Held("explain", 0, "a"))  # what 2 made was lost with its node
    tally.advance("4", 32)
    assert tally.get().through == 150
    for failed in ({"unreadable": 3, "gone": 1}, {"unreadable": 2}):
        tally.write(0, 100, Counter(failed))
    counts = tally.write(1, 50, Counter({"unreadable": 1}))
    assert (counts.written, counts.errors) == (150, {"unreadable": 3})


def test_a_continued_run_shows_what_was_done(monkeypatch, caplog):
    monkeypatch.setattr(progress, "_IN_LOG_S", 0.2)
    start_ray()
    tally = start_tally()
    ray.get(tally.enter.remote("1", Held("explain", 0, "a")))
    with caplog.at_level(logging.INFO, "scacam"), shown(tally, 66, 34):
        while not caplog.messages:
            time.sleep(0.05)
        ray.get(tally.advance.remote("1", 16))
        while not caplog.messages[-1].startswith("50 of 66 images (76%)"):
            time.sleep(0.05)
    assert caplog.messages[0] == "34 of 66 images (52%), starting"
