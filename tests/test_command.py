"""The command line that all jobs share, and their door for Python."""

import argparse
import inspect
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from scacam import RunError
from scacam.jobs import JOBS, explain
from scacam.jobs.command import main, run_job

ROOT = Path(__file__).parent.parent
EXPLAIN = ["--networks", "tests.tiny_networks:colours", "--methods", "grad_cam"]


def _run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_help_lists_every_job(tmp_path):
    done = _run(sys.executable, "-m", "scacam", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for name, does in JOBS.items():
        assert f"  {name} " in done.stdout
        assert does in done.stdout


def test_every_job_has_its_door_for_scripts(tmp_path):
    doors = sorted((ROOT / "jobs").glob("*.py"))
    assert [door.stem for door in doors] == sorted(JOBS)
    for door in doors:
        assert f'run_job("{door.stem}")' in door.read_text()
    (tmp_path / "report.py").write_text("raise SystemExit('a user module, not the job')")
    done = _run(sys.executable, str(ROOT / "jobs/report.py"), "--run", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "report: nowhere holds no run: no run.json there; name a job's output\n"


@pytest.mark.parametrize("name", JOBS)
def test_options_are_the_keywords_of_run(name):
    job = import_module(f"scacam.jobs.{name}")
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, add_help=False)
    job.add_arguments(parser)
    parameters = inspect.signature(job.run).parameters
    assert {action.dest for action in parser._actions} == set(parameters)
    required = {action.dest for action in parser._actions if action.required}
    assert required <= {n for n, p in parameters.items() if p.default is p.empty}
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())


@pytest.mark.parametrize("arguments", [[], ["explian"]])
def test_no_such_job(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: scacam JOB" in capsys.readouterr().err


def test_a_refusal_is_one_line(tmp_path, capsys, photo_folder):
    source, output = str(photo_folder(1)), tmp_path / "out"
    arguments = ["--input", source, "--output", str(output), *EXPLAIN, "--top-k", "0"]
    assert main(["explain", *arguments]) == 2
    assert capsys.readouterr().err == "explain: --top-k must be at least 1, not 0\n"
    assert not output.exists()


def test_a_broken_factory_leaves_its_traceback_beside_the_output(
    tmp_path, capsys, photo_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_factory.py").write_text("def net():\n    return 1 + 'one'\n")
    arguments = ["--input", str(photo_folder(1)), "--output", str(tmp_path / "out")]
    arguments += ["--networks", "broken_factory:net"]
    assert run_job("explain", arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    (log,) = (tmp_path / "out/logs").iterdir()
    assert line.startswith("explain: ")
    assert "unsupported operand type" in line
    assert line.endswith(f"(traceback: {log})")
    assert "return 1 + 'one'" in log.read_text()

    assert run_job("explain", [*arguments, "--verbose"]) == 2
    assert "return 1 + 'one'" in capsys.readouterr().err
    assert list((tmp_path / "out/logs").iterdir()) == [log]


def test_standard_output_is_for_the_result(tmp_path, capsys, photo_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talkative_factory.py").write_text(
        "from tests.tiny_networks import colours\n"
        "def net():\n    print('loading weights')\n    return colours()\n"
    )
    arguments = ["--input", str(photo_folder(1)), "--output", str(tmp_path / "out"), "--dry-run"]
    assert run_job("explain", [*arguments, "--networks", "talkative_factory:net"]) == 0
    said, told = capsys.readouterr()
    assert said.startswith("networks: ")
    assert "loading weights" not in said
    assert "loading weights" in told


def test_a_fault_of_ours_is_one_line_as_well(tmp_path, capsys, monkeypatch):
    module = ModuleType("scacam.jobs.faulty")
    module.add_arguments = lambda parser: parser.add_argument("--output")
    module.run = lambda output: {}["gone"]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(JOBS, "faulty", "Fails.")
    assert run_job("faulty", ["--output", str(tmp_path / "none")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("faulty: KeyError: 'gone' (traceback: ")
    log = Path(line.rpartition("traceback: ")[2].rstrip(")\n"))
    assert "KeyError: 'gone'" in log.read_text()
    log.unlink()


def test_from_python(tmp_path, photo_folder):
    source = photo_folder(3)
    (source / "no photo.jpg").write_bytes(b"nothing")
    result = explain.run(
        input=str(source),
        output=str(tmp_path / "out"),
        networks=["tests.tiny_networks:colours"],
        methods=["grad_cam"],
    )
    assert (result.images, result.explained, dict(result.errors)) == (4, 3, {"not_an_image": 1})
    assert result.ok
    assert result.output == str(tmp_path / "out")
    assert "3 of 4 images explained" in str(result)
    again = explain.run(
        input=str(source),
        output=str(tmp_path / "out"),
        networks=["tests.tiny_networks:colours"],
        methods=["grad_cam"],
    )
    assert (again.images, again.explained, again.errors) == (4, 3, {"not_an_image": 1})
    assert "nothing to do" in str(again)
    with pytest.raises(RunError, match="no such input"):
        explain.run(input=str(tmp_path / "no"), output=str(tmp_path / "x"), networks=["resnet18"])


@pytest.mark.long
def test_interrupted(tmp_path, photo_folder):
    command = [sys.executable, "-m", "scacam", "explain", "--input", str(photo_folder(200))]
    command += ["--output", str(tmp_path / "out"), "--networks", "resnet18=random"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not (tmp_path / "out/run.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert error.splitlines()[-1] == "explain: interrupted; the same command goes on"
    assert "Traceback" not in error
