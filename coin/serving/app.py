"""The front end over HTTP: a FastAPI application of the Open Inference Protocol, with metrics and readiness."""

import asyncio
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    generate_latest,
)
from starlette.requests import ClientDisconnect

from coin.errors import (
    CoinError,
    ConfigurationError,
    DataError,
    DeadlineError,
    OverloadedError,
    ServingError,
)
from coin.serving.front_end import FrontEnd
from coin.serving.limits import Limits
from coin.serving.protocol import ALL, RefusedError, metadata, parse, response

# 429 is for too many queries, 503 for too few servers.
_STATUS = {
    DataError: 400,
    DeadlineError: 504,
    OverloadedError: 429,
    ServingError: 503,
    CoinError: 500,
}


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return a request's body; a RefusedError if it is too large or comes too slowly.

    One that is too large is read on: a client that still sends would not see the answer.
    """
    body = bytearray()
    size = 0
    try:
        async with asyncio.timeout(limits.reading):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limits.bytes:
                    body += chunk
    except (ClientDisconnect, TimeoutError):
        raise RefusedError(
            f"found no end within {limits.reading:g} s; send it faster", 408
        ) from None
    if size > limits.bytes:
        raise RefusedError(
            f"found {size} bytes, expected at most {limits.bytes}; send fewer inputs", 413
        )
    return bytes(body)


def make_app(front: FrontEnd) -> FastAPI:
    """Return the application; its ``state.drain`` refuses new queries and waits for running ones."""
    system = front.system
    if ALL in system.classes:
        raise ConfigurationError(
            f"found a task '{ALL}', which is the model of every task; rename it"
        )
    models = {task: [place] for place, task in enumerate(system.classes)}
    models[ALL] = list(range(len(system.classes)))
    registry = CollectorRegistry()
    queries = Counter("coin_queries", "Queries by how they ended", ["end"], registry=registry)
    up = Gauge(
        "coin_server_up", "Whether its last request went well", ["server"], registry=registry
    )
    for name, server in front.servers.items():
        up.labels(name).set_function(lambda server=server: not server.is_lost)
    app = FastAPI(title="coin", summary="Coded serving by the Open Inference Protocol", version="2")
    app.state.drain = front.drain

    @app.exception_handler(CoinError)
    async def refuse(request: Request, error: CoinError) -> JSONResponse:
        kind = type(error)
        queries.labels(kind.__name__).inc()
        if isinstance(error, RefusedError):
            status = error.status
        else:
            status = next(_STATUS[base] for base in kind.__mro__ if base in _STATUS)
        is_temporary = status in (429, 503, 504)
        headers = {"retry-after": "1"} if is_temporary else {}
        return JSONResponse({"error": str(error), "kind": kind.__name__}, status, headers)

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
            body = await read_body(request, front.limits)
            asked, images = await asyncio.to_thread(parse, body, model, system, front.limits)
            began = loop.time()
            answers = await front.ask(images, experts, deadline)
        seconds = loop.time() - began
        content = response(system, model, asked, answers, seconds)
        queries.labels("decoded" if content["parameters"]["decoded"] else "answered").inc()
        return JSONResponse(content)

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
        is_ready = front.is_ready(experts)
        response.status_code = 200 if is_ready else 503
        return {"name": model, "ready": is_ready}

    @app.get("/v2/models/{model}", dependencies=[Depends(experts_of)])
    async def about_model(model: str) -> dict[str, Any]:
        """Return a model's inputs, outputs and classes."""
        return metadata(system, model)

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Return Prometheus' metrics."""
        content = generate_latest(registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    return app
