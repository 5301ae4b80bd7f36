"""What a run holds, asked of its Parquet by DuckDB: which images there are, in which order.

Nothing is copied: DuckDB reads the columns that a question takes, from local files or by the
filesystem of `scacam.storage`, and of the answers only the last few are kept.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import duckdb
import pyarrow as pa
from pyarrow import fs

from scacam.audit.kinds import KINDS
from scacam.errors import RunError
from scacam.runs.results import Run
from scacam.storage import absolute, join, locate, uri_of
from scacam.storage.parquet import read_columns
from scacam.tables import network_path

__all__ = ["Catalog", "Question", "asked"]

_KEPT = 8

Outcome = Literal["any", "right", "wrong"]
Order = Literal["image", "sure", "unsure", "overlap", "score"]

_ORDERS: dict[Order, str] = {
    "image": "image_id",
    "sure": "probability desc, image_id",
    "unsure": "probability, image_id",
    "overlap": "overlap nulls last, image_id",
    "score": "score desc nulls last, image_id",
}
_OUTCOMES: dict[Outcome, str] = {
    "any": "true", "right": "e.label = e.class_id", "wrong": "e.label <> e.class_id"
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """Which images, by what a network said of them.

    Attributes:
        network: whose top class counts.
        layer: the layer of the maps.
        method: whose maps are shown.
        class_id: only images of this top class.
        outcome: only those where it is the label, or is not.
        least: the lowest probability of the top class.
        most: the highest.
        finding: only the images of this finding, of `metrics/findings.parquet`.
        order: by image, by probability, by the overlap with the true box (worst first), or by the
            score of a finding.
    """

    network: str
    layer: str
    method: str
    class_id: int | None = None
    outcome: Outcome = "any"
    least: float = 0.0
    most: float = 1.0
    finding: str | None = None
    order: Order = "image"


def asked(parameters: Mapping[str, str]) -> Question:
    """A question from the parameters of an address, named as its attributes; empty ones are none.

    Raises:
        ValueError: one is missing or wrong.
    """
    given = {name: value for name, value in parameters.items() if value}
    missing = [name for name in ("network", "layer", "method") if name not in given]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    question = Question(
        network=given["network"],
        layer=given["layer"],
        method=given["method"],
        class_id=int(given["class_id"]) if "class_id" in given else None,
        outcome=given.get("outcome", "any"),  # type: ignore[arg-type]
        least=float(given.get("least", 0)),
        most=float(given.get("most", 1)),
        finding=given.get("finding"),
        order=given.get("order", "image"),  # type: ignore[arg-type]
    )
    for value, known in ((question.outcome, get_args(Outcome)), (question.order, _ORDERS)):
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return question


class Catalog:
    """A run as a browser asks for it. Several threads may ask at once."""

    def __init__(self, run: Run) -> None:
        """Look which shards there are.

        Raises:
            RunError: nothing is explained yet.
        """
        self.run = run
        self._connection = duckdb.connect(
            config={"autoinstall_known_extensions": False, "autoload_known_extensions": False}
        )
        filesystem, _ = locate(run.path)
        if not isinstance(filesystem, fs.LocalFileSystem):
            self._connection.register_filesystem(filesystem.handler.fs)
        self._shards = {
            (network, layer): files
            for network in run.networks
            for layer in run.networks[network]["layers"]
            if (files := run.shards(network, layer))
        }
        if not self._shards:
            raise RunError(f"{run.path} has no explanations yet")
        self._answers: OrderedDict[Question, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def classes(self) -> dict[str, list[dict[str, Any]]]:
        """By network its top classes: `class_id`, `name`, and of how many `images`."""
        found: dict[str, list[dict[str, Any]]] = {}
        for (network, layer), shards in self._shards.items():
            if network not in found:  # all its layers and methods have the same top classes
                found[network] = self._rows(
                    "select class_id, count(*) as images,"
                    " coalesce(any_value(class_name), 'class ' || class_id) as name"
                    " from read_parquet($shards) where rank = 1 and method = $method"
                    " group by class_id order by name",
                    shards=shards,
                    method=self.run.networks[network]["layers"][layer]["methods"][0],
                )
        return found

    @cached_property
    def names(self) -> dict[str, dict[int, str]]:
        """By network the names of its classes; of older runs, of those that are on top anywhere."""
        filesystem, folder = locate(self.run.path)
        names: dict[str, dict[int, str]] = {}
        for network, rows in self.classes.items():
            names[network] = {row["class_id"]: row["name"] for row in rows}
            path = f"{folder}/{network_path(network)}"
            if filesystem.get_file_info(path).type == fs.FileType.File:
                every = read_columns(filesystem, path, ["class_id", "class_name"]).to_pylist()
                names[network] |= {
                    row["class_id"]: row["class_name"] for row in every if row["class_name"]
                }
        return names

    @cached_property
    def findings(self) -> list[dict[str, Any]]:
        """What `metrics/findings.parquet` names, the strongest first; none without an audit."""
        table = self.run.metrics("findings")
        names = ["finding", "network", "class_name", "kind"]
        rows = [] if table is None else table.to_table(names).to_pylist()
        return [{**row, "title": KINDS[row["kind"]].title} for row in rows]

    def find(self, question: Question) -> pa.Table:
        """The images that a question is about, in its order.

        Returns:
            One row per image: `image_id`, `class_id`, `probability`, `label`, and where they are
            known `overlap` and `score`.

        Raises:
            ValueError: there is no such network, layer, method or finding.
        """
        with self._lock:
            if question in self._answers:
                self._answers.move_to_end(question)
                return self._answers[question]
        answer = self._found(question)
        with self._lock:
            self._answers[question] = answer
            if len(self._answers) > _KEPT:
                self._answers.popitem(last=False)
        return answer

    def located(self, images: pa.Table) -> pa.Table:
        """Some of the rows of `find`, with the `uri` that the manifest has."""
        cursor = self._connection.cursor()
        cursor.register("images", images.append_column("place", pa.array(range(len(images)))))
        return cursor.sql(
            "select images.image_id, uri, images.* exclude (image_id, place) from images"
            " join read_parquet($manifest) using (image_id) order by place",
            params={"manifest": join(self.run.path, "manifest.parquet")},
        ).to_arrow_table()

    def errors(self, kind: str | None, offset: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
        """How many images failed, all or for one reason, and some of their rows."""
        table = self.run.errors
        if kind:
            table = table.filter(pa.compute.equal(table["error"], kind))
        return len(table), table.slice(offset, limit).to_pylist()

    def _found(self, question: Question) -> pa.Table:
        key = question.network, question.layer
        if key not in self._shards:
            raise ValueError(f"there are no maps of {question.network}, {question.layer}")
        values: dict[str, Any] = {
            "shards": self._shards[key], "method": question.method,
            "least": question.least, "most": question.most,
        }  # fmt: skip
        conditions = [
            "e.rank = 1 and e.method = $method and e.probability between $least and $most",
            _OUTCOMES[question.outcome],
        ]
        columns, tables = ["null::double as overlap", "null::double as score"], ""
        if question.class_id is not None:
            conditions.append("e.class_id = $class_id")
            values["class_id"] = question.class_id
        if question.order == "overlap" and (
            files := self._files(f"metrics/localization_images/network={question.network}")
        ):
            columns[0] = "s.iou_any as overlap"
            scores = self.run.metrics(f"localization_images/network={question.network}")
            of_layer = ""
            if scores is not None and "layer" in scores.schema.names:  # not in older tables
                of_layer = " and layer = $layer"
                values["layer"] = question.layer
            tables += (
                " left join (select image_id, any_value(iou_any) as iou_any from"
                f" read_parquet($overlaps) where method = $method{of_layer} group by image_id) s"
                " using (image_id)"
            )
            values["overlaps"] = files
        if question.finding is not None:
            files = self._files("metrics/findings_images")
            if question.finding not in {str(row["finding"]) for row in self.findings} or not files:
                raise ValueError(f"there is no finding {question.finding}")
            columns[1] = "f.score as score"
            tables += (
                " join (select image_id, max(score) as score from read_parquet($suspects) where"
                " finding::varchar = $finding group by image_id) f using (image_id)"
            )
            values |= {"suspects": files, "finding": question.finding}
        return (
            self._connection.cursor()
            .sql(
                "select image_id, e.class_id, e.probability, if(e.label >= 0, e.label, null)"
                f" as label, {', '.join(columns)}"
                f" from read_parquet($shards) e{tables} where {' and '.join(conditions)}"
                f" order by {_ORDERS[question.order]}",
                params=values,
            )
            .to_arrow_table()
        )

    def _rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        found: pa.Table = self._connection.cursor().sql(query, params=values).to_arrow_table()
        return found.to_pylist()

    def _files(self, folder: str) -> list[str]:
        """All Parquet files below a folder of the run, none if it is not there."""
        filesystem, path = locate(join(self.run.path, folder))
        found = filesystem.get_file_info(
            fs.FileSelector(path, recursive=True, allow_not_found=True)
        )
        return sorted(
            absolute(uri_of(self.run.path, info.path))
            for info in found
            if info.extension == "parquet"
        )
