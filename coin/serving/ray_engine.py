"""The engine on Ray Serve: a deployment for every expert, coded model and copy, and the front end before them."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from coin.coding import DecoderConfig
from coin.errors import ConfigurationError, ServingError
from coin.serving.decodings import Decodings
from coin.serving.faults import Faults
from coin.serving.front_end import FrontEnd
from coin.serving.images import InputLimits
from coin.serving.layout import Layout
from coin.serving.limits import Limits
from coin.serving.model import NetworkServer
from coin.serving.policies import Policy
from coin.serving.replies import Reply, ReplyFormat, Server
from coin.serving.service import Description, Service

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

Arrays = tuple[NDArray[np.float32], NDArray[np.float32] | None]

_ONGOING = 8
"""Requests that Ray may hand to a server at a time. The front end sends one after the other; with room to spare, Ray's
router never has to wait for it to learn that the last one is done."""

_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""What Ray reads from the environment: nothing is reported to its makers, and servers are not put last in line for
the processor, as Ray's workers are otherwise."""

_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""For a cluster of this machine alone, on any system: Ray's own ports, which take orders from whoever reaches them,
listen at the loopback address, not at all interfaces."""


@dataclass(frozen=True)
class System:
    """Everything that is served.

    Args:
        paths: Every server's network, in the order of the layout. All machines must see these files.
        names: The servers' names.
        layout: The servers.
        policy: Decides whom to ask.
        expects: The format of their replies.
        decoder: The decoder that reads them.
        decodings: The decoders, fitted.
        description: What is served.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    layout: Layout
    policy: Policy
    expects: ReplyFormat
    decoder: DecoderConfig
    decodings: Decodings
    description: Description


@dataclass(frozen=True)
class Resources:
    """What a server gets.

    Args:
        cpus: Ray's processor cores for each; with 0 Ray does not count them.
        gpus: GPUs for each, or a share of one.
        threads: PyTorch's threads for each.

    Raises:
        ConfigurationError: One of them is negative, or there is no thread.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.cpus < 0 or self.gpus < 0 or self.threads < 1:
            raise ConfigurationError(f"found {self}, expected no negative number and at least one thread")


class ModelReplica:
    """A network in a process of its own."""

    def __init__(
        self, name: str, path: str, outputs: int, decoder: DecoderConfig, device: str, threads: int, faults: Faults
    ) -> None:
        torch.set_num_threads(threads)
        self._name, self._faults = name, faults
        self._server = NetworkServer(Path(path), outputs, decoder, device)

    def __call__(self, images: NDArray[np.uint8]) -> Arrays:
        """Return logits ``[B, C]`` and features ``[B, F]``, if they are read, of uint8 images ``[B, 1 or 3, H, W]``."""
        began = time.perf_counter()
        reply = self._server(torch.tensor(images))
        if self._faults:
            self._faults.sleep(self._name, began)
        return reply.logits.numpy(), None if reply.features is None else reply.features.numpy()

    def check_health(self) -> None:
        """Raise where the network does not answer a black image with finite numbers; Ray then starts another."""
        side = self._server.image_size
        reply = self._server(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        if not bool(torch.isfinite(reply.logits).all()):
            raise ServingError("the network's answer is not finite")


class Ingress:
    """The front end as Ray Serve's ingress.

    Args:
        system: What is served.
        limits: What bounds waiting.
        inputs: What a query may bring.
        handles: Of the servers' deployments.
    """

    def __init__(self, system: System, limits: Limits, inputs: InputLimits, *handles: Any) -> None:
        front = FrontEnd(
            [_asking(handle) for handle in handles],
            system.layout,
            system.policy,
            system.expects,
            system.decodings if system.layout.num_coded else None,
            limits,
            system.names,
        )
        self._service = Service(front, system.description, inputs)

    async def __call__(self, request: "Request") -> "Response":
        """Answer an HTTP request; see `Service`."""
        from starlette.responses import JSONResponse

        headers: Mapping[str, str] = request.headers
        status, told = await self._service.respond(request.method, request.url.path, headers, request.stream())
        return JSONResponse(told, status)


def _asking(handle: Any) -> Server:
    async def ask(images: torch.Tensor) -> Reply:
        response = handle.remote(images.numpy())
        try:
            logits, features = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            cause = getattr(error, "cause", None)  # what the server raised: Ray's own message is its stack
            raise cause if isinstance(cause, Exception) else error from None
        # Ray's arrays cannot be written to, and PyTorch has no such tensors.
        return Reply(torch.tensor(logits), None if features is None else torch.tensor(features))

    return ask


@dataclass(frozen=True)
class RayOptions:
    """Where and how to serve.

    Args:
        host: The address to listen at; the default one is reached from this machine alone.
        port: The port.
        address: Of a running Ray cluster, such as ``auto``; none starts one of its own on this machine.
        resources: What every server gets.
        limits: What bounds waiting.
        inputs: What a query may bring.
        faults: Troubles put in on purpose, for trials.

    Raises:
        ConfigurationError: The port is none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None
    resources: Resources = field(default_factory=Resources)
    limits: Limits = field(default_factory=Limits)
    inputs: InputLimits = field(default_factory=InputLimits)
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigurationError(f"found port {self.port}, expected one from 1 to 65535")


def start(system: System, options: RayOptions) -> Callable[[], None]:
    """Serve on Ray Serve until the returned function is called.

    Raises:
        ConfigurationError: Ray is not installed, or a fault is for a server that does not exist.
        ServingError: Ray cannot serve here.
    """
    options.faults.check(system.names)
    for name, value in {**_RAY, **({} if options.address else _ALONE)}.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigurationError("found no Ray Serve, expected it; pip install 'coded-coin[serve]'") from error
    resources = options.resources
    try:
        if not ray.is_initialized():
            ray.init(options.address or "local", include_dashboard=False, log_to_driver=False, logging_level="error")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": options.host, "port": options.port})
        actor = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
        device, outputs = "cuda" if resources.gpus > 0 else "cpu", system.expects.outputs
        handles = [
            serve.deployment(ModelReplica)
            .options(name=name, ray_actor_options=actor, max_ongoing_requests=_ONGOING, health_check_period_s=5)
            .bind(name, str(path.resolve()), outputs, system.decoder, device, resources.threads, options.faults)
            for name, path in zip(system.names, system.paths, strict=True)
        ]
        ingress = serve.deployment(Ingress).options(
            ray_actor_options={"num_cpus": 0}, max_ongoing_requests=options.limits.queries + _ONGOING
        )
        serve.run(ingress.bind(system, options.limits, options.inputs, *handles), name="coin", route_prefix="/")
    except Exception as error:  # Ray's errors share no base class
        serve.shutdown()
        ray.shutdown()
        raise ServingError(f"Ray cannot serve here ({error}); see its logs in /tmp/ray") from error

    def stop() -> None:
        serve.shutdown()
        ray.shutdown()

    return stop
