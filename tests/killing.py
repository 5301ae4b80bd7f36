"""A job that is killed as soon as it has written something, and begun again."""

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def killed_and_begun_again(command: Sequence[str], out: Path) -> str:
    """Kill it with its first shard of explanations, let it end, and return what it says then."""

    def begun() -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    process = begun()
    while not list(out.glob("explanations/*/*/*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    process = begun()
    said, told = process.communicate(timeout=400)
    assert process.returncode == 0, told
    return said
