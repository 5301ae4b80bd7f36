"""Class activation maps: every method and every class from one forward pass.

>>> import scacam
>>> network = scacam.load_network("resnet50", weights="DEFAULT")
>>> explanation = scacam.Explainer(network)(images)

Importing this package loads nothing slow; its parts load when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scacam.errors import ImageError, NetworkError, RunError, ScacamError
from scacam.version import __version__

if TYPE_CHECKING:
    from scacam import methods
    from scacam.explainer import Explainer, Explanation
    from scacam.images import Preprocessing
    from scacam.networks import Network, load_network
    from scacam.runs.results import Run, open_run
    from scacam.trials.faithfulness import Faithfulness, faithfulness

__all__ = [
    "Explainer",
    "Explanation",
    "Faithfulness",
    "ImageError",
    "Network",
    "NetworkError",
    "Preprocessing",
    "Run",
    "RunError",
    "ScacamError",
    "__version__",
    "faithfulness",
    "load_network",
    "methods",
    "open_run",
]

_HOMES = {
    "Explainer": "scacam.explainer",
    "Explanation": "scacam.explainer",
    "Faithfulness": "scacam.trials.faithfulness",
    "Network": "scacam.networks",
    "Preprocessing": "scacam.images",
    "Run": "scacam.runs.results",
    "faithfulness": "scacam.trials.faithfulness",
    "load_network": "scacam.networks",
    "open_run": "scacam.runs.results",
}


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module("scacam.methods")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'scacam' has no attribute {name!r}")
