"""The published watermark on which ImageNet networks rely, on real photos and a real network."""

import os
import runpy
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_compare_says_what_a_watermark_does(tmp_path: Path) -> None:
    bench = runpy.run_path(str(ROOT / "scripts/bench_watermark"))
    photos = bench["foolbox_photos"]()
    assert len(photos) == 20
    found = bench["watermarked"](photos, tmp_path, "efficientnet_lite0")
    rows = pd.read_parquet(found.table)
    assert len(rows) == 20
    right = [(rows[f"class_id_{run}"] == rows["label"]).sum() for run in "ab"]
    assert right[0] > right[1]
    # The mark lies across the middle: no map stays where it was.
    assert (rows["moved"] > 0).all()
    (told,) = found.told
    assert f"right {right[0] / 20:.1%} before, {right[1] / 20:.1%} after" in told
    assert told in str(found)
    assert os.path.getsize(found.page) > 50_000
