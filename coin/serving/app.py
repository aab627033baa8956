"""The front end over HTTP: a FastAPI application of the Open Inference Protocol, with metrics and readiness."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from coin.errors import CoinError, ConfigurationError, DataError, DeadlineError, OverloadedError, ServingError
from coin.serving.front_end import FrontEnd
from coin.serving.inputs import InputLimits, TooLargeError
from coin.serving.metrics import Metrics
from coin.serving.protocol import ALL, Description, InferRequest, model_metadata, read_request, response

logger = logging.getLogger("coin.serving")


class SlowError(ServingError):
    """A body took too long to arrive."""


class UnknownModelError(ConfigurationError):
    """There is no such model."""


_STATUS: tuple[tuple[type[CoinError], int], ...] = (
    (TooLargeError, 413),
    (UnknownModelError, 404),
    (DataError, 400),
    (ConfigurationError, 400),
    (SlowError, 408),
    (DeadlineError, 504),
    (ServingError, 503),
    (CoinError, 500),
)


def make_app(front: FrontEnd, about: Description, limits: InputLimits) -> FastAPI:
    """Return the application; it starts the front end and stops it with itself.

    Args:
        front: Answers.
        about: What is served.
        limits: What a query may bring.

    Raises:
        ConfigurationError: A task has the name of the model that answers for every task.
    """
    tasks = list(about.classes)
    if ALL in tasks:
        raise ConfigurationError(f"found a task '{ALL}', which is the model of every task; rename it")
    experts = {**{task: (place,) for place, task in enumerate(tasks)}, ALL: tuple(range(len(tasks)))}
    metrics = Metrics(front)
    readers = ThreadPoolExecutor(2, "reader")
    """Reading images and JSON takes long enough to hold everybody else up, and memory enough to bound it."""
    uploads = 0

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        front.start()
        try:
            yield
        finally:
            await front.stop()
            logger.info("stopped", extra={"queries": dict(front.counts)})
            readers.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="coin", summary="Coded serving by the Open Inference Protocol", version="2", lifespan=lifespan)

    async def tell(request: Request, error: CoinError) -> JSONResponse:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        logger.info("refused", extra={"path": request.url.path, "status": status, "error": str(error)})
        # Nobody reads on in a body that was given up.
        headers = {"connection": "close"} if status in (408, 413) or isinstance(error, OverloadedError) else None
        return JSONResponse({"error": str(error), "kind": type(error).__name__}, status, headers)

    def chosen(model: str) -> tuple[int, ...]:
        if model not in experts:
            raise UnknownModelError(f"found model '{model}', expected one of {', '.join(experts)}")
        return experts[model]

    async def body(request: Request) -> bytes:
        nonlocal uploads
        if uploads >= limits.uploads:
            raise OverloadedError(f"{uploads} queries are being read, the most there may be; ask again later")
        told = request.headers.get("content-length", "0")
        too_large = TooLargeError(f"found a body of more than {limits.bytes} bytes; send fewer or smaller inputs")
        if not told.isdecimal() or int(told) > limits.bytes:
            raise too_large
        read = bytearray()
        uploads += 1
        try:
            async with asyncio.timeout(limits.seconds):
                async for part in request.stream():
                    read += part
                    if len(read) > limits.bytes:
                        raise too_large
        except ClientDisconnect:
            raise SlowError("found half a body, and nobody to send the rest") from None
        except TimeoutError:
            raise SlowError(f"found no end of the body within {limits.seconds:g} s; send it faster") from None
        finally:
            uploads -= 1
        return bytes(read)

    schema = {"content": {"application/json": {"schema": InferRequest.model_json_schema()}}}

    async def infer(model: str, request: Request) -> dict[str, Any]:
        """Answer for a task, or for all of them; see `coin.serving.protocol`."""
        wanted = chosen(model)
        told = request.headers.get("inference-header-content-length")
        if told is not None and not told.isdecimal():
            raise DataError(f"found inference-header-content-length '{told}', expected a number of bytes")
        content, header = await body(request), None if told is None else int(told)
        loop = asyncio.get_running_loop()
        identity, inputs = await loop.run_in_executor(readers, read_request, content, header, about, limits)
        answers = await front.ask_all(inputs) if model == ALL else [await front.ask(inputs, wanted[0])]
        told_answers = response(model, identity, answers, about)
        said = told_answers["parameters"]
        metrics.seconds.labels(model, said["decoded"]).observe(said["seconds"])
        logger.info("answered", extra={"model": model, "samples": len(inputs), **said})
        return told_answers

    async def server() -> dict[str, Any]:
        """Return what the protocol says of a server."""
        return {"name": "coin", "version": "2", "extensions": ["binary_tensor_data"], "models": list(experts)}

    async def live() -> dict[str, bool]:
        """Answer."""
        return {"live": True}

    async def ready() -> JSONResponse:
        """Say whether every task could be answered: 503 where it could not."""
        is_ready = front.can_answer()
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def model_ready(model: str) -> JSONResponse:
        """Say whether a task could be answered: 503 where it could not."""
        is_ready = front.can_answer(sum(1 << expert for expert in chosen(model)))
        return JSONResponse({"name": model, "ready": is_ready}, 200 if is_ready else 503)

    async def metadata(model: str) -> dict[str, Any]:
        """Return a model's inputs, outputs and classes."""
        chosen(model)
        return model_metadata(model, about)

    async def health() -> dict[str, Any]:
        """Return who is believed to be up and why not, and what became of the queries so far."""
        servers = {
            queue.name: {"up": not queue.breaker.is_down, "requests": len(queue), "last_error": queue.last_error}
            for queue in front.queues
        }
        policy = {"policy": str(front.policy.kind), "quantile": front.policy.quantile}
        return {"ready": front.can_answer(), "servers": servers, "queries": dict(front.counts), **policy}

    async def prometheus() -> Response:
        """Return Prometheus' metrics."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    app.add_exception_handler(CoinError, tell)
    app.add_api_route("/v2/models/{model}/infer", infer, methods=["POST"], openapi_extra={"requestBody": schema})
    for path, endpoint in {
        "/v2": server,
        "/v2/health/live": live,
        "/v2/health/ready": ready,
        "/v2/models/{model}/ready": model_ready,
        "/v2/models/{model}": metadata,
        "/health": health,
        "/metrics": prometheus,
    }.items():
        app.add_api_route(path, endpoint, methods=["GET"])
    return app


class JsonLines(logging.Formatter):
    """Log records as JSON, a line each, with what they carry."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        plain = vars(logging.makeLogRecord({}))
        extra = {name: value for name, value in vars(record).items() if name not in plain}
        told = {"time": record.created, "level": record.levelname, "event": record.getMessage(), **extra}
        return json.dumps(told, default=str)
