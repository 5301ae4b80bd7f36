"""The page's server: it answers on this machine alone, and with nothing but what the run holds."""

import io
from collections.abc import Awaitable, Callable
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from scacam.browse.catalog import Catalog, asked
from scacam.drawing import TRUTH, draw_box, fit, grey
from scacam.errors import ScacamError
from scacam.evaluation.truth import TrueBoxes
from scacam.runs.results import Row, Run

__all__ = ["make_app"]

_PAGE_MAX = 200
_FINDINGS_MAX = 200
_CHANNELS = 8
_SIZES = {"small": 260, "large": 900}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(run: Run) -> Starlette:
    """The web application of a run.

    Only requests to `localhost` and `127.0.0.1` are answered, so that no other site's page can
    have them answered under a name of its own. Photos are only ever sent as pictures drawn anew
    from their pixels, and are named by their image's id: no address reaches another file.

    Raises:
        RunError: nothing is explained in that run.
    """
    view = _View(run)
    return Starlette(
        routes=[
            Route("/", view.page),
            Route("/api/run", view.about),
            Route("/api/images", view.images),
            Route("/api/images/{image_id:int}", view.image),
            Route("/api/errors", view.errors),
            Route("/selection.{kind}", view.selection),
            Route("/photos/{image_id:int}.webp", view.photo),
            Route("/maps/{image_id:int}.webp", view.heatmap),
            Mount("/static", StaticFiles(packages=[("scacam.browse", "static")])),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1"]),
            Middleware(_Headers),
        ],
        exception_handlers={ValueError: _refused, ScacamError: _refused},
    )


class _Headers:
    """Sets the headers that keep a page to itself."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(key.lower().encode(), text.encode()) for key, text in _HEADERS.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self.app(scope, receive, with_headers)


def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


class _View:
    """What each address shows of a run. Starlette calls plain functions in threads."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.catalog = Catalog(run)
        boxes = run.metrics("localization_boxes")
        self.boxes = None if boxes is None else TrueBoxes.from_table(boxes.to_table())

    def page(self, request: Request) -> Response:
        """The page itself, which asks for all the rest."""
        loader = jinja2.PackageLoader("scacam.browse")
        template = jinja2.Environment(loader=loader, autoescape=True).get_template("page.html")
        return HTMLResponse(template.render(run=self.run.path))

    def about(self, request: Request) -> Response:
        """What there is to choose from."""
        catalog = self.catalog
        return JSONResponse(
            {
                "path": self.run.path,
                "images": self.run.images.count,
                "labelled": self.run.images.labelled,
                "evaluated": self.run.metrics("localization_images") is not None,
                "maps": [
                    {"network": network, **claimant._asdict()}
                    for network in self.run.networks
                    for claimant in self.run.claimants(network)
                ],
                "classes": catalog.classes,
                "findings": catalog.findings[:_FINDINGS_MAX],
                "errors": self.run.config.get("errors", {}),
            }
        )

    def images(self, request: Request) -> Response:
        """Some of the images that a question is about."""
        parameters = dict(request.query_params)
        offset, limit = int(parameters.pop("offset", 0)), int(parameters.pop("limit", 60))
        question = asked(parameters)
        found = self.catalog.find(question)
        some = found.slice(max(offset, 0), min(max(limit, 0), _PAGE_MAX))
        rows = self.catalog.located(some).to_pylist()
        names = self.catalog.names.get(question.network, {})
        for row in rows:
            row["class_name"] = _name(names, row["class_id"])
            row["label_name"] = None if row["label"] is None else _name(names, row["label"])
        return JSONResponse({"total": len(found), "rows": [_finite(row) for row in rows]})

    def image(self, request: Request) -> Response:
        """All that is known of one image: its classes and maps, network by network."""
        image_id = request.path_params["image_id"]
        networks: list[dict[str, Any]] = []
        about: dict[str, Any] = {"image_id": image_id}
        for network in self.run.networks:
            rows = self._explanations(network, image_id, _SAID)
            if not rows:
                continue
            about |= {name: rows[0][name] for name in ("uri", "width", "height", "label")}
            classes = {row["class_id"]: row for row in rows}.values()
            channels = self._channels(network, image_id)
            networks.append(
                {
                    "network": network,
                    "classes": sorted(
                        (
                            _finite({name: row[name] for name in _CLASS})
                            | {"channels": channels.get(row["class_id"], [])}
                            for row in classes
                        ),
                        key=lambda row: (row["rank"] is None, row["rank"]),
                    ),
                }
            )
        if not networks:
            raise HTTPException(404)
        return JSONResponse({**about, "networks": networks})

    def _channels(self, network: str, image_id: int) -> dict[int, list[tuple[int, float]]]:
        """By class the channels that add most to its logit, and how much; none if not kept."""
        names = ["class_id", "channel_ids", "channel_contributions"]
        found = self.run.predictions(network, names, pc.field("image_id") == image_id, [image_id])
        rows = [] if found is None else found.to_table().to_pylist()
        return {
            row["class_id"]: list(
                zip(row["channel_ids"], map(float, row["channel_contributions"]), strict=True)
            )[:_CHANNELS]
            for row in rows
            if row["channel_ids"]
        }

    def errors(self, request: Request) -> Response:
        """Some of the images that could not be explained."""
        offset = max(int(request.query_params.get("offset", 0)), 0)
        total, rows = self.catalog.errors(request.query_params.get("error"), offset, _PAGE_MAX)
        return JSONResponse({"total": total, "rows": rows})

    def selection(self, request: Request) -> Response:
        """All images that a question is about, as a file."""
        kind = request.path_params["kind"]
        table = self.catalog.located(self.catalog.find(asked(dict(request.query_params))))
        buffer = io.BytesIO()
        if kind == "txt":
            buffer.write("".join(f"{uri}\n" for uri in table["uri"].to_pylist()).encode())
        elif kind == "csv":
            pyarrow.csv.write_csv(table, buffer)
        elif kind == "parquet":
            pq.write_table(table, buffer)
        else:
            raise HTTPException(404)
        headers = {"Content-Disposition": f'attachment; filename="selection.{kind}"'}
        return Response(buffer.getvalue(), headers=headers, media_type=_MEDIA[kind])

    def photo(self, request: Request) -> Response:
        """A photo, drawn anew."""
        row = self._shown(request)
        size = _size(request)
        return _webp(fit(self.run.photo(row) or _gone(row), size, size))

    def heatmap(self, request: Request) -> Response:
        """A heatmap over its photo, with its box and the true ones."""
        row = self._shown(request)
        size = _size(request)
        picture = self.run.overlay(row, fit(self.run.photo(row) or _gone(row), size, size))
        if self.boxes is not None:
            scale = picture.width / row["width"], picture.height / row["height"]
            for box in self.boxes.of(row["image_id"]):
                draw_box(picture, (box * np.tile(scale, 2)).tolist(), TRUTH, dashed=True)
        return _webp(picture)

    def _shown(self, request: Request) -> Row:
        """The explanation that an address names; the top class's where it names none."""
        wanted = request.query_params
        image_id = request.path_params["image_id"]
        network = wanted.get("network") or next(iter(self.run.networks))
        condition = pc.field("rank") == 1
        if wanted.get("class_id"):
            condition = pc.field("class_id") == int(wanted["class_id"])
        for name in ("layer", "method"):
            if wanted.get(name):
                condition &= pc.field(name) == wanted[name]
        rows = self._explanations(network, image_id, None, condition)
        if not rows:
            raise HTTPException(404)
        return rows[0]

    def _explanations(
        self,
        network: str,
        image_id: int,
        columns: list[str] | None,
        where: pc.Expression | None = None,
    ) -> list[dict[str, Any]]:
        found = self.run.explanations(network, columns=columns, where=where, image_ids=[image_id])
        return found.to_table().to_pylist()


_CLASS = ("class_id", "class_name", "rank", "probability")
_SAID = ["uri", "width", "height", "label", *_CLASS]
_MEDIA = {
    "txt": "text/plain; charset=utf-8",
    "csv": "text/csv; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
}


def _gone(row: Row) -> Image.Image:
    return grey(row["width"], row["height"])


def _size(request: Request) -> int:
    return _SIZES[request.query_params.get("size", "small")]


def _name(names: dict[int, str], class_id: int) -> str:
    return names.get(class_id, f"class {class_id}")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose numbers JSON has: NaN is none."""
    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value
        for name, value in row.items()
    }


def _webp(picture: Image.Image) -> Response:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80, method=2)
    return Response(buffer.getvalue(), media_type="image/webp")
