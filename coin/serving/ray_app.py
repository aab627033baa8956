"""The application on Ray Serve: a deployment per expert, coded model and replica, and the front end before them."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coin.coding import DecoderConfig
from coin.core.choices import check_integer, check_number
from coin.core.ray_cluster import set_ray_variables, start_ray
from coin.errors import ConfigurationError, ServingError
from coin.files.packaged import how_to_install
from coin.serving.decodings import Decodings
from coin.serving.front_end import FrontEnd
from coin.serving.layout import Layout
from coin.serving.limits import InputLimits, Limits
from coin.serving.policies import Policy
from coin.serving.protocol import Description
from coin.serving.replies import Reply, ReplyFormat, Server

if TYPE_CHECKING:
    from fastapi import FastAPI

    from coin.serving.model import NetworkServer

Arrays = tuple[NDArray[np.float32], NDArray[np.float32] | None]

# A server has nothing to finish: the front end gives every query its end before it stops.
_STOPPING = {"graceful_shutdown_timeout_s": 3.0, "graceful_shutdown_wait_loop_s": 0.1}
_SENDING = 0.5  # seconds for a front end's last word to pass Ray's proxy


@dataclass(frozen=True)
class System:
    """Everything that is served: what `FrontEnd` takes, the decoder of the replies and the system's description.

    `processes` are the networks' files of every process's servers, in the layout's order, below `folder`, a path that
    all machines see.
    """

    folder: str
    processes: Mapping[str, Mapping[str, str]]
    layout: Layout
    policy: Policy
    expects: ReplyFormat
    probe: Tensor
    decoder: DecoderConfig
    decodings: Decodings | None
    description: Description

    def front_end(self, servers: Mapping[str, Server], limits: Limits) -> FrontEnd:
        """Return the front end of these servers."""
        return FrontEnd(servers, self.layout, self.policy, self.expects, self.probe, self.decodings, limits)


@dataclass(frozen=True)
class Resources:
    """The resources of a server.

    Args:
        cpus: Ray's CPU cores per server; with 0 Ray does not count them.
        gpus: GPUs per server, or a fraction of one.
        threads: PyTorch's threads per server.
        front_ends: The number of front-end processes, each with its own view of the servers.
        node: A Ray resource of which every server takes one unit: nodes started with one unit (``ray start
            --resources='{"coin": 1}'``) then run one server each; with too few nodes serving does not start.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    threads: int = 1
    front_ends: int = 1
    node: str | None = None

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus"):
            check_number(name, getattr(self, name), low=0)
        for name in ("threads", "front_ends"):
            check_integer(name, getattr(self, name), 1)


@dataclass(frozen=True)
class RayOptions:
    """Address and resources of serving.

    Args:
        host: The address to listen on; the default is reachable from this machine only.
        port: The port.
        address: The address of a running Ray cluster, such as ``auto``; by default a new one is started on this
            machine.
        resources: The resources of every server.
        limits: The limits on waiting.
        inputs: The limits on a query's size.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None
    resources: Resources = field(default_factory=Resources)
    limits: Limits = field(default_factory=Limits)
    inputs: InputLimits = field(default_factory=InputLimits)

    def __post_init__(self) -> None:
        check_number("port", self.port, low=1, high=65536)


class ModelProcess:
    """One network, or all networks of a replica, in its own process, which runs one pass at a time.

    A pass whose callers have all given up is not started; a running one is finished. All passes share one thread, with
    `threads` PyTorch threads. `batch` is the largest number of requests of several front ends run together.
    """

    def __init__(
        self, paths: Mapping[str, Path], outputs: int, decoder: DecoderConfig, device: str, threads: int, batch: int
    ) -> None:
        from ray import serve

        from coin.serving.model import NetworkServer  # not for the front end, which is back sooner without it

        torch.set_num_threads(threads)
        self._networks = {name: NetworkServer(path, outputs, decoder, device) for name, path in paths.items()}
        thread, batched = ThreadPoolExecutor(1, "pass"), serve.batch(max_batch_size=batch, batch_wait_timeout_s=0.0)

        def pass_of(network: NetworkServer) -> Callable[[list[NDArray[Any]]], Any]:
            async def run(requests: list[NDArray[Any]]) -> list[Arrays]:
                return await asyncio.get_running_loop().run_in_executor(thread, run_together, network, requests)

            return run

        self._passes = {name: batched(pass_of(network)) for name, network in self._networks.items()}
        self.check_health()  # and the first query need not wait for what a first pass takes

    async def __call__(self, name: str, stored: NDArray[Any]) -> Arrays:
        """Return logits ``[B, C]`` and features ``[B, F]``, if they are read, of a network's stored inputs."""
        found: Arrays = await self._passes[name](stored)
        return found

    def check_health(self) -> None:
        """Raise if a network's answer is not finite; Ray then starts a new process."""
        for network in self._networks.values():
            if not bool(torch.isfinite(network(network.probe).logits).all()):
                raise ServingError("the network's answer is not finite")


class FrontEndProcess:
    """The methods of a front end that Ray calls, beside the application, which Ray Serve adds as `app`."""

    app: Any

    def __init__(self, *servers: Any) -> None:
        """Set the servers' deployments, which makes Ray start them."""

    async def drain(self) -> str:
        """Take no more queries, wait for running ones, and return the name of this front end."""
        await self.app.state.drain()
        return str(self.app.state.name)


def run_together(network: "NetworkServer", requests: list[NDArray[Any]]) -> list[Arrays]:
    """Return a network's replies to several requests, in one pass if their shapes allow it."""
    if len({request.shape[1:] for request in requests}) > 1:
        return [reply for request in requests for reply in run_together(network, [request])]
    reply = network(torch.tensor(np.concatenate(requests)))
    stops = np.cumsum([len(request) for request in requests])[:-1]
    features = [None] * len(requests) if reply.features is None else np.split(reply.features.numpy(), stops)
    return list(zip(np.split(reply.logits.numpy(), stops), features, strict=True))


def _asking(handle: Any, name: str) -> Server:
    async def ask(stored: Tensor) -> Reply:
        response = handle.remote(name, stored.numpy())
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


def ray_application(system: System, options: RayOptions) -> Any:
    """Return the Ray Serve application, for ``serve.run`` or as the builder of a Serve YAML."""
    serve = _serve()
    resources, limits, inputs = options.resources, options.limits, options.inputs
    takes = {} if resources.node is None else {resources.node: 1}
    actor = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "resources": takes}
    servers = serve.deployment(ModelProcess).options(
        ray_actor_options=actor, max_ongoing_requests=2 * limits.batch, health_check_period_s=5, **_STOPPING
    )
    shared, device = Path(system.folder).resolve(), "cuda" if resources.gpus > 0 else "cpu"
    about = system.expects.outputs, system.decoder, device, resources.threads, limits.batch
    deployments = [
        servers.options(name=process).bind({name: shared / path for name, path in networks.items()}, *about)
        for process, networks in system.processes.items()
    ]

    def build() -> "FastAPI":
        from coin.serving.app import make_app

        own = serve.get_replica_context()
        asking = {
            name: _asking(serve.get_deployment_handle(process, app_name=own.app_name), name)
            for process, networks in system.processes.items()
            for name in networks
        }
        return make_app(system.front_end(asking, limits), system.description, inputs, own.replica_id.unique_id)

    front = serve.deployment(serve.ingress(build)(FrontEndProcess)).options(
        name="front-end", num_replicas=resources.front_ends, ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * limits.queries, logging_config={"encoding": "JSON"}, **_STOPPING,
    )  # fmt: skip
    return front.bind(*deployments)


def _serve() -> Any:
    try:
        import fastapi  # noqa: F401 (Ray Serve has none without its extra)
        from ray import serve
    except ImportError as error:
        raise ConfigurationError(f"found no Ray Serve, expected it; {how_to_install('serve')}") from error
    return serve


def check_port(options: RayOptions) -> None:
    """Raise `ServingError` if the port is in use; Ray would share it silently."""
    if options.address is not None:
        return  # it is that of a cluster, which may serve other applications at it
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        socket.create_server((options.host, options.port), family=family).close()
    except OSError as error:
        told = f"cannot listen at {options.host}:{options.port} ({os.strerror(error.errno or 0)}), expected a free port"
        raise ServingError(f"{told}; stop what listens there, or set --ray.port") from error


def start(system: System, options: RayOptions) -> Callable[[], None]:
    """Serve on Ray Serve until the returned function is called, which first lets running queries finish.

    Raises ConfigurationError where Ray is not installed, ServingError where it cannot serve here.
    """
    set_ray_variables(options.address)
    serve = _serve()
    import ray

    def drain() -> None:
        drained: set[str] = set()
        end = time.monotonic() + options.limits.deadline
        while len(drained) < options.resources.front_ends and time.monotonic() < end:
            drained.add(serve.get_app_handle("coin").drain.remote().result(timeout_s=options.limits.deadline))
        time.sleep(_SENDING)

    def stop() -> None:
        with suppress(Exception):  # whoever cannot be drained is stopped all the same
            drain()
        serve.shutdown()
        ray.shutdown()

    try:
        start_ray(options.address)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        waits = options.limits.deadline + _SENDING  # also for a front end that was killed, until Ray has another
        serve.start(http_options={"host": options.host, "port": options.port, "request_timeout_s": waits})
        serve.run(ray_application(system, options), name="coin", route_prefix="/")
    except Exception as error:  # Ray's errors share no base class
        stop()
        raise ServingError(f"Ray cannot serve here ({error}); see its logs in /tmp/ray") from error
    return stop
