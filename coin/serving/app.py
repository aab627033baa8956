"""The front end over HTTP: a FastAPI application of the Open Inference Protocol, with metrics and readiness."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.requests import ClientDisconnect

from coin.errors import CoinError, ConfigurationError, DataError, DeadlineError, OverloadedError, ServingError
from coin.serving.front_end import FrontEnd
from coin.serving.images import TooLargeError
from coin.serving.limits import InputLimits
from coin.serving.protocol import ALL, Description, InferRequest, model_metadata, read_request, response

logger = logging.getLogger("ray.serve.coin")  # Ray Serve writes what is logged below its own, as JSON where told to


class SlowError(ServingError):
    """A body took too long to arrive."""


class UnknownModelError(DataError):
    """There is no such model."""


_STATUS: dict[type[CoinError], int] = {
    TooLargeError: 413, UnknownModelError: 404, DataError: 400, SlowError: 408, DeadlineError: 504, ServingError: 503,
    CoinError: 500,
}  # fmt: skip
"""The first that an error is an instance of counts."""


class _Uploads:
    """Reads bodies: so many at a time, each of them so long and for so long."""

    def __init__(self, limits: InputLimits) -> None:
        self.limits = limits
        self.count = 0

    async def read(self, request: Request) -> bytes:
        limits = self.limits
        if self.count >= limits.uploads:
            raise OverloadedError(f"{self.count} queries are being read, the most there may be; ask again later")
        too_large = TooLargeError(f"found a body of more than {limits.bytes} bytes; send fewer or smaller inputs")
        if int(request.headers.get("content-length", 0)) > limits.bytes:
            raise too_large
        read = bytearray()
        self.count += 1
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
            self.count -= 1
        return bytes(read)


class _Collector:
    """What Prometheus reads off a front end."""

    def __init__(self, front: FrontEnd) -> None:
        self.front = front

    def collect(self) -> Iterable[Metric]:
        """Yield what prometheus_client asks for."""
        front = self.front
        queries = CounterMetricFamily("coin_queries", "Queries by how they ended", labels=["end"])
        for end in ("answered", "lost", "expired", "overloaded", "cancelled", "undecodable", "stopped"):
            queries.add_metric([end], front.counts[end])
        up = GaugeMetricFamily("coin_server_up", "Whether a server is believed to be up", labels=["server"])
        requests = GaugeMetricFamily("coin_server_requests", "Requests that wait for a server", labels=["server"])
        for queue in front.queues:
            up.add_metric([queue.name], not queue.is_down)
            requests.add_metric([queue.name], len(queue))
        late = GaugeMetricFamily("coin_late_after_seconds", "When an answer is late", labels=["experts", "size"])
        for (wanted, size), lateness in front.lateness.items():
            late.add_metric([f"{wanted:b}", str(2**size - 1)], lateness.seconds)
        decoded = CounterMetricFamily("coin_decoded_answers", "Answers that were decoded", front.counts["decoded"])
        return queries, decoded, up, requests, late


def make_app(front: FrontEnd, about: Description, limits: InputLimits) -> FastAPI:
    """Return the application; it starts the front end and stops it with itself."""
    if ALL in about.classes:
        raise ConfigurationError(f"found a task '{ALL}', which is the model of every task; rename it")
    models = {task: 1 << place for place, task in enumerate(about.classes)} | {ALL: front.layout.every_expert}
    registry = CollectorRegistry()
    registry.register(_Collector(front))
    buckets = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    seconds = Histogram(
        "coin_answer_seconds", "From a query to its answer", ["model", "decoded"], registry=registry, buckets=buckets
    )
    uploads = _Uploads(limits)
    readers = ThreadPoolExecutor(2, "reader")
    """Reading images and JSON takes long enough to hold everybody else up, and memory enough to bound it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with front:
            yield
        readers.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="coin", summary="Coded serving by the Open Inference Protocol", version="2", lifespan=lifespan)

    @app.exception_handler(CoinError)
    async def tell(request: Request, error: CoinError) -> JSONResponse:
        status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
        logger.info("refused", extra={"path": request.url.path, "status": status, "error": str(error)})
        # Nobody reads on in a body that was given up.
        headers = {"connection": "close"} if status in (408, 413) or isinstance(error, OverloadedError) else None
        return JSONResponse({"error": str(error), "kind": type(error).__name__}, status, headers)

    @app.exception_handler(RequestValidationError)
    async def tell_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return await tell(request, DataError(f"found a wrong {first['loc'][-1]} ({first['msg']})"))

    async def experts_of(model: str) -> int:
        if model not in models:
            raise UnknownModelError(f"found model '{model}', expected one of {', '.join(models)}")
        return models[model]

    Experts = Annotated[int, Depends(experts_of)]
    schema = {"content": {"application/json": {"schema": InferRequest.model_json_schema()}}}

    @app.post("/v2/models/{model}/infer", openapi_extra={"requestBody": schema})
    async def infer(
        model: str,
        experts: Experts,
        request: Request,
        inference_header_content_length: Annotated[int | None, Header(ge=0)] = None,
    ) -> dict[str, Any]:
        """Answer for a task, or for all of them; see `coin.serving.protocol`."""
        body = await uploads.read(request)
        identity, inputs = await asyncio.get_running_loop().run_in_executor(
            readers, read_request, body, inference_header_content_length, about, limits
        )
        answers = await front.ask_all(inputs) if model == ALL else [await front.ask(inputs, experts.bit_length() - 1)]
        told = response(model, identity, answers, about)
        said = told["parameters"]
        seconds.labels(model, said["decoded"]).observe(said["seconds"])
        logger.info("answered", extra={"model": model, "samples": len(inputs), **said})
        return told

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        """Return what the protocol says of a server."""
        return {"name": "coin", "version": "2", "extensions": ["binary_tensor_data"], "models": list(models)}

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Answer."""
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready(response: Response) -> dict[str, bool]:
        """Say whether every task could be answered: 503 where it could not."""
        is_ready = front.can_answer()
        response.status_code = 200 if is_ready else 503
        return {"ready": is_ready}

    @app.get("/v2/models/{model}/ready")
    async def model_ready(model: str, experts: Experts, response: Response) -> dict[str, Any]:
        """Say whether a task could be answered: 503 where it could not."""
        is_ready = front.can_answer(experts)
        response.status_code = 200 if is_ready else 503
        return {"name": model, "ready": is_ready}

    @app.get("/v2/models/{model}", dependencies=[Depends(experts_of)])
    async def metadata(model: str) -> dict[str, Any]:
        """Return a model's inputs, outputs and classes."""
        return model_metadata(model, about)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Return who is believed to be up and why not, and what became of the queries so far."""
        servers = {
            queue.name: {"up": not queue.is_down, "requests": len(queue), "last_error": queue.last_error}
            for queue in front.queues
        }
        policy = {"policy": str(front.policy.kind), "quantile": front.policy.quantile}
        return {"ready": front.can_answer(), "servers": servers, "queries": dict(front.counts), **policy}

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Return Prometheus' metrics."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app
