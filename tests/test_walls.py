"""Which room may import what, read from the imports themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from scacam.jobs import JOBS

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "scacam").rglob("*.py"))
}

FLOORS = (
    ("errors", "version"),
    ("storage",),
    ("tables", "drawing", "localization"),
    ("methods",),
    ("images",),
    ("inputs",),
    ("networks",),
    ("evaluation",),
    ("explainer",),
    ("runs",),
    ("audit",),
    ("trials",),
    ("browse", "pipeline", "report"),
    ("jobs",),
    ("__main__",),
)
"""The rooms from the ground up. What is in one imports from those below it, or from its own."""

WITHOUT_TORCH = (
    *("storage", "inputs", "images", "tables", "drawing", "localization", "runs.results"),
    *("evaluation", "audit", "report", "browse", "trials.metrics", "trials.likeness"),
)


def imports(path: Path, everywhere: bool) -> Iterator[str]:
    """The modules that one imports: when it is loaded, or anywhere in it."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else _loaded(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _loaded(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those in functions and behind TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _loaded(child)


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def floor(module: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room(module) in rooms)


def test_only_the_pipeline_and_the_jobs_know_ray():
    knowing = {
        module
        for module, path in MODULES.items()
        if any(name.partition(".")[0] == "ray" for name in imports(path, everywhere=True))
    }
    assert knowing
    assert {room(module) for module in knowing} <= {"pipeline", "jobs"}


def test_imports_run_downwards():
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imports(path, everywhere=True)
        if module != "scacam" and name in MODULES and name != "scacam"
        if room(name) != room(module) and floor(name) >= floor(module)
    ]
    assert not wrong


def test_torch_stays_out_of_what_reads_and_writes():
    def reach(module: str, seen: set[str]) -> set[str]:
        """All that loading a module loads, the packages around it as well."""
        if module in MODULES and module not in seen:
            seen.add(module)
            for name in [module.rpartition(".")[0], *imports(MODULES[module], everywhere=False)]:
                reach(name, seen)
        elif module not in MODULES:
            seen.add(module.partition(".")[0])
        return seen

    torchless = [
        module
        for module in MODULES
        if any(f"{module}.".startswith(f"scacam.{name}.") for name in WITHOUT_TORCH)
    ]
    assert len(torchless) > 20
    assert not [module for module in torchless if {"torch", "torchvision"} & reach(module, set())]


def test_no_room_is_crowded():
    """Jobs are rows of a table, found by their names."""
    for package in (path.parent for path in MODULES.values() if path.name == "__init__.py"):
        inside = [path for path in package.glob("*.py") if not path.name.startswith("__")]
        inside = [path for path in inside if package.name != "jobs" or path.stem not in JOBS]
        assert len(inside) <= 10, package


def test_importing_scacam_loads_nothing_slow():
    slow = {"torch", "ray", "numpy", "pandas", "pyarrow", "cv2", "PIL"}
    program = "import sys, scacam; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, capture_output=True, check=True, text=True, cwd=ROOT).stdout
    assert not slow & set(loaded.split())
