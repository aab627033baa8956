"""The front end over HTTP: a FastAPI application of the Open Inference Protocol, with metrics and readiness."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException

from coin.errors import CoinError, ConfigurationError, DataError, DeadlineError, OverloadedError, ServingError
from coin.serving.front_end import FrontEnd
from coin.serving.layout import members
from coin.serving.limits import InputLimits
from coin.serving.protocol import ALL, VERSION, Description, response
from coin.serving.reading import Reader, SlowError
from coin.serving.requests import EncodingError, InferRequest, TooLargeError

logger = logging.getLogger("ray.serve.coin")  # Ray Serve writes what is logged below its own, as JSON where told to


class UnknownModelError(DataError):
    """The requested model does not exist."""


_STATUS: dict[type[CoinError], int] = {
    TooLargeError: 413, UnknownModelError: 404, EncodingError: 415, DataError: 400, SlowError: 408, DeadlineError: 504,
    OverloadedError: 429, ServingError: 503, CoinError: 500,
}  # fmt: skip
"""The first that an error is an instance of counts; 429 is for too many queries, 503 for too few servers."""


@dataclass(frozen=True)
class _Collector:
    """The Prometheus metrics of a front end."""

    front: FrontEnd
    reader: Reader
    name: str

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics for prometheus_client."""
        front, name = self.front, self.name

        def gauge(metric: str, help: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"coin_{metric}", help, labels=[*labels, "front_end"])

        queries = CounterMetricFamily("coin_queries", "Queries by how they ended", labels=["end", "front_end"])
        for end in ("answered", "lost", "expired", "overloaded", "cancelled", "undecodable", "stopped", "refused"):
            queries.add_metric([end, name], front.counts[end])
        up = gauge("server_up", "Whether a server is believed to be up", "server")
        requests = gauge("server_requests", "Requests that wait for a server", "server")
        for queue in front.queues:
            up.add_metric([queue.name, name], not queue.is_down)
            requests.add_metric([queue.name, name], len(queue))
        late = gauge("late_after_seconds", "When an answer is late", "experts", "size")
        for (wanted, size), lateness in front.lateness.items():
            late.add_metric([f"{wanted:b}", str(2**size - 1), name], lateness.seconds)
        decoded = CounterMetricFamily("coin_decoded_answers", "Answers that were decoded", labels=["front_end"])
        decoded.add_metric([name], front.counts["decoded"])
        reading = gauge("reading", "What queries that are being read hold", "unit")
        for budget in (self.reader.bytes, self.reader.pixels):
            reading.add_metric([budget.what, name], budget.held)
        return queries, decoded, up, requests, late, reading


def make_app(front: FrontEnd, about: Description, limits: InputLimits, name: str = "") -> FastAPI:
    """Return the application, which starts and stops the front end with itself.

    Its ``state.drain`` refuses new queries and waits for running ones; ``state.name`` labels the front end's metrics.
    """
    if ALL in about.classes:
        raise ConfigurationError(f"found a task '{ALL}', which is the model of every task; rename it")
    models = {task: 1 << place for place, task in enumerate(about.classes)} | {ALL: front.layout.every_expert}
    reader = Reader(about, limits)
    registry = CollectorRegistry()
    registry.register(_Collector(front, reader, name))
    buckets = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    labels = ["model", "decoded", "front_end"]
    seconds = Histogram("coin_answer_seconds", "From a query to its answer", labels, registry=registry, buckets=buckets)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with front:
            yield
        reader.stop()

    app = FastAPI(title="coin", summary="Coded serving by the Open Inference Protocol", version="2", lifespan=lifespan)
    app.state.drain, app.state.name = front.drain, name

    @app.exception_handler(CoinError)
    async def tell(request: Request, error: CoinError) -> JSONResponse:
        status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
        logger.info("refused", extra={"path": request.url.path, "status": status, "error": str(error)})
        headers = {"retry-after": "1"} if status in (429, 503, 504) else {}
        if status in (408, 413, 429, 503):  # what is left of the body, after a while, is nobody's to read
            headers["connection"] = "close"
            if status != 408:  # which has waited for it
                await reader.discard(request)
        return JSONResponse({"error": str(error), "kind": type(error).__name__}, status, headers)

    @app.exception_handler(RequestValidationError)
    async def tell_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return await tell(request, DataError(f"found a wrong {first['loc'][-1]} ({first['msg']})"))

    @app.exception_handler(HTTPException)
    async def tell_unknown(request: Request, error: HTTPException) -> JSONResponse:
        said = f"found {request.method} {request.url.path} ({error.detail}), expected a path of /openapi.json"
        return JSONResponse({"error": said, "kind": type(error).__name__}, error.status_code, error.headers)

    async def experts_of(model: str, request: Request) -> int:
        if model not in models:
            raise UnknownModelError(f"found model '{model}', expected one of {', '.join(models)}")
        if (version := request.path_params.get("version", VERSION)) != VERSION:
            raise UnknownModelError(f"found version '{version}' of model '{model}', expected {VERSION}")
        return models[model]

    router = APIRouter()  # a model's paths, with its version and without
    Experts = Annotated[int, Depends(experts_of)]
    schema = {"content": {"application/json": {"schema": InferRequest.model_json_schema()}}}

    @router.post("/infer", openapi_extra={"requestBody": schema})
    async def infer(
        model: str,
        experts: Experts,
        request: Request,
        inference_header_content_length: Annotated[int | None, Header(ge=0)] = None,
    ) -> Response:
        """Answer for a task, or for all of them; see `coin.serving.protocol`."""
        deadline = asyncio.get_running_loop().time() + front.limits.deadline
        with front.admitted():
            try:
                async with asyncio.timeout_at(deadline):
                    parsed, inputs = await reader.read(request, model, inference_header_content_length)
            except TimeoutError:
                front.counts["overloaded"] += 1
                raise OverloadedError("the query waited too long to be read; ask again later") from None
            except (DataError, SlowError, OverloadedError) as error:
                front.counts["overloaded" if isinstance(error, OverloadedError) else "refused"] += 1
                raise
            answers = await front.ask_experts(inputs, list(members(experts)), deadline)
        told, binary = response(model, parsed.request.id, parsed.outputs, answers, about)
        said = told["parameters"]
        seconds.labels(model, said["decoded"], name).observe(said["seconds"])
        logger.info("answered", extra={"model": model, "samples": len(inputs), **said})
        text = json.dumps(told, allow_nan=False).encode()
        if not binary:
            return Response(text, media_type="application/json")
        headers = {"inference-header-content-length": str(len(text))}
        return Response(text + binary, headers=headers, media_type="application/octet-stream")

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        """Return the protocol's server metadata."""
        return {"name": "coin", "version": "2", "extensions": ["binary_tensor_data"], "models": list(models)}

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Answer."""
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready(response: Response) -> dict[str, bool]:
        """Return 200 if every task can be answered, else 503."""
        is_ready = front.can_answer()
        response.status_code = 200 if is_ready else 503
        return {"ready": is_ready}

    @router.get("/ready")
    async def model_ready(model: str, experts: Experts, response: Response) -> dict[str, Any]:
        """Return 200 if the task can be answered, else 503."""
        is_ready = front.can_answer(experts)
        response.status_code = 200 if is_ready else 503
        return {"name": model, "ready": is_ready}

    @router.get("", dependencies=[Depends(experts_of)])
    async def metadata(model: str) -> dict[str, Any]:
        """Return a model's inputs, outputs and classes."""
        return about.metadata(model)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Return which servers are considered up or why not, and the counts of query outcomes."""
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

    for version in ("", "/versions/{version}"):
        app.include_router(router, prefix=f"/v2/models/{{model}}{version}")
    return app
