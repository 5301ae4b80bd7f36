"""The demo, as a newcomer runs it."""

import subprocess
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent


def test_the_demo(tmp_path: Path) -> None:
    """It explains all photos, finds most of their objects' names, and draws and reports them."""
    out = tmp_path / "out"
    subprocess.run([ROOT / "scripts/demo", out], check=True)
    rows = pd.concat(map(pd.read_parquet, out.glob("explanations/*/*/*.parquet")))
    assert rows["image_id"].nunique() == 20
    assert set(rows["method"]) == {"feature_map", "grad_cam", "sca_cam", "extent_cam"}
    first = rows[(rows["rank"] == 1) & (rows["method"] == "sca_cam")]
    assert (first["class_id"] == first["label"]).sum() == 18
    assert len(list(out.glob("pictures/**/*.png"))) == 20
    assert "bull mastiff" in (out / "report.html").read_text()
