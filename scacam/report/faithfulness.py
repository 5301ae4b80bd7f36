"""The section of the report about what a faithfulness pass found."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from scacam.audit.maps import Ranking
from scacam.evaluation.intervals import Row
from scacam.evaluation.metrics import headline, titles
from scacam.evaluation.tables import named
from scacam.report.charts import lines
from scacam.report.sections import measured
from scacam.runs.results import Claimant, Run
from scacam.trials.metrics import BASELINES, CURVES, METRICS, leads, verdict
from scacam.trials.tables import images_folder

__all__ = ["faithfulness", "least_faithful"]

_ALIKE = 1e-3
"""Curves that are nowhere further apart are drawn as one."""


def faithfulness(run: Run) -> list[dict[str, Any]]:
    """For each network that was tried: its metrics, what leads, its curves, and the verdict."""
    sections = []
    for section, found in measured(run, "faithfulness"):
        network, of_network = section["network"], list(section["cells"].values())
        names = {row["metric"] for row in found}
        sections.append(
            section
            | {
                "metrics": {
                    name: f"{metric.title} {'↑' if metric.higher_is_better else '↓'}"
                    for name, metric in METRICS.items()
                    if metric.brief and name in names
                },
                "leads": _leads(run, network, found),
                "charts": _charts(run, network, found),
                "against": _against_localization(run, network, of_network),
                "verdict": verdict(of_network),
            }
        )
    return sections


def _leads(run: Run, network: str, found: Sequence[Row]) -> list[dict[str, Any]]:
    """By each metric of faithfulness the best method and the next."""
    dataset = run.metrics("faithfulness_differences")
    if dataset is None:
        return []
    pairs = dataset.to_table(filter=pc.field("network") == network).to_pylist()
    return [
        {"metric": metric.title, "best": best, "second": second}
        for metric, best, second in leads(named(found, found), named(found, pairs))
    ]


def _charts(run: Run, network: str, found: Sequence[Row]) -> list[tuple[str, Markup]]:
    """The mean curves of all methods, with what is done along them."""
    dataset = run.metrics("faithfulness_curves")
    if dataset is None:
        return []
    charts = []
    table = dataset.to_table(filter=pc.field("network") == network)
    for curve, done in CURVES.items():
        points = table.filter(pc.equal(table["curve"], curve)).to_pylist()
        by_method: dict[str, list[tuple[float, float]]] = {}
        for row in named(found, points):
            by_method.setdefault(row["method"], []).append((row["share"], row["probability"]))
        series: list[tuple[list[str], np.ndarray]] = []
        for method, pairs in by_method.items():
            own = np.array(sorted(pairs))
            for names, other in series:
                if np.abs(own - other).max() < _ALIKE:
                    names.append(method)
                    break
            else:
                series.append(([method], own))
        if series:
            alt = f"Mean probability of the top class of {network} while {done}"
            chart = lines(
                {", ".join(names): (own[:, 0], own[:, 1]) for names, own in series},
                "share of the pixels",
                "probability of the top class",
                alt,
                percent=True,
            )
            charts.append((done, chart))
    return charts


def _against_localization(
    run: Run, network: str, of_network: Sequence[Row]
) -> dict[str, Any] | None:
    """Each method as a point, how faithful over how well it localizes; None without both."""
    dataset = run.metrics("localization")
    faithful = next((name for name, one in METRICS.items() if one.headline), "")
    if dataset is None:
        return None
    found = dataset.to_table(filter=pc.field("network") == network).to_pylist()
    names = {row["metric"] for row in found}
    by = headline(names)
    across = _values(named(found, found), by or "")
    up = _values(of_network, faithful)
    shared = [method for method in up if method in across and method not in BASELINES]
    if by is None or len(shared) < 2:
        return None
    axes = titles(names)[by], METRICS[faithful].title
    points = {method: (np.array([across[method]]), np.array([up[method]])) for method in shared}
    alt = f"{axes[1]} over {axes[0]} of the methods of {network}"
    return {"axes": axes, "chart": lines(points, *axes, alt, percent=True, points=True)}


def _values(rows: Sequence[Row], metric: str) -> Mapping[str, float]:
    return {row["method"]: row["value"] for row in rows if row["metric"] == metric}


def least_faithful(run: Run, network: str, claimant: Claimant, size: int) -> list[dict[str, Any]]:
    """The images whose map is least faithful: insertion the least above deletion.

    None of them if these two were not measured.
    """
    dataset = run.metrics(images_folder(network))
    least = Ranking(size)
    if dataset is not None:
        columns = ["image_id", "uri", "class_id", "insertion_auc", "deletion_auc"]
        where = (pc.field("method") == claimant.method) & (pc.field("layer") == claimant.layer)
        for batch in dataset.to_batches(columns=columns, filter=where):
            table = pa.Table.from_batches([batch])
            if not table["insertion_auc"].null_count and not table["deletion_auc"].null_count:
                gap = table["insertion_auc"].to_numpy() - table["deletion_auc"].to_numpy()
                least.add(-gap, table)
    return least.entries
