"""The HTTP application. It knows engines, but neither Ray nor pipelines."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from sg_export.serving.engine import Engine, Reply
from sg_export.serving.errors import CLOSED_REQUEST, ApiError, api_error
from sg_export.serving.logs import log
from sg_export.serving.metrics import Metrics
from sg_export.serving.schema import described, parse, runtime_request
from sg_runtime.errors import SgError, UsageError
from sg_runtime.service import PARTS, Request, Statistics, checked

T = TypeVar("T")

CHECK_SECONDS = 5.0
"""Seconds after which an engine that does not answer a check counts as not ready."""

PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: nothing but the answers of its own server."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for.

    images: largest number of images (n).
    steps: largest number of steps.
    body: largest body in bytes.
    timeout: seconds within which the last run of a request must begin.
    """

    images: int = 16
    steps: int = 250
    body: int = 1 << 16
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in ("images", "steps", "body", "timeout"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}: expected more than 0, found {getattr(self, name)}")


class GoneError(Exception):
    """The client closed the connection before the response."""


def make_app(engines: Sequence[Engine], limits: Limits | None = None, key: str | None = None) -> Starlette:
    """Return the ASGI application that serves these engines, the first by default.

    key: key that clients must give as `Authorization: Bearer KEY`; None for no check.
    """
    return _Server(engines, limits or Limits(), key).app()


class _Server:
    """State and endpoints of the application."""

    def __init__(self, engines: Sequence[Engine], limits: Limits, key: str | None) -> None:
        self.engines = {engine.name: engine for engine in engines}
        self.limits = limits
        self.metrics = Metrics(self.engines)
        self._key = None if key is None else hashlib.sha256(key.encode()).digest()
        self._page = resources.files("sg_export.serving").joinpath("page.html").read_text(encoding="utf-8")

    def app(self) -> Starlette:
        """Return the application."""

        def route(
            path: str, endpoint: Callable[[HttpRequest, dict[str, Any]], Awaitable[Response]], *methods: str
        ) -> Route:
            return Route(path, self._watched(endpoint), methods=list(methods or ("GET",)))

        return Starlette(
            routes=[
                route("/", self._show_page),
                route("/health", self._health),
                route("/ready", self._ready),
                route("/metrics", self._metrics),
                route("/v1/models", self._models),
                route("/v1/models/{model}", self._model),
                route("/v1/images/generations", self._generations, "POST"),
            ],
            exception_handlers={HTTPException: _unknown},
        )

    def _watched(
        self, endpoint: Callable[[HttpRequest, dict[str, Any]], Awaitable[Response]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """Wrap an endpoint: errors become responses, and each request is logged and counted.

        The endpoint gets the fields of the log's line, and adds to them.
        """

        async def watched(request: HttpRequest) -> Response:
            began, fields = time.monotonic(), dict[str, Any](id=uuid.uuid4().hex[:16])
            problem: ApiError | None = None
            unexpected: BaseException | None = None
            try:
                response = await endpoint(request, fields)
            except (GoneError, ClientDisconnect):
                response = Response(status_code=CLOSED_REQUEST)
            except (ApiError, SgError) as error:
                problem = error if isinstance(error, ApiError) else api_error(error)
            except Exception as error:
                unexpected = error
                problem = ApiError(
                    500, "internal_error", f"unexpected {type(error).__name__}; the server's log has more"
                )
            if problem is not None:
                response = problem.response()
                fields |= {"code": problem.code, "param": problem.param}
                if problem.status >= 500:  # others quote the request
                    fields["message"] = str(problem)
            response.headers["X-Request-Id"] = fields["id"]
            if request.method == "POST":
                self.metrics.requests.labels(fields.get("model", ""), response.status_code).inc()
            level = logging.ERROR if response.status_code >= 500 else logging.INFO
            if level == logging.INFO and request.url.path in ("/health", "/ready", "/metrics"):
                level = logging.DEBUG
            log(
                level,
                "request",
                method=request.method,
                path=request.url.path,
                status=response.status_code,
                seconds=round(time.monotonic() - began, 6),
                exc_info=unexpected,
                **fields,
            )
            return response

        return watched

    def _authorize(self, request: HttpRequest) -> None:
        """Raise ApiError unless the request has the key of the server."""
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self._key):
            found = "none" if not given else "another one"
            raise ApiError(
                401,
                "invalid_api_key",
                f"key: expected the server's key as Authorization: Bearer KEY, found {found}",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _show_page(self, request: HttpRequest, fields: dict[str, Any]) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})

    async def _health(self, request: HttpRequest, fields: dict[str, Any]) -> Response:
        """Say that the server runs."""
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: HttpRequest, fields: dict[str, Any]) -> Response:
        """Say whether every model can be served."""
        checks = await asyncio.gather(*(_problem(engine) for engine in self.engines.values()))
        models = {name: found or "ok" for name, found in zip(self.engines, checks, strict=True)}
        ready = not any(checks)
        return JSONResponse({"status": "ok" if ready else "not ready", "models": models}, 200 if ready else 503)

    async def _metrics(self, request: HttpRequest, fields: dict[str, Any]) -> Response:
        self._authorize(request)
        found = await asyncio.gather(*(_statistics(engine) for engine in self.engines.values()))
        text = self.metrics.text(dict(zip(self.engines, found, strict=True)))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: HttpRequest, fields: dict[str, Any]) -> Response:
        self._authorize(request)
        data = [described(name, engine.bundle.manifest) for name, engine in self.engines.items()]
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, request: HttpRequest, fields: dict[str, Any]) -> Response:
        self._authorize(request)
        engine = self._engine(request.path_params["model"])
        return JSONResponse(described(engine.name, engine.bundle.manifest))

    def _engine(self, name: str | None) -> Engine:
        """Return the engine of a model; by default the first. Raises ApiError."""
        if name is None:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            known = ", ".join(self.engines)
            raise ApiError(404, "model_not_found", f"model {name!r:.80}: expected one of {known}", "model")
        return self.engines[name]

    async def _generations(self, request: HttpRequest, fields: dict[str, Any]) -> Response:
        """Answer with the images of a request."""
        began = time.monotonic()
        self._authorize(request)
        asked = parse(await self._body(request))
        engine = self._engine(asked.model)
        fields |= {"model": engine.name, "images": asked.n}
        manifest = engine.bundle.manifest
        wanted = runtime_request(manifest, asked, self.limits.images, self.limits.steps)
        group = checked(manifest, wanted)
        fields |= {"seed": wanted.seeds[0], "steps": group.steps, "guidance": str(group.guidance)}
        progress = self.metrics.progress.labels(engine.name)
        progress.inc(asked.n)
        try:
            reply = await _unless_gone(request, self._reply(engine, wanted))
        finally:
            progress.dec(asked.n)
        total = time.monotonic() - began
        self.metrics.answered(engine.name, reply, total)
        fields["parts"] = {name: round(getattr(reply.parts, name), 6) for name in PARTS}
        data = [
            {"b64_json": base64.b64encode(image).decode(), "seed": seed}
            for image, seed in zip(reply.images, wanted.seeds, strict=True)
        ]
        body = {"created": int(time.time()), "model": engine.name, "seconds": fields["parts"], "data": data}
        return Response(json.dumps(body), media_type="application/json")

    async def _reply(self, engine: Engine, wanted: Request) -> Reply:
        return await engine.generate(wanted, self.limits.timeout)

    async def _body(self, request: HttpRequest) -> bytes:
        """Return the body of a request. Raises ApiError if it is too long, or of another type."""
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "media_type", f"Content-Type: expected application/json, found {kind or 'none'!r:.80}")
        limit, body = self.limits.body, bytearray()
        length = request.headers.get("content-length", "0")
        too_long = ApiError(413, "body_too_long", f"body: expected at most {limit} bytes, found more")
        if length.isdecimal() and int(length) > limit:
            raise too_long
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_long
        return bytes(body)


async def _problem(engine: Engine) -> str | None:
    """Return why an engine is not ready, or None if it is."""
    try:
        await asyncio.wait_for(engine.check(), CHECK_SECONDS)
    except (asyncio.TimeoutError, TimeoutError):
        return f"expected an answer within {CHECK_SECONDS:g} s, found none"
    except SgError as error:
        return str(error).replace("`", "")
    return None


async def _statistics(engine: Engine) -> list[Statistics]:
    """Return the statistics of an engine; none if it does not answer."""
    try:
        return await asyncio.wait_for(engine.statistics(), CHECK_SECONDS)
    except (asyncio.TimeoutError, TimeoutError, SgError):
        return []


async def _unless_gone(request: HttpRequest, work: Awaitable[T]) -> T:
    """Return the result of `work`. Cancel it and raise GoneError if the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _unknown(request: HttpRequest, error: Exception) -> Response:
    """Answer to a path or a method that the application does not have."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "error")
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, code, message, headers=error.headers).response()
