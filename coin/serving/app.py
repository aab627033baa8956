"""The front end over HTTP: a FastAPI application of the Open Inference Protocol, with metrics and readiness."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect

from coin.errors import CoinError, ConfigurationError, DataError, DeadlineError, OverloadedError, ServingError
from coin.serving.front_end import FrontEnd, Limits
from coin.serving.protocol import ALL, Description, InferRequest, RefusedError, parse

# The first that an error is an instance of counts; 429 is for too many queries, 503 for too few servers.
_STATUS = {DataError: 400, DeadlineError: 504, OverloadedError: 429, ServingError: 503, CoinError: 500}


@dataclass
class Budget:
    """A shared budget: each user may take half of what the others leave, so that small requests always succeed."""

    what: str
    most: int = 128 * 2**20
    held: int = 0

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Reserve a part of the budget until the end of the block; it is refused with status 413 or 429."""
        if 2 * amount > self.most:
            raise RefusedError(f"found {amount} {self.what}, expected at most {self.most // 2}; send fewer inputs", 413)
        if 2 * amount > self.most - self.held:
            raise OverloadedError(f"{self.held} {self.what} of queries are being read already; ask again later")
        self.held += amount
        try:
            yield
        finally:
            self.held -= amount


class Reader:
    """Reads queries in threads, within limits on bytes, pixels and time; large ones never hold small ones up."""

    def __init__(self, about: Description, limits: Limits) -> None:
        self.about, self.limits = about, limits
        self.bytes, self.pixels = Budget("bytes"), Budget("pixels")
        self._lanes = {is_light: ThreadPoolExecutor(2, "reader") for is_light in (True, False)}

    async def read(self, request: Request, model: str) -> tuple[InferRequest, Any]:
        """Return a request and its inputs; raises DataError, or OverloadedError if too much is being read."""
        for header in ("content-encoding", "inference-header-content-length"):
            if found := request.headers.get(header):
                raise RefusedError(f"found {header}: {found[:40]}, expected plain JSON; set binary_data=False", 415)
        if not (length := request.headers.get("content-length", "")).isdecimal():
            raise RefusedError(f"found Content-Length {length[:40]!r}, expected the number of bytes", 411)
        if (size := int(length[:40])) > self.limits.bytes:
            raise RefusedError(f"found {size} bytes, expected at most {self.limits.bytes}; send fewer inputs", 413)
        loop, is_light = asyncio.get_running_loop(), size <= 2**16
        with self.bytes.taken(size):
            try:
                async with asyncio.timeout(self.limits.reading):
                    body = await request.body()
            except (ClientDisconnect, TimeoutError):
                raise RefusedError(f"found no end within {self.limits.reading:g} s; send it faster", 408) from None
            about = body, model, self.about, self.limits
            asked, pixels, decode = await loop.run_in_executor(self._lanes[is_light], parse, *about)
            with self.pixels.taken(pixels):
                return asked, await loop.run_in_executor(self._lanes[is_light and pixels <= 2**20], decode)

    async def discard(self, request: Request) -> None:
        """Read on in the body of a refused query for a while: a client that still sends would never see the answer."""
        with suppress(ClientDisconnect, RuntimeError, TimeoutError):  # RuntimeError: it was read to its end
            async with asyncio.timeout(self.limits.reading):
                async for _ in request.stream():
                    pass


def make_app(front: FrontEnd, about: Description) -> FastAPI:
    """Return the application; its ``state.drain`` refuses new queries and waits for running ones."""
    if ALL in about.classes:
        raise ConfigurationError(f"found a task '{ALL}', which is the model of every task; rename it")
    models = {task: [place] for place, task in enumerate(about.classes)} | {ALL: list(range(len(about.classes)))}
    reader, registry = Reader(about, front.limits), CollectorRegistry()
    queries = Counter("coin_queries", "Queries by how they ended", ["end"], registry=registry)
    times = Histogram("coin_answer_seconds", "The servers' time", ["model"], registry=registry)
    up = Gauge("coin_server_up", "Whether its last request went well", ["server"], registry=registry)
    for name, server in front.servers.items():
        up.labels(name).set_function(lambda server=server: not server.doubted)
    app = FastAPI(title="coin", summary="Coded serving by the Open Inference Protocol", version="2")
    app.state.drain = front.drain

    @app.exception_handler(CoinError)
    async def tell(request: Request, error: CoinError) -> JSONResponse:
        status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
        status = error.status if isinstance(error, RefusedError) else status
        queries.labels(type(error).__name__).inc()
        headers = {"retry-after": "1"} if status in (429, 503, 504) else {}
        if status not in (400, 404, 408, 500, 504):  # the body was not read to its end
            headers["connection"] = "close"
            await reader.discard(request)
        return JSONResponse({"error": str(error), "kind": type(error).__name__}, status, headers)

    async def experts_of(model: str = ALL) -> list[int]:
        if model not in models:
            raise RefusedError(f"found model '{model}', expected one of {', '.join(models)}", 404)
        return models[model]

    Experts = Annotated[list[int], Depends(experts_of)]

    @app.post("/v2/models/{model}/infer")
    async def infer(model: str, experts: Experts, request: Request) -> JSONResponse:
        """Answer for a task, or for all of them; see `coin.serving.protocol`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + front.limits.deadline
        with front.admitted():
            asked, inputs = await reader.read(request, model)
            began = loop.time()
            answers = await front.ask(inputs, experts, deadline)
        told = about.response(model, asked, answers, loop.time() - began)
        times.labels(model).observe(told["parameters"]["seconds"])
        queries.labels("decoded" if told["parameters"]["decoded"] else "answered").inc()
        return JSONResponse(told)

    @app.get("/v2")
    async def about_server() -> dict[str, Any]:
        """Return the protocol's server metadata."""
        return {"name": "coin", "version": "2", "extensions": [], "models": list(models)}

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Answer."""
        return {"live": True}

    @app.get("/v2/health/ready")
    @app.get("/v2/models/{model}/ready")
    async def ready(experts: Experts, response: Response, model: str = ALL) -> dict[str, Any]:
        """Return 200 if the task, or every task, can be answered, else 503."""
        response.status_code = 200 if (is_ready := front.can_answer(experts)) else 503
        return {"name": model, "ready": is_ready}

    @app.get("/v2/models/{model}", dependencies=[Depends(experts_of)])
    async def metadata(model: str) -> dict[str, Any]:
        """Return a model's inputs, outputs and classes."""
        return about.metadata(model)

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Return Prometheus' metrics."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app
